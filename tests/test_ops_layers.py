"""Packed linear and conv2d against the oracles, on every CPU level.

Floats are compared within k * eps of the products' magnitudes; with quantised input all levels and
thread counts must agree bit for bit, but for AMX's adapters (thread counts do there too).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import SUPPORTED, assert_product_close
from shapes import ALL_BITS, CONVOLUTIONS, Layer, layer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cora import ops, reference

ADAPTERS = (torch.int8, torch.float32, torch.float16, torch.bfloat16)
X_MODES = {
    "float": {},
    "dynamic8": {"x_bits": 8},
    "static8": {"x_bits": 8, "static": True},
    "dynamic4": {"x_bits": 4},
}


def linear(module, x: Tensor, layer: Layer) -> Tensor:
    return module.linear_lowrank(x, *layer.args(), **layer.options)


def magnitude(x: Tensor, layer: Layer, k: int) -> Tensor:
    """|x| (|What| + |B||A|)^T + |bias|: what the rounding errors are proportional to."""
    what = ops.dequantize_packed(*layer.args()[:3], layer.bits, k).abs()
    options = layer.options
    a, b = options["a"].double().abs(), options["b"].double().abs()
    if "adapter_scale" in options:
        a = a * options["adapter_scale"].double()[:, None]
    bias = options["bias"].abs() if "bias" in options else 0
    # A quantised input can round up by half a step of its range.
    xa = x.double().abs() * 1.01 + (x.abs().max().double() / 16 if options["x_bits"] else 0)
    return xa @ (what.double() + b @ a).T + bias


def check_linear(x: Tensor, layer: Layer) -> None:
    k = x.shape[-1]
    got, want = linear(ops, x, layer), linear(reference, x, layer)
    if x.numel() == 0:
        assert got.shape == want.shape
        return
    mag = magnitude(x.reshape(-1, k), layer, k).reshape(want.shape)
    assert_product_close(got, want, mag, k)


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_linear_bits(isa: str, bits: int, x_mode: str) -> None:
    for m in (3, 21):
        check_linear(torch.randn(m, 97), layer(33, 97, bits, rank=7, **X_MODES[x_mode]))


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize(
    "m,n,k",
    [(1, 1, 1), (2, 31, 7), (5, 33, 64), (8, 97, 31), (9, 32, 128), (13, 7, 300), (0, 5, 9)],
)
def test_linear_ragged_shapes(isa: str, m: int, n: int, k: int, x_mode: str) -> None:
    check_linear(torch.randn(m, k), layer(n, k, 4, rank=1, **X_MODES[x_mode]))


@pytest.mark.parametrize("rank", [0, 1, 7, 32, 40])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_linear_adapters(isa: str, adapter: torch.dtype, rank: int) -> None:
    for (m, static), x_mode in itertools.product(((4, True), (14, False)), X_MODES.values()):
        check_linear(
            torch.randn(m, 64), layer(45, 64, 3, rank=rank, adapter=adapter, bias=static, **x_mode)
        )


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("rows,groups", [(1, 1), (1, 4), (20, 1), (20, 4), (20, 12), (20, 60)])
def test_linear_granularity(isa: str, rows: int, groups: int, x_mode: str) -> None:
    for m in (2, 15):
        check_linear(
            torch.randn(m, 60),
            layer(20, 60, 4, rows=rows, groups=groups, rank=2, **X_MODES[x_mode]),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_mode", X_MODES)
def test_linear_dtypes_and_leading_dimensions(isa: str, dtype: torch.dtype, x_mode: str) -> None:
    check_linear(torch.randn(2, 3, 5, 40).to(dtype), layer(18, 40, rank=3, **X_MODES[x_mode]))
    check_linear(torch.randn(40).to(dtype), layer(18, 40, rank=3, **X_MODES[x_mode]))


def test_linear_non_contiguous(isa: str) -> None:
    item = layer(18, 40, rank=3)
    item.weight, item.options["a"] = (
        item.weight.T.contiguous().T,
        item.options["a"].T.contiguous().T,
    )
    check_linear(torch.randn(40, 6).T, item)


@pytest.mark.parametrize("m", [3, 30])
def test_linear_far_zero_points(isa: str, m: int) -> None:
    """Zero-points near -2**23: exact integers need 64 bits, and take them."""
    check_linear(torch.randn(m, 64), layer(33, 64, groups=2, rank=2, far=True, x_bits=8))


def test_linear_takes_all_bits_of_floats(isa: str) -> None:
    check_linear(torch.full((21, 16), 2.0**24 - 1), layer(33, 16, rank=0))
    check_linear(torch.full((21, 16), 2.0**11 - 1).half(), layer(33, 16, rank=0))


def test_linear_constant_and_zero_input(isa: str) -> None:
    item = layer(9, 20, rank=2, x_bits=8)
    check_linear(torch.zeros(3, 20), item)
    check_linear(torch.full((3, 20), -2.5), item)


@pytest.mark.parametrize("widest", [1, 7, 15, 31, 63, 127])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_linear_sums_at_their_largest(isa: str, bits: int, widest: int) -> None:
    """Every code at its end, weights and A of one sign: no partial sum may pass what holds it."""
    k, top = 203, 2**bits - 1
    for m, n, (code, zero) in itertools.product(
        (1, 3, 13), (5, 45), ((top, 0), (0, top), (top, top // 2))
    ):
        codes = torch.full((n, k), code, dtype=torch.uint8)
        zeros = torch.full((n, 1), zero, dtype=torch.int32)
        for sign in (-1, 1):
            got = ops.linear_lowrank(
                torch.full((m, k), 255.0), ops.pack_bits(codes, bits), torch.ones(n, 1), zeros, bits,
                a=torch.full((1, k), sign * widest, dtype=torch.int8),
                b=torch.ones(n, 1, dtype=torch.int8), adapter_scale=torch.ones(1),
                x_bits=8, x_scale=torch.ones(1), x_zero_point=torch.zeros(1, dtype=torch.int32),
            )  # fmt: skip
            want = torch.full((m, n), 255.0 * k * (code - zero + sign * widest))
            # AMX multiplies hidden values by B as two bfloat16, sixteen digits.
            hidden = 2.0**-17 * 255 * k * widest if isa == "amx" else 0
            torch.testing.assert_close(got, want, rtol=0, atol=hidden)


# --- Convolution
# -----------------------------------------------------------------------------------


def conv(module, x: Tensor, item: Layer, name: str) -> Tensor:
    *_, groups, kernel, stride, padding, dilation = CONVOLUTIONS[name]
    return module.conv2d_lowrank(
        x, *item.args(), kernel, stride, padding, dilation, groups, **item.options
    )


def conv_case(
    name: str, bits: int = 4, *, rank: int = 2, scale_groups: int = 1, **kwargs
) -> tuple[Tensor, Layer]:
    batch, cg, h, w, ng, groups, kernel, *_ = CONVOLUTIONS[name]
    k = cg * kernel[0] * kernel[1]
    item = layer(
        ng * groups,
        k,
        bits,
        rank=min(rank, ng, k),
        conv_groups=groups,
        groups=scale_groups,
        **kwargs,
    )
    return torch.randn(batch, cg * groups, h, w), item


def check_conv(x: Tensor, item: Layer, name: str) -> None:
    _, cg, _, _, ng, groups, kernel, stride, padding, dilation = CONVOLUTIONS[name]
    got, want = conv(ops, x, item, name), conv(reference, x, item, name)
    unfolded = torch.nn.functional.unfold(
        x.float(), kernel, dilation, padding, stride
    )  # [B, C*taps, L]
    k = cg * kernel[0] * kernel[1]
    parts = []
    for g in range(groups):
        part = Layer(
            item.weight[g * ng : (g + 1) * ng],
            *(
                p[g * ng : (g + 1) * ng] if p.shape[0] > 1 else p
                for p in (item.scale, item.zero_point)
            ),
            item.bits,
            dict(item.options),
        )
        rank = item.options["b"].shape[1]
        part.options["a"] = item.options["a"][g * rank : (g + 1) * rank]
        part.options["b"] = item.options["b"][g * ng : (g + 1) * ng]
        for key, step in (("adapter_scale", rank), ("bias", ng)):
            if key in part.options:
                part.options[key] = item.options[key][g * step : (g + 1) * step]
        rows = unfolded[:, g * k : (g + 1) * k].transpose(1, 2)
        parts.append(magnitude(rows, part, k))
    mag = torch.cat(parts, -1).transpose(1, 2).reshape(want.shape)
    assert_product_close(got, want, mag, k)


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv(isa: str, name: str, x_mode: str) -> None:
    x, item = conv_case(name, **X_MODES[x_mode])
    check_conv(x, item, name)
    check_conv(x.to(memory_format=torch.channels_last), item, name)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("x_mode", X_MODES)
def test_conv_bits(isa: str, bits: int, x_mode: str) -> None:
    for name in ("3x3", "depthwise"):
        check_conv(*conv_case(name, bits, **X_MODES[x_mode]), name)


# 16 channels of 9 taps: 2 or 16 groups hold whole channels, 12, 9 and 144 cut through their taps.
@pytest.mark.parametrize("groups", [2, 16, 12, 9, 144])
@pytest.mark.parametrize("x_mode", X_MODES)
def test_conv_scale_groups(isa: str, groups: int, x_mode: str) -> None:
    check_conv(*conv_case("3x3", scale_groups=groups, **X_MODES[x_mode]), "3x3")


@pytest.mark.parametrize(
    "name,groups", [("grouped", 8), ("grouped", 6), ("depthwise", 3), ("depthwise", 9)]
)
@pytest.mark.parametrize("x_mode", X_MODES)
def test_grouped_conv_scale_groups(isa: str, name: str, groups: int, x_mode: str) -> None:
    check_conv(*conv_case(name, scale_groups=groups, **X_MODES[x_mode]), name)
    check_conv(*conv_case(name, scale_groups=groups, rows=1, **X_MODES[x_mode]), name)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("x_mode", X_MODES)
def test_conv_adapters(isa: str, adapter: torch.dtype, x_mode: str) -> None:
    for name, rank in (
        ("3x3", 0),
        ("3x3", 33),
        ("first-layer", 5),
        ("grouped", 3),
        ("depthwise", 1),
        ("depthwise", 0),
    ):
        check_conv(*conv_case(name, adapter=adapter, rank=rank, **X_MODES[x_mode]), name)


def test_conv_rank_above_depthwise_one(isa: str) -> None:
    _, _, _, _, _, groups, *_ = CONVOLUTIONS["depthwise"]
    x, _ = conv_case("depthwise")
    check_conv(x, layer(groups, 9, rank=2, conv_groups=groups), "depthwise")


@pytest.mark.parametrize("name", ["3x3", "depthwise", "grouped"])
def test_conv_far_zero_points(isa: str, name: str) -> None:
    check_conv(*conv_case(name, far=True, x_bits=8), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conv_dtypes(isa: str, dtype: torch.dtype) -> None:
    x, item = conv_case("3x3")
    for format in (torch.contiguous_format, torch.channels_last):
        y = conv(ops, x.to(dtype).to(memory_format=format), item, "3x3")
        assert y.is_contiguous(memory_format=format)
        check_conv(x.to(dtype).to(memory_format=format), item, "3x3")


@pytest.mark.parametrize(
    "shape", [(2, 1, 6, 5), (1, 1, 6, 1), (2, 1, 1, 1), (2, 3, 1, 1), (2, 3, 6, 5)]
)
def test_conv_layout(shape: tuple[int, ...]) -> None:
    """One channel or one pixel is both layouts at once: the result is laid out as torch's would be."""
    item = layer(4, shape[1] * 9, rank=1)
    window = ([3, 3], [1, 1], [1, 1], [1, 1])
    parts = [item.options[name] for name in ("a", "b", "adapter_scale", "bias")]
    prepared = ops.prepare_layer(*item.args(), shape[1], *window, 1, *parts)
    geometry = ops.layer_geometry(*item.args()[:2], 4, shape[1], *window, 1, parts[1], True)
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape).to(memory_format=format)
        want = torch.nn.functional.conv2d(x, torch.randn(4, shape[1], 3, 3), padding=1)
        results = [
            ops.conv2d_lowrank(x, *item.args(), *window, **item.options),
            ops.run_layer(x, prepared, geometry),
        ]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (x, *item.args()[:3])]
            options = {
                name: mode.from_tensor(value) if isinstance(value, Tensor) else value
                for name, value in item.options.items()
            }
            results.append(ops.conv2d_lowrank(*fake, item.bits, *window, **options))
            results.append(ops.run_layer(fake[0], mode.from_tensor(prepared), geometry))
        assert [y.stride() for y in results] == [want.stride()] * 4


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")], ids=str)
def test_conv_large_and_non_finite_input(isa: str, value: float) -> None:
    """What no sum of bfloat16 products can hold reaches the outputs it belongs to, and no others."""
    x, item = conv_case("3x3")
    x[1, 3, 4, 4] = value
    got, want = conv(ops, x, item, "3x3"), conv(reference, x, item, "3x3")
    if value == 1e30:
        check_conv(x, item, "3x3")
    near = torch.zeros_like(want, dtype=torch.bool)
    near[1, :, 3:6, 3:6] = True
    assert got[~near].isfinite().all()
    assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(got.isnan(), want.isnan())


def test_conv_strides(isa: str) -> None:
    x, item = conv_case("3x3")
    want = conv(ops, x, item, "3x3")
    assert torch.equal(conv(ops, x.transpose(2, 3).contiguous().transpose(2, 3), item, "3x3"), want)
    assert torch.equal(conv(ops, x[:, :, :, ::1].expand_as(x), item, "3x3"), want)
    empty = conv(ops, x[:0], item, "3x3")
    assert empty.shape == (0, *want.shape[1:])


# --- The same bits everywhere
# ------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("x_mode", X_MODES)
def test_levels_and_threads_agree(
    threads: Callable[[int], None], x_mode: str, adapter: torch.dtype
) -> None:
    # On AMX an int8 adapter's second product is done in bfloat16 pieces.
    exact = {level for level in SUPPORTED if level != "amx"} if adapter == torch.int8 else set()
    before = ops.isa()["level"]
    cases: list[Callable[[], Tensor]] = []
    for m, groups in ((2, 1), (2, 8), (50, 1), (50, 8)):
        item, x = (
            layer(97, 64, 5, groups=groups, rank=9, adapter=adapter, **X_MODES[x_mode]),
            torch.randn(m, 64),
        )
        cases.append(lambda x=x, item=item: linear(ops, x, item))
    for name in CONVOLUTIONS:
        x, item = conv_case(name, 8, adapter=adapter, **X_MODES[x_mode])
        cases.append(lambda x=x, item=item, name=name: conv(ops, x, item, name))
    try:
        for run in cases:
            results = {}
            for level, count in itertools.product(SUPPORTED, (1, 2, 3)):
                ops.set_isa(level)
                threads(count)
                results[level, count] = run()
            for (level, count), result in results.items():
                same = x_mode != "float" and level in exact
                base = results[SUPPORTED[0] if same else level, 1]
                assert torch.equal(result, base), (level, count)
    finally:
        ops.set_isa(before)
