"""Each bad argument: an error naming op, argument, expectation and value, eager, traced and on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import emulator
from shapes import layer, qparams
from torch._subclasses.fake_tensor import FakeTensorMode

from cora import ops

I8, U8, F32, F64, I32 = torch.int8, torch.uint8, torch.float32, torch.float64, torch.int32


def quantize(**change: Any) -> Any:
    scale, zero_point = qparams(6, 1, 4)
    args = {"x": torch.randn(6, 12), "scale": scale, "zero_point": zero_point, "bits": 4, **change}
    return lambda: ops.fake_quantize(**args)


def linear(**change: Any) -> Any:
    item = layer(6, 12, rank=3)
    args = dict(zip(("weight", "scale", "zero_point", "bits"), item.args(), strict=True))
    return lambda: ops.linear_lowrank(**{"x": torch.randn(2, 12), **args, **item.options, **change})


def conv(**change: Any) -> Any:
    item = layer(6, 18, rank=3, conv_groups=2)
    args = dict(zip(("weight", "scale", "zero_point", "bits"), item.args(), strict=True))
    options = {"x": torch.randn(1, 4, 5, 5), "kernel_size": 3, "groups": 2, **args, **item.options}
    return lambda: ops.conv2d_lowrank(**{**options, **change})


def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=U8)


def prepare(**change: Any) -> Any:
    item = layer(6, 18, rank=3, conv_groups=2)
    args = dict(zip(("codes", "scale", "zero_point", "bits"), item.args(), strict=True))
    adapter = {name: item.options[name] for name in ("a", "b", "adapter_scale", "bias")}
    window = {"channels": 4, "kernel_size": 3, "groups": 2}
    return lambda: ops.prepare_layer(**{**args, **adapter, **window, **change})


def run(k: int = 12, **change: Any) -> Any:
    item = layer(6, k, rank=0, bias=False)
    prepared = ops.prepare_layer(*item.args(), k)
    geometry = ops.layer_geometry(item.weight, item.scale, item.bits, k)
    args = {"x": torch.randn(2, k), "layer": prepared, "geometry": geometry, **change}
    return lambda: ops.run_layer(**args)


def run_conv(**change: Any) -> Any:
    item = layer(6, 18, rank=0, conv_groups=2, bias=False)
    window = (3, 1, 1, 1, 2)
    prepared = ops.prepare_layer(*item.args(), 4, *window)
    geometry = ops.layer_geometry(item.weight, item.scale, item.bits, 4, *window)
    args = {"x": torch.randn(1, 4, 5, 5), "layer": prepared, "geometry": geometry, **change}
    return lambda: ops.run_layer(**args)


CODES = {"x": codes(1, 4, 5, 5), "x_bits": 8, "x_scale": 1.0}


def quantize_out(**change: Any) -> Any:
    scale, zero_point = qparams(6, 1, 4)
    x = torch.randn(6, 12)
    args = {"x": x, "scale": scale, "zero_point": zero_point, "bits": 4, "out": x, **change}
    return lambda: ops.fake_quantize_out(**args)


def quantization_error(**change: Any) -> Any:
    zero_point = torch.zeros(2, 6, 3, dtype=I32)
    args = {"x": torch.randn(6, 12), "scale": torch.ones(2, 6, 3), "zero_point": zero_point}
    return lambda: ops.quantization_error(**{**args, "bits": 4, **change})


def error_feedback(**change: Any) -> Any:
    scale, zero_point = qparams(6, 3, 4)
    args = {"x": torch.randn(6, 12), "scale": scale, "zero_point": zero_point, "bits": 4}
    given = {"factor": torch.eye(12).expand(2, 12, 12), "order": torch.arange(12).expand(2, 12)}
    return lambda: ops.error_feedback(**{**args, **given, **change})


def descend_codes(**change: Any) -> Any:
    rows = torch.ones(2, 3, 5, dtype=F64)
    args = {"codes": rows, "gradient": rows, "scale": rows, "bits": 4}
    return lambda: ops.descend_codes(
        **{**args, "curvature": torch.ones(2, 5, 5, dtype=F64), **change}
    )


# Of the ops whose checks the CPU and CUDA share.
LAYER_ERRORS = [
    (prepare(bits=9), "cora::prepare_layer: bits must be 2..8, got 9"),
    (prepare(channels=0), "channels must be >= 1, got 0"),
    (prepare(channels=5), "groups must divide the 5 channels, got 2"),
    (prepare(groups=0), "groups must divide the 4 channels, got 0"),
    (prepare(kernel_size=(3,)), "kernel_size must have 2 elements, got 1"),
    (prepare(stride=(1, 1, 1)), "stride must have 2 elements, got 3"),
    (prepare(stride=0), r"cora::prepare_layer: stride must be >= 1, got \[0, 0\]"),
    (prepare(dilation=(1, 0)), r"dilation must be >= 1, got \[1, 0\]"),
    (prepare(padding=-1), r"padding must be >= 0, got \[-1, -1\]"),
    (prepare(kernel_size=2), r"codes must have shape \[6, 4\], got \[6, 9\]"),
    (prepare(b=torch.zeros(6, 4, dtype=I8)), r"a must have shape \[8, 18\], got \[6, 18\]"),
    (prepare(bias=torch.zeros(5)), r"bias must have shape \[6\], got \[5\]"),
    (
        run(x=torch.zeros(2, 12, dtype=F64)),
        "cora::run_layer: x must have dtype float32, float16, bfloat16 or uint8, got float64",
    ),
    (run(x=torch.tensor(1.0)), r"x must have at least 1 dimension, got shape \[\]"),
    (run_conv(x=torch.randn(4, 5, 5)), r"x must have 4 dimensions, got shape \[4, 5, 5\]"),
    (run(x=torch.randn(2, 14)), r"x must have 12 channels along dimension 1, got shape \[2, 14\]"),
    (run_conv(x=torch.randn(1, 6, 5, 5)), "x must have 4 channels along dimension 1, got shape"),
    (run_conv(x=torch.randn(1, 4, 0, 5)), "at least 3 along dimension 2, got 2"),
    (run(x_bits=9), "x_bits must be 0 or 2..8, got 9"),
    (run(x_bits=1), "x_bits must be 0 or 2..8, got 1"),
    (run(k=65537, x_bits=8), "k must be <= 65536 with quantised input, got 65537"),
    (run(x=codes(2, 12)), "x_scale and x_bits must be given with codes"),
    (run(x=codes(2, 12), x_bits=8), "x_scale and x_bits must be given with codes"),
    (run(x_scale=1.0), "x_scale must be None when x_bits is 0"),
    (run(x_scale=0.0, x_bits=8), "x_scale must be finite and > 0, got 0"),
    (run(x_scale=1.0, x_zero_point=16, x_bits=4), "x_zero_point must be 0..15, got 16"),
    (run(add_halo=1), "add_halo must be 0 for a linear layer, got 1"),
    (run_conv(x_halo=1), "x_halo must be 0 unless x holds codes, got 1"),
    (run_conv(**CODES, x_halo=-1), "x_halo must be >= 0, got -1"),
    (run_conv(**CODES, x_halo=3), "x_halo must be at most half of x's height and width, got 3"),
    (run_conv(out_halo=1), "out_halo must be 0 for a float output, got 1"),
    (run_conv(out_halo=-1, out_scale=1.0), "out_halo must be >= 0, got -1"),
    (run(clamp_min=3.0, clamp_max=1.5), "clamp_min must be <= clamp_max, got 3 and 1.5"),
    (run(clamp_min=float("nan")), "clamp_min must be <= clamp_max, got nan and inf"),
    (run(out_scale=float("inf")), "out_scale must be finite and > 0, got inf"),
    (run(out_scale=1.0, out_zero_point=999), "out_zero_point must be 0..255, got 999"),
    (
        run(add=torch.zeros(2, 6, dtype=I32)),
        "add must have dtype float32, float16, bfloat16 or uint8, got int32",
    ),
    (run(add=torch.zeros(2, 5)), r"add must have shape \[2, 6\], got \[2, 5\]"),
    (
        run_conv(add=torch.zeros(1, 6, 5, 5), add_halo=1),
        r"add must have shape \[1, 6, 7, 7\], got \[1, 6, 5, 5\]",
    ),
    (
        linear(x=torch.randn(2, 14)),
        r"cora::linear_lowrank: weight must have shape \[6, 7\], got \[6, 6\]",
    ),
    (linear(x=torch.tensor(1.0)), "x must have at least 1 dimension"),
    (
        linear(x=torch.zeros(2, 12, dtype=F64)),
        "x must have dtype float32, float16 or bfloat16, got float64",
    ),
    (linear(weight=torch.zeros(6, 6)), "weight must have dtype uint8, got float32"),
    (linear(a=None), "a and b must be given together"),
    (linear(a=None, b=None), "adapter_scale must be None without an adapter"),
    (
        linear(a=torch.zeros(3, 12, dtype=I32)),
        "a must have dtype int8, float16, bfloat16 or float32, got int32",
    ),
    (linear(b=torch.zeros(6, 3)), "b must have dtype int8, got float32"),
    (linear(b=torch.zeros(6, 4, dtype=I8)), r"a must have shape \[4, 12\], got \[3, 12\]"),
    (linear(b=torch.zeros(5, 3, dtype=I8)), r"b must have shape \[6, 3\], got \[5, 3\]"),
    (linear(adapter_scale=None), "adapter_scale must be given with an int8 adapter"),
    (linear(adapter_scale=torch.ones(4)), r"adapter_scale must have shape \[3\], got \[4\]"),
    (
        linear(a=torch.zeros(3, 12), b=torch.zeros(6, 3)),
        "adapter_scale must be None with a float adapter",
    ),
    (linear(bias=torch.zeros(5)), r"bias must have shape \[6\], got \[5\]"),
    (linear(bias=torch.zeros(6, dtype=F64)), "bias must have dtype float32, got float64"),
    (linear(x_bits=1), "x_bits must be 0 or 2..8, got 1"),
    (linear(x_bits=8, x_scale=torch.ones(1)), "x_scale and x_zero_point must be given together"),
    (
        linear(x_scale=torch.ones(1), x_zero_point=torch.ones(1, dtype=I32)),
        "x_scale must be None when x_bits is 0",
    ),
    (
        linear(x_bits=8, x_scale=torch.ones(2), x_zero_point=torch.ones(1, dtype=I32)),
        r"x_scale must have 1 element, got shape \[2\]",
    ),
    (conv(x=torch.randn(4, 5, 5)), "cora::conv2d_lowrank: x must have 4 dimensions"),
    (conv(x=torch.randn(1, 5, 5, 5)), "groups must divide the 5 channels, got 2"),
    (conv(groups=0), "groups must divide the 4 channels, got 0"),
    (conv(stride=0), r"stride must be >= 1, got \[0, 0\]"),
    (conv(padding=(0, -1)), r"padding must be >= 0, got \[0, -1\]"),
    (conv(kernel_size=2), r"weight must have shape \[6, 4\], got \[6, 9\]"),
    (conv(dilation=3), "x's padded height and width must be at least 7 along dimension 2, got 5"),
]

SHAPE_ERRORS = [
    *LAYER_ERRORS,
    (run(geometry=[5, 3]), r"geometry must be layer_geometry\(\) of the layer"),
    (error_feedback(bits=9), "cora::error_feedback: bits must be 2..8, got 9"),
    (error_feedback(x=torch.zeros(6, 12).half()), "x must have dtype float32, got float16"),
    (error_feedback(x=torch.zeros(72)), r"x must have 2 dimensions, got shape \[72\]"),
    (
        error_feedback(scale=torch.ones(6, 5)),
        r"scale must have shape \[1 or 6, G\] with G a divisor of 12, got \[6, 5\]",
    ),
    (error_feedback(zero_point=torch.ones(6, 3)), "zero_point must have dtype int32, got float32"),
    (
        error_feedback(factor=torch.eye(12)[None].double()),
        "factor must have dtype float32, got float64",
    ),
    (
        error_feedback(factor=torch.ones(4, 12, 12)),
        r"factor must have shape \[groups, 12, 12\] with groups a divisor of 6, got \[4, 12, 12\]",
    ),
    (error_feedback(factor=torch.eye(12)), r"groups a divisor of 6, got \[12, 12\]"),
    (error_feedback(factor=torch.ones(0, 12, 12)), r"groups a divisor of 6, got \[0, 12, 12\]"),
    (error_feedback(factor=torch.ones(2, 12, 11)), r"groups a divisor of 6, got \[2, 12, 11\]"),
    (error_feedback(order=torch.ones(2, 12)), "order must have dtype int64, got float32"),
    (
        error_feedback(order=torch.arange(12)),
        r"order must have shape \[2, 12\], got \[12\]",
    ),
    (descend_codes(bits=9), "cora::descend_codes: bits must be 2..8, got 9"),
    (descend_codes(codes=codes(2, 3, 5)), "codes must have dtype float64, got uint8"),
    (
        descend_codes(codes=torch.zeros(3, 5, dtype=F64)),
        r"codes must have 3 dimensions, got shape \[3, 5\]",
    ),
    (descend_codes(gradient=torch.ones(2, 3, 5)), "gradient must have dtype float64, got float32"),
    (
        descend_codes(scale=torch.ones(2, 3, 1, dtype=F64)),
        r"scale must have shape \[2, 3, 5\], got \[2, 3, 1\]",
    ),
    (
        descend_codes(curvature=torch.ones(5, 5, dtype=F64)),
        r"curvature must have shape \[2, 5, 5\], got \[5, 5\]",
    ),
    (quantization_error(x=torch.zeros(72)), r"x must have 2 dimensions, got shape \[72\]"),
    (
        quantization_error(scale=torch.ones(6, 3)),
        r"cora::quantization_error: scale must have shape \[candidates, 1 or 6, G\] with G a divisor "
        r"of 12, got \[6, 3\]",
    ),
    (
        quantization_error(zero_point=torch.zeros(2, 6, 1, dtype=I32)),
        r"zero_point must have shape \[2, 6, 3\], got \[2, 6, 1\]",
    ),
    (quantize_out(x=torch.zeros(6, 12).half()), "x must have dtype float32, got float16"),
    (
        quantize_out(out=torch.zeros(6, 11)),
        r"cora::fake_quantize_out: out must have shape \[6, 12\], got \[6, 11\]",
    ),
    (quantize_out(residual=codes(6, 12)), "residual must have dtype float32, got uint8"),
    (quantize_out(codes=torch.zeros(6, 12)), "codes must have dtype uint8, got float32"),
    (
        quantize_out(out=torch.zeros(12, 6).T),
        r"out must be contiguous, got shape \[6, 12\] in another layout",
    ),
    (quantize(bits=1), "cora::fake_quantize: bits must be 2..8, got 1"),
    (quantize(bits=9), "bits must be 2..8, got 9"),
    (
        quantize(x=torch.zeros(6, 12, dtype=F64)),
        "x must have dtype float32, float16 or bfloat16, got float64",
    ),
    (quantize(scale=torch.ones(1, 6)), r"zero_point must have shape \[1, 6\], got \[6, 1\]"),
    (
        quantize(scale=torch.ones(5, 1)),
        r"scale must have shape \[1 or 6, G\] with G a divisor of 12, got \[5, 1\]",
    ),
    (quantize(scale=torch.ones(6, 5)), r"G a divisor of 12, got \[6, 5\]"),
    (quantize(scale=torch.ones(6)), r"G a divisor of 12, got \[6\]"),
    (quantize(scale=torch.ones(6, 1, dtype=F64)), "scale must have dtype float32, got float64"),
    (quantize(zero_point=torch.ones(6, 1)), "zero_point must have dtype int32, got float32"),
    (
        lambda: ops.quantize_activation(torch.zeros(3), 1.0, 16, 4),
        "cora::quantize_activation: zero_point must be 0..15, got 16",
    ),
    (
        lambda: ops.quantize_activation(torch.zeros(3), 0.0, 0),
        "scale must be finite and > 0, got 0",
    ),
    (
        lambda: ops.quantize_activation(torch.zeros(3), float("inf"), 0),
        "scale must be finite and > 0, got inf",
    ),
    (
        lambda: ops.quantize_activation(torch.zeros(3, dtype=F64), 1.0, 0),
        "x must have dtype float32, float16 or bfloat16, got float64",
    ),
    (lambda: ops.quantize_activation(torch.zeros(3), 1.0, 0, 9), "bits must be 2..8, got 9"),
    (
        lambda: ops.quantize_activation(torch.zeros(3, 4), 1.0, 0, 8, 1),
        r"x must have 4 dimensions for a halo, got shape \[3, 4\]",
    ),
    (
        lambda: ops.quantize_activation(torch.zeros(1, 2, 3, 4), 1.0, 0, 8, -1),
        "halo must be >= 0, got -1",
    ),
    (
        lambda: ops.dequantize_activation(codes(1, 1, 3, 4), 1.0, 0, 2),
        r"cora::dequantize_activation: codes must hold the border of 2 pixels, got shape \[1, 1, 3",
    ),
    (
        lambda: ops.dequantize_activation(torch.zeros(3), 1.0, 0),
        "codes must have dtype uint8, got float32",
    ),
    (
        lambda: ops.dequantize_activation(codes(3), 1.0, 256),
        "zero_point must be 0..255, got 256",
    ),
    (
        lambda: ops.max_pool2d_codes(torch.zeros(1, 2, 6, 6), 0, 0, 3, 2),
        "cora::max_pool2d_codes: x must have dtype uint8, got float32",
    ),
    (
        lambda: ops.max_pool2d_codes(codes(2, 6, 6), 0, 0, 3, 2),
        r"x must have 4 dimensions, got shape \[2, 6, 6\]",
    ),
    (
        lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 256, 0, 3, 2),
        "zero_point must be 0..255, got 256",
    ),
    (
        lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 0, 3, 3, 2),
        r"x must hold pixels inside a border of 3, got shape \[1, 2, 6, 6\]",
    ),
    (lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 0, -1, 3, 2), "halo must be >= 0, got -1"),
    (
        lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 0, 0, 3, 2, out_halo=-1),
        "out_halo must be >= 0, got -1",
    ),
    (
        lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 0, 0, 3, 0),
        r"stride must be >= 1, got \[0, 0\]",
    ),
    (
        lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 0, 0, 3, 2, 2),
        "padding must be at most half of kernel_size, got 2 and 3",
    ),
    (
        lambda: ops.max_pool2d_codes(codes(1, 2, 6, 6), 0, 0, 7, 2),
        "x must be at least as large as a window along dimension 2, got 6",
    ),
    (
        lambda: ops.mean_codes(torch.zeros(1, 2, 6, 6), 1.0, 0),
        "cora::mean_codes: x must have dtype uint8, got float32",
    ),
    (lambda: ops.mean_codes(codes(1, 2, 6, 6), 0.0, 0), "scale must be finite and > 0, got 0"),
    (lambda: ops.mean_pixels(codes(1, 2, 6, 6)), "cora::mean_pixels: x must have dtype float"),
    (
        lambda: ops.mean_pixels(torch.zeros(2, 6, 6)),
        r"x must have 4 dimensions, got shape \[2, 6, 6\]",
    ),
    (
        lambda: ops.mean_pixels(torch.zeros(1, 2, 0, 6)),
        r"x must hold pixels, got shape \[1, 2, 0, 6\]",
    ),
    (
        lambda: ops.pack_bits(torch.zeros(3), 4),
        "cora::pack_bits: codes must have dtype uint8, got float32",
    ),
    (lambda: ops.pack_bits(torch.zeros((), dtype=U8), 4), "codes must have at least 1 dimension"),
    (
        lambda: ops.unpack_bits(codes(2, 3), 4, 9),
        r"last dimension 5 for k = 9 and 4 bits, got shape \[2, 3\]",
    ),
    (lambda: ops.unpack_bits(codes(2, 3), 4, -1), "k must be >= 0, got -1"),
    (
        lambda: ops.dequantize_packed(codes(2, 3), *qparams(2, 1, 4), 4, 8),
        r"cora::dequantize_packed: packed must have shape \[2, 4\], got \[2, 3\]",
    ),
    (
        lambda: ops.dequantize_packed(codes(6), *qparams(2, 1, 4), 4, 6),
        "packed must have 2 dimensions",
    ),
    (
        lambda: ops.lowrank_factors(torch.zeros(4, 6), 5),
        "cora::lowrank_factors: rank must be 0..4, got 5",
    ),
    (lambda: ops.lowrank_factors(torch.zeros(4, 6), -1), "rank must be 0..4, got -1"),
    (lambda: ops.lowrank_factors(torch.zeros(4, 6), 1, 3), "groups must divide the 4 rows, got 3"),
    (lambda: ops.lowrank_factors(torch.zeros(4), 1), "residual must have 2 dimensions"),
    (
        lambda: ops.lowrank_factors(torch.zeros(4, 6), 1, 2, torch.ones(3, 6, 6)),
        r"moment must have shape \[1 or 2, 6, 6\], got \[3, 6, 6\]",
    ),
    (
        lambda: ops.residual_svd_init(torch.zeros(4, 6), *qparams(3, 1, 4), 4, 1),
        r"cora::residual_svd_init: scale must have shape \[1 or 4, G\]",
    ),
]

VALUE_ERRORS = [
    (error_feedback(scale=torch.zeros(6, 3)), "scale must be finite and > 0, got 0 at position 0"),
    (
        error_feedback(order=torch.arange(12).expand(2, 12) // 11),
        "cora::error_feedback: order must hold each of 0..11 once, got 0 at 1",
    ),
    (error_feedback(order=torch.arange(1, 13).expand(2, 12)), "0..11 once, got 12 at 11"),
    (error_feedback(order=torch.arange(-1, 11).expand(2, 12)), "0..11 once, got -1 at 0"),
    (
        error_feedback(factor=torch.zeros(2, 12, 12)),
        "factor must have a diagonal > 0, got 0 at 0",
    ),
    (
        error_feedback(factor=torch.full((2, 12, 12), torch.nan)),
        "factor must have a diagonal > 0, got nan at 0",
    ),
    (
        lambda: ops.dequantize_activation(codes(2, 3, 4, 4), 1.0, 0),
        "codes must be channels_last, got another layout",
    ),
    (quantize(scale=torch.zeros(6, 1)), "scale must be finite and > 0, got 0 at position 0"),
    (quantize(scale=torch.full((6, 1), float("nan"))), "scale must be finite and > 0, got"),
    (
        quantize(zero_point=torch.full((6, 1), 1 << 24, dtype=I32)),
        r"zero_point must be within \+-2\^24, got 16777216",
    ),
    (lambda: ops.pack_bits(torch.full((5,), 16, dtype=U8), 4), "codes must be <= 15 for 4 bits"),
    (lambda: ops.pack_bits(torch.full((50,), 255, dtype=U8), 7), "codes must be <= 127 for 7 bits"),
    (
        lambda: ops.lowrank_factors(torch.full((4, 6), float("nan")), 1),
        "residual and moment must be finite",
    ),
    (
        linear(x_bits=8, x_scale=torch.zeros(1), x_zero_point=torch.ones(1, dtype=I32)),
        "x_scale must be finite and > 0, got 0",
    ),
    (
        linear(x_bits=4, x_scale=torch.ones(1), x_zero_point=torch.full((1,), 16, dtype=I32)),
        "x_zero_point must be 0..15, got 16",
    ),
]


@pytest.mark.parametrize("call,message", [*SHAPE_ERRORS, *VALUE_ERRORS])
def test_eager(isa: str, call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("call,message", SHAPE_ERRORS)
def test_traced(call: Any, message: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("call,message", LAYER_ERRORS)
def test_cuda(monkeypatch: pytest.MonkeyPatch, call: Any, message: str) -> None:
    monkeypatch.setattr(ops._native, "ops", emulator().ops)
    with pytest.raises(RuntimeError, match=message):
        call()
