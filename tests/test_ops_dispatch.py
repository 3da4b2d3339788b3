"""The ops as torch sees them: opcheck, torch.compile, torch.export, and missing gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from shapes import layer, qparams

from cora import ops

OPS = torch.ops.cora


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    scale, zero_point = qparams(6, 3, 4)
    x = torch.randn(6, 12)
    codes = torch.randint(0, 16, (6, 12), dtype=torch.uint8)
    packed = ops.pack_bits(codes, 4)
    item, grouped = layer(6, 12, rank=3), layer(8, 18, rank=2, conv_groups=2, adapter=torch.float16)
    o, g = item.options, grouped.options
    image = torch.randn(2, 4, 7, 7)
    conv = (
        *grouped.args(),
        [3, 3],
        [1, 1],
        [1, 1],
        [1, 1],
        2,
        g["a"],
        g["b"],
        None,
        g["bias"],
        None,
        None,
        8,
    )
    grad = (x.clone().requires_grad_(), scale.clone().requires_grad_())
    return {
        "fake_quantize": (OPS.fake_quantize, (x, scale, zero_point, 4, False, False)),
        "fake_quantize-grad": (OPS.fake_quantize, (*grad, zero_point, 4, True, True)),
        "fake_quantize_out": (
            OPS.fake_quantize_out,
            (x, scale, zero_point, 4, torch.empty(6, 12), None, codes.clone()),
        ),
        "fake_quantize_backward": (OPS.fake_quantize_backward, (x, x, scale, zero_point, 4)),
        "quantization_error": (
            OPS.quantization_error,
            (x, torch.ones(2, 6, 3), torch.zeros(2, 6, 3, dtype=torch.int32), 4),
        ),
        "error_feedback": (
            OPS.error_feedback,
            (x, scale, zero_point, 4, torch.rand(2, 12, 12) + 0.1, torch.arange(12).repeat(2, 1)),
        ),
        "descend_codes": (
            OPS.descend_codes,
            (*torch.rand(3, 2, 3, 5, dtype=torch.float64), torch.rand(2, 5, 5).double() + 0.1, 4),
        ),
        "quantize_activation": (OPS.quantize_activation, (x, 0.1, 3, 4, 0)),
        "quantize_activation-image": (OPS.quantize_activation, (image, 0.1, 3, 8, 1)),
        "dequantize_activation": (
            OPS.dequantize_activation,
            (ops.quantize_activation(image, 0.1, 3, 8, 1), 0.1, 3, 1),
        ),
        "max_pool2d_codes": (
            OPS.max_pool2d_codes,
            (
                ops.quantize_activation(image, 0.1, 3, 8, 1),
                *(3, 1, [3, 2], [2, 2], [1, 1], [1, 1], True, 2),
            ),
        ),
        "mean_codes": (
            OPS.mean_codes,
            (ops.quantize_activation(image, 0.1, 3, 8, 1), 0.1, 3, 1),
        ),
        "mean_pixels": (OPS.mean_pixels, (image,)),
        "pack_bits": (OPS.pack_bits, (codes, 4)),
        "unpack_bits": (OPS.unpack_bits, (packed, 4, 12)),
        "dequantize_packed": (OPS.dequantize_packed, (packed, scale, zero_point, 4, 12)),
        "lowrank_factors": (OPS.lowrank_factors, (x, 2, 2, None)),
        "lowrank_factors-moment": (OPS.lowrank_factors, (x, 2, 1, torch.eye(12)[None])),
        "residual_svd_init": (OPS.residual_svd_init, (x, scale, zero_point, 4, 2, 1, None)),
        "linear_lowrank": (
            OPS.linear_lowrank,
            (x, *item.args(), o["a"], o["b"], o["adapter_scale"], o["bias"], None, None, 0),
        ),
        "conv2d_lowrank": (OPS.conv2d_lowrank, (image, *conv)),
        "conv2d_lowrank-nhwc": (
            OPS.conv2d_lowrank,
            (image.to(memory_format=torch.channels_last), *conv),
        ),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("name", [name for name in samples() if "grad" not in name])
def test_compile(name: str) -> None:
    op, args = samples()[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, op):
        given = copy.deepcopy(args)  # an op may write into its arguments
        leaves = torch.utils._pytree.tree_leaves((call(*given), given))
        results.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    assert results[0]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_compile_with_gradients() -> None:
    scale, zero_point = qparams(6, 1, 4)

    def loss(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        out, residual = ops.fake_quantize(x, s, zero_point, 4, residual=True)
        return out.square().sum() + residual.abs().sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, s = (
            torch.linspace(-2, 2, 72).reshape(6, 12).requires_grad_(),
            scale.clone().requires_grad_(),
        )
        f(x, s).backward()
        grads.append((x.grad, s.grad))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_export_with_any_batch() -> None:
    item = layer(6, 12, rank=3)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.linear_lowrank(x, *item.args(), **item.options)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Layer(), (torch.randn(4, 12),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 12)
    assert torch.equal(program.module()(x), Layer()(x))


def test_layers_have_no_gradient() -> None:
    item = layer(6, 12, rank=3)
    x = torch.randn(2, 12, requires_grad=True)
    y = ops.linear_lowrank(x, *item.args(), **item.options)
    with pytest.raises(RuntimeError, match="cora::linear_lowrank: packed layers have no gradient"):
        y.sum().backward()


def test_inference_mode() -> None:
    item = layer(6, 12, rank=3)
    with torch.inference_mode():
        x = torch.randn(2, 12)
        assert ops.linear_lowrank(x, *item.args(), **item.options).shape == (2, 6)
