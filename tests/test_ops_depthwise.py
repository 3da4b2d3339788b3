"""Depthwise layers against the oracle, on every CPU level: floats and codes, in place and padded.

Codes and exact sums must be the same bits on all levels and thread counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import SUPPORTED, assert_product_close
from shapes import Layer, layer
from torch import Tensor

from cora import ops, reference


@dataclass(frozen=True)
class Case:
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 1

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return self.kernel, self.stride, self.padding, self.dilation

    def geometry(self, item: Layer) -> list[int]:
        return ops.layer_geometry(
            item.weight,
            item.scale,
            item.bits,
            self.channels,
            *self.pairs,
            self.channels,
            item.options["b"],
        )

    def prepare(self, module, item: Layer):
        options = {k: item.options.get(k) for k in ("a", "b", "adapter_scale", "bias")}
        return module.prepare_layer(
            *item.args(), self.channels, *self.pairs, self.channels, **options
        )

    def layer(self, bits: int = 4, *, rank: int = 1, **kwargs) -> Layer:
        return layer(self.channels, self.taps, bits, rank=rank, conv_groups=self.channels, **kwargs)


# Rows longer than a span of positions, shorter than a tile, tails of channels and of both.
CASES = {
    "one-channel": Case(2, (5, 6), batch=2),
    "7-channels": Case(7, (9, 4)),
    "16-channels": Case(16, (3, 31)),
    "33-channels": Case(33, (6, 15), batch=2),
    "97-channels": Case(97, (12, 7)),
    "wide": Case(40, (3, 61)),
    "tall": Case(5, (70, 3)),
    "strided": Case(48, (11, 30), stride=(2, 2)),
    "strided-across": Case(20, (6, 13), stride=(1, 3)),
    "dilated": Case(33, (9, 12), padding=(2, 2), dilation=(2, 2)),
    "dilated-strided": Case(33, (12, 11), stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    "1x1": Case(31, (5, 5), (1, 1), padding=(0, 0)),
    "1x5": Case(33, (5, 20), (1, 5), padding=(0, 2)),
    "5x1": Case(33, (20, 5), (5, 1), padding=(2, 0)),
    "2x4": Case(18, (7, 8), (2, 4), padding=(0, 1)),
    "5x5": Case(35, (7, 7), (5, 5), padding=(2, 2)),
    "5x5-strided": Case(35, (14, 15), (5, 5), (2, 2), (2, 2)),
    "7x7": Case(64, (9, 16), (7, 7), padding=(3, 3)),
    "filter-larger-than-image": Case(9, (2, 3), (5, 5), padding=(2, 2)),
    "padding-beyond-the-filter": Case(9, (4, 4), padding=(4, 5)),
}
WEIGHTS = {
    "4bit": {"bits": 4},
    "8bit": {"bits": 8},
    "far": {"bits": 4, "far": True},
    "no-adapter": {"bits": 3, "rank": 0},
    "float-adapter": {"bits": 4, "adapter": torch.float32},
    "per-tensor": {"bits": 4, "rows": 1, "bias": False},
}


def halo_codes(shape: tuple[int, ...], zero_point: int, halo: int) -> Tensor:
    """Random codes, channels last, with a border of zero_point."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes = torch.nn.functional.pad(codes, [halo] * 4, value=zero_point)
    return codes.to(memory_format=torch.channels_last)


def outputs(
    case: Case, item: Layer, x: Tensor, run: dict, modules=(ops, reference)
) -> list[Tensor]:
    return [m.run_layer(x, case.prepare(m, item), case.geometry(item), **run) for m in modules]


def magnitude(case: Case, item: Layer, x: Tensor) -> Tensor:
    """What the rounding errors are proportional to: the convolution of the magnitudes."""
    what = ops.dequantize_packed(*item.args()[:3], item.bits, case.taps).double().abs()
    a, b = item.options["a"].double().abs(), item.options["b"].double().abs()
    if item.options["b"].shape[1]:
        scale = item.options.get("adapter_scale")
        what = what + b * (a if scale is None else a * scale.double()[:, None])
    y = torch.nn.functional.conv2d(
        x.double().abs(),
        what.reshape(case.channels, 1, *case.kernel),
        None,
        *case.pairs[1:],
        case.channels,
    )
    bias = item.options.get("bias")
    return y if bias is None else y + bias.double().abs()[:, None, None]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CASES)
def test_floats(isa: str, name: str, weights: str) -> None:
    case = CASES[name]
    item = case.layer(**WEIGHTS[weights])
    x = torch.randn(case.batch, case.channels, *case.size)
    for format in (torch.contiguous_format, torch.channels_last):
        got, want = outputs(case, item, x.to(memory_format=format), {})
        assert_product_close(got, want, magnitude(case, item, x), case.taps)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CASES)
def test_codes_to_floats(isa: str, name: str, weights: str) -> None:
    case = CASES[name]
    item = case.layer(**WEIGHTS[weights])
    for halo in (0, max(case.padding) + 1):
        x = halo_codes((case.batch, case.channels, *case.size), 77, halo)
        run = {"x_scale": 0.05, "x_zero_point": 77, "x_bits": 8, "x_halo": halo}
        got, want = outputs(case, item, x, run)
        inner = x[..., halo : halo + case.size[0], halo : halo + case.size[1]]
        real = (inner.double() - 77) * 0.05
        assert_product_close(got, want, magnitude(case, item, real), case.taps)


def code_cases(case: Case, item: Layer) -> list[dict]:
    """Epilogues that end in codes: plain, ReLU, ReLU6, both kinds of addition, a range that saturates."""
    shape = reference.run_layer(
        torch.zeros(case.batch, case.channels, *case.size),
        case.prepare(reference, item),
        case.geometry(item),
    ).shape
    far = int(item.zero_point.abs().max()) > 2**20  # outputs are as large
    one = {"out_scale": 3e5 if far else 1.1, "out_zero_point": 128}
    return [
        {**one, "out_halo": 2},
        {**one, "out_zero_point": 3, "clamp_min": 0.0},
        {**one, "out_zero_point": 0, "out_halo": 1, "clamp_min": 0.0, "clamp_max": 6.0},
        {"out_scale": 1e3 if far else 1e-30, "out_zero_point": 9, "clamp_min": -1.5, "clamp_max": 1e30},
        {**one, "add": halo_codes(tuple(shape), 50, 1), "add_halo": 1, "add_scale": 0.3,
         "add_zero_point": 50},
        {**one, "add": torch.randn(shape).to(memory_format=torch.channels_last)},
    ]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "name", ["33-channels", "97-channels", "strided", "dilated", "5x5", "wide"]
)
def test_codes_to_codes(isa: str, name: str, weights: str) -> None:
    case = CASES[name]
    item = case.layer(**WEIGHTS[weights])
    x = halo_codes((case.batch, case.channels, *case.size), 120, 2)
    for run in code_cases(case, item):
        run = {"x_scale": 0.01, "x_zero_point": 120, "x_bits": 8, "x_halo": 2, **run}
        got, want = outputs(case, item, x, run)
        off = (got.int() - want.int()).abs()
        assert got.shape == want.shape
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01
        halo = run.get("out_halo", 0)
        if halo:
            assert (got[..., :halo] == run["out_zero_point"]).all()
            assert (got[:, :, -halo:] == run["out_zero_point"]).all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", CASES)
def test_codes_are_the_same_on_all_levels_and_threads(
    threads: Callable[[int], None], name: str, weights: str
) -> None:
    case = CASES[name]
    item = case.layer(**WEIGHTS[weights])
    halo = max(case.padding)
    x = halo_codes((case.batch, case.channels, *case.size), 120, halo)
    before = ops.isa()["level"]
    try:
        for run in ({}, *code_cases(case, item)):
            run = {"x_scale": 0.01, "x_zero_point": 120, "x_bits": 8, "x_halo": halo, **run}
            results = []
            for level, count in itertools.product(SUPPORTED, (1, 3)):
                ops.set_isa(level)
                threads(count)
                results += outputs(case, item, x, run, (ops,))
            assert all(torch.equal(results[0], other) for other in results[1:]), run.keys()
    finally:
        ops.set_isa(before)


@pytest.mark.parametrize("dynamic", [True, False])
def test_float_input_is_quantised(isa: str, dynamic: bool) -> None:
    """Images of different ranges, each with its own scale."""
    case = Case(35, (9, 11), batch=3)
    item = case.layer()
    x = torch.randn(3, 35, 9, 11) * torch.tensor([1.0, 3.0, 0.2])[:, None, None, None]
    run = {"x_bits": 8} if dynamic else {"x_bits": 8, "x_scale": 0.02, "x_zero_point": 90}
    for format in (torch.contiguous_format, torch.channels_last):
        got, want = outputs(case, item, x.to(memory_format=format), run)
        bound = magnitude(case, item, x) + magnitude(case, item, torch.full_like(x, 0.05))
        assert_product_close(got, want, bound, case.taps)


def test_not_a_number_gives_the_least_code(isa: str) -> None:
    case = Case(33, (4, 9))
    item = case.layer()
    item.options["bias"][::2] = math.nan
    x = halo_codes((1, 33, 4, 9), 120, 1)
    run = {"x_scale": 0.01, "x_zero_point": 120, "x_bits": 8, "x_halo": 1, "clamp_min": 1.0}
    (got,) = outputs(case, item, x, {**run, "out_scale": 0.5, "out_zero_point": 10}, (ops,))
    assert (got[:, ::2] == 12).all()


def test_channels_do_not_mix(isa: str) -> None:
    """A channel's output depends on its own input only, at every place of a block."""
    case = Case(97, (5, 5))
    item = case.layer()
    x = torch.randn(1, 97, 5, 5).to(memory_format=torch.channels_last)
    (base,) = outputs(case, item, x, {}, (ops,))
    for channel in (0, 15, 16, 31, 32, 96):
        other = x.clone()
        other[:, channel] += 1
        (got,) = outputs(case, item, other, {}, (ops,))
        changed = (got != base).flatten(2).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [channel]
