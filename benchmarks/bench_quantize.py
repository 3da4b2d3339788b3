"""fake_quantize against torch's own and against the chain of torch ops; error feedback; packing at each
width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import Case, quantization_cases

from cora import gpu, ops, reference


@pytest.mark.parametrize("case", quantization_cases(), ids=str)
def bench_quantization(contest: Callable[[Case], None], case: Case) -> None:
    contest(case)


SHAPES = [(512, 4608), (4096, 4096)]


def parameters(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, 1) * 0.1 + 0.05, torch.full((rows, 1), 7, dtype=torch.int32)


@pytest.mark.parametrize(
    "way", ["torch", "torch-chain", "cora", "cora+residual+codes", "cora-scalar"]
)
@pytest.mark.parametrize("rows,cols", SHAPES)
def bench_forward(measure: Any, rows: int, cols: int, way: str) -> None:
    x, (scale, zero_point) = torch.randn(rows, cols), parameters(rows)
    more = "+" in way
    before = ops.isa()["level"]
    if way == "cora-scalar":
        ops.set_isa("scalar")
    run = {
        "torch": lambda: torch.fake_quantize_per_channel_affine(
            x, scale[:, 0], zero_point[:, 0], 0, 0, 15
        ),
        "torch-chain": lambda: reference.fake_quantize(
            x, scale, zero_point, 4, residual=True, codes=True
        ),
    }.get(way, lambda: ops.fake_quantize(x, scale, zero_point, 4, residual=more, codes=more))
    measure(f"forward {rows}x{cols}", run, bytes=x.numel() * (13 if more or "chain" in way else 8))
    ops.set_isa(before)


@pytest.mark.parametrize("way", ["torch", "cora"])
@pytest.mark.parametrize("rows,cols", SHAPES)
def bench_forward_backward(measure: Any, rows: int, cols: int, way: str) -> None:
    with torch.inference_mode(False):
        x, (scale, zero_point) = torch.randn(rows, cols, requires_grad=True), parameters(rows)
        grad, leaf = torch.randn(rows, cols), scale.clone().requires_grad_()
        point = zero_point[:, 0].float()

        def run() -> Any:
            if way == "torch":  # the learnable one: its backward too gives a scale gradient
                op = torch._fake_quantize_learnable_per_channel_affine
                out = op(x, leaf[:, 0], point, 0, 0, 15, 1.0)
            else:
                out = ops.fake_quantize(x, leaf, zero_point, 4)
            return torch.autograd.grad(out, (x, leaf), grad)

        measure(f"forward+backward {rows}x{cols}", run, bytes=x.numel() * 20)


@pytest.mark.parametrize("way", ["torch", "cora", "cora-avx2", "cora-scalar"])
@pytest.mark.parametrize("rows,cols", [(256, 2304), (512, 4608)])
def bench_error_feedback(measure: Any, float_peak: float, rows: int, cols: int, way: str) -> None:
    """Products and differences are rounded apart: half of the FMA peak is all there is."""
    scale, zero_point = parameters(rows)
    factor = torch.randn(1, cols, cols).triu_() * (0.1 / cols**0.5)
    factor.diagonal(dim1=1, dim2=2).fill_(1)
    args = (torch.randn(rows, cols), scale, zero_point, 4, factor, torch.randperm(cols)[None])
    run = gpu.error_feedback if way == "torch" else ops.error_feedback
    before = ops.isa()["level"]
    if "-" in way:
        ops.set_isa(way.removeprefix("cora-"))
    flop = rows * cols**2
    measure(
        f"error feedback {rows}x{cols}", lambda: run(*args), flop=flop, peak=float_peak, rounds=6
    )
    ops.set_isa(before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("way", ["pack", "unpack", "dequantize"])
def bench_packing(measure: Any, way: str, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (512, 4608), dtype=torch.uint8)
    packed, (scale, zero_point) = ops.pack_bits(codes, bits), parameters(512)
    run = {
        "pack": lambda: ops.pack_bits(codes, bits),
        "unpack": lambda: ops.unpack_bits(packed, bits, 4608),
        "dequantize": lambda: ops.dequantize_packed(packed, scale, zero_point, bits, 4608),
    }[way]
    measure(
        f"{way} 512x4608",
        run,
        bytes=packed.numel() + codes.numel() * (4 if way == "dequantize" else 1),
    )
