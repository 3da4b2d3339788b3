"""run_layer against its oracle on every CPU level: codes in and out, borders, addition, clamp.

Float outputs within the rounding of float32 steps; output codes may differ by one, and only where the
oracle's number lies that close to the middle of two codes.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import SUPPORTED
from shapes import CONVOLUTIONS, layer
from torch import Tensor

from cora import ops, reference

INPUTS: dict[str, dict[str, Any]] = {
    "float": {},
    "dynamic": {"x_bits": 8},
    "static": {"x_bits": 8, "x_scale": 0.03, "x_zero_point": 100},
    "codes": {"x_bits": 8, "x_scale": 0.03, "x_zero_point": 100, "x_halo": 0},
    "codes-1": {"x_bits": 8, "x_scale": 0.03, "x_zero_point": 0, "x_halo": 1},
    "codes-3": {"x_bits": 8, "x_scale": 0.03, "x_zero_point": 255, "x_halo": 3},
}
ADDS: dict[str, dict[str, Any]] = {
    "none": {},
    "float": {"add": None},
    "codes": {"add": None, "add_scale": 0.4, "add_zero_point": 90, "add_halo": 0},
    "codes-2": {"add": None, "add_scale": 0.4, "add_zero_point": 13, "add_halo": 2},
}
CLAMPS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "both": (-3.0, 11.0)}
OUTPUTS: dict[str, dict[str, Any]] = {
    "float": {},
    "codes": {"out_scale": 0.21, "out_zero_point": 40},
    "codes-1": {"out_scale": 0.21, "out_zero_point": 200, "out_halo": 1},
    "codes-2": {"out_scale": 0.07, "out_zero_point": 0, "out_halo": 2},
}


def operands(n: int, k: int, conv_groups: int, **options: Any) -> dict[str, Any]:
    made = layer(n, k, conv_groups=conv_groups, **options)
    extra = {key: made.options.get(key) for key in ("a", "b", "adapter_scale", "bias")}
    names = ("codes", "scale", "zero_point", "bits")
    return {**dict(zip(names, made.args(), strict=True)), **extra}


def codes_like(shape: tuple[int, ...], zero_point: int, halo: int) -> Tensor:
    inner = torch.randint(0, 256, shape, dtype=torch.uint8)
    return reference._with_halo(inner, zero_point, halo) if len(shape) == 4 else inner


def made_input(kind: str, shape: tuple[int, ...]) -> Tensor:
    options = INPUTS[kind]
    if "x_halo" in options:
        return codes_like(shape, options["x_zero_point"], options["x_halo"])
    return torch.randn(shape) * 2


def check(
    x: Tensor,
    weights: dict[str, Any],
    channels: int,
    window: dict[str, Any],
    shape: tuple[int, ...],
    kinds: tuple[str, str, str, str],
) -> Tensor:
    """The op's result, compared with the oracle's on the output [shape]."""
    options = {**INPUTS[kinds[0]], **ADDS[kinds[1]], **OUTPUTS[kinds[3]]}
    options["clamp_min"], options["clamp_max"] = CLAMPS[kinds[2]]
    if len(shape) != 4:
        options = {key: 0 if key.endswith("halo") else v for key, v in options.items()}
    if "add" in options:
        zero, halo = options.get("add_zero_point"), options.get("add_halo", 0)
        options["add"] = torch.randn(shape) * 9 if zero is None else codes_like(shape, zero, halo)
    n = weights["codes"].shape[0]
    pairs = [window[key] for key in ("kernel_size", "stride", "padding", "dilation") if window]
    geometry = [n, *itertools.chain.from_iterable(pairs)]
    got = ops.run_layer(
        x, ops.prepare_layer(**weights, channels=channels, **window), geometry, **options
    )
    oracle = reference.prepare_layer(**weights, channels=channels, **window)
    number = {**options, "out_scale": None, "out_halo": 0}
    exact = reference.run_layer(x, oracle, geometry, **number).double()
    free = reference.run_layer(
        x, oracle, geometry, **{**number, "clamp_min": -math.inf, "clamp_max": math.inf}
    )
    tolerance = 3e-5 * float(free.double().abs().max() + 1) if free.numel() else 0.0
    if options.get("out_scale") is None:
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert float((got.double() - exact).abs().max()) <= tolerance
        return got
    expected = reference.run_layer(x, oracle, geometry, **options)
    assert got.dtype == torch.uint8 and got.shape == expected.shape
    halo = options.get("out_halo", 0)
    if len(shape) == 4:
        assert got.is_contiguous(memory_format=torch.channels_last)
        border = torch.ones_like(got, dtype=torch.bool)
        reference._without_halo(border, halo).fill_(False)
        assert (got[border] == options["out_zero_point"]).all()
        got_inner, expected = (reference._without_halo(t, halo) for t in (got, expected))
    else:
        got_inner = got
    ratio = exact / options["out_scale"]
    tie = (ratio - ratio.floor() - 0.5).abs() <= tolerance / options["out_scale"] + 1e-5
    differs = got_inner != expected
    assert not (differs & ~tie).any()
    assert (got_inner.int() - expected.int()).abs().max() <= 1
    return got


def convolution(conv: str | tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(conv, str):
        conv = CONVOLUTIONS[conv]
    b, c, h, w, outputs, groups, kernel, stride, padding, dilation = conv
    window = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    size = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip((h, w), padding, dilation, kernel, stride, strict=True)
    ]
    n = outputs * groups
    k = c * kernel[0] * kernel[1]
    return (b, c * groups, h, w), n, k, groups, {**window, "groups": groups}, (b, n, *size)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", INPUTS)
def test_convolutions(isa: str, kind: str, name: str) -> None:
    shape, n, k, groups, window, out = convolution(name)
    rank = 1 if n // groups < 7 else 7
    weights = operands(n, k, groups, rank=rank)
    plain = {key: value for key, value in window.items() if key != "groups"}
    for add, clamp, output in (
        ("none", "relu", "codes-1"),
        ("codes", "relu", "codes"),
        ("codes-2", "both", "codes-2"),
        ("float", "none", "codes-1"),
        ("codes-2", "relu", "float"),
        ("float", "both", "float"),
    ):
        x = made_input(kind, shape)
        check(x, {**weights, "groups": groups}, shape[1], plain, out, (kind, add, clamp, output))


# As CONVOLUTIONS: lines of a few bytes, which are interleaved; of many rows, of odd widths, without overlap.
FEW_CHANNELS = {
    "rgb": (3, 3, 9, 37, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "rgb, stride 2": (2, 3, 17, 18, 16, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "rgba": (1, 4, 6, 70, 12, 1, (4, 4), (1, 1), (0, 2), (1, 1)),
    "grey": (2, 1, 8, 9, 33, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "tall": (1, 2, 24, 9, 7, 1, (11, 3), (2, 1), (5, 1), (1, 1)),
    "patches": (2, 3, 12, 16, 24, 1, (4, 4), (4, 4), (0, 0), (1, 1)),
    "gaps": (1, 3, 12, 15, 8, 1, (2, 2), (3, 3), (0, 0), (1, 1)),
    "dilated rows": (1, 5, 11, 8, 9, 1, (3, 2), (1, 1), (2, 0), (2, 1)),
    "sixteen": (1, 16, 6, 7, 8, 1, (2, 2), (1, 2), (0, 0), (1, 1)),
    "one column": (1, 3, 9, 3, 8, 1, (3, 3), (1, 1), (1, 0), (1, 1)),
}


@pytest.mark.parametrize("name", FEW_CHANNELS)
@pytest.mark.parametrize("kind", ["float", "static", "dynamic", "codes", "codes-3"])
def test_few_channels(isa: str, kind: str, name: str) -> None:
    shape, n, k, groups, window, out = convolution(FEW_CHANNELS[name])
    weights = operands(n, k, groups, rank=3)
    for add, output in (("none", "codes-1"), ("codes", "codes"), ("none", "float")):
        x = made_input(kind, shape)
        plain = {key: value for key, value in window.items() if key != "groups"}
        check(x, weights, shape[1], plain, out, (kind, add, "relu", output))


@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("kind", ["float", "static", "codes-1"])
@pytest.mark.parametrize("size", [3, 9])
def test_symmetric_codes_of_8_bits(isa: str, kind: str, channels: int, size: int) -> None:
    """Their panels are stored as the kernels read them."""
    conv = (2, channels, size, size, 70, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    shape, n, k, _, window, out = convolution(conv)
    plain = {key: value for key, value in window.items() if key != "groups"}
    for rank in (0, 20):
        weights = operands(n, k, 1, bits=8, rank=rank)
        weights["zero_point"] = torch.full_like(weights["zero_point"], 128)
        for add, output in (("none", "codes-1"), ("float", "float")):
            x = made_input(kind, shape)
            check(x, weights, channels, plain, out, (kind, add, "relu", output))


@pytest.mark.parametrize("m", [0, 1, 3, 5, 37])
@pytest.mark.parametrize("kind", [kind for kind in INPUTS if not kind.startswith("codes-")])
def test_linear(isa: str, kind: str, m: int) -> None:
    for (n, k), rank in (((33, 97), 7), ((64, 128), 0), ((7, 31), 2)):
        weights = operands(n, k, 1, rank=rank)
        for add, clamp, output in (
            ("none", "relu", "codes"),
            ("codes", "both", "codes"),
            ("float", "relu", "float"),
        ):
            x = made_input(kind, (m, k))
            if m:
                check(x, weights, k, {}, (m, n), (kind, add, clamp, output))
            else:
                y = ops.run_layer(x, ops.prepare_layer(**weights, channels=k), [n], **INPUTS[kind])
                assert y.shape == (0, n)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 32},
        {"rank": 5, "adapter": torch.float32},
        {"far": True},
        {"groups": 4},
    ],
    ids=str,
)
def test_weights(isa: str, options: dict[str, Any], bits: int) -> None:
    """Every width and kind of weight and adapter hands on the same codes."""
    shape, n, k, groups, window, out = convolution("3x3")
    weights = operands(n, k, groups, bits=bits, **options)
    plain = {key: value for key, value in window.items() if key != "groups"}
    kinds = ("codes-1", "codes", "relu", "codes-1")
    if options.get("far"):
        kinds = ("codes-1", "none", "none", "float")  # its outputs are far beyond any code
    x = made_input("codes-1", shape)
    check(x, weights, shape[1], plain, out, kinds)


@pytest.mark.parametrize("rank", [0, 5, 16, 17, 40])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "size", [(1, 7, 7), (1, 4, 3), (2, 11, 13), (1, 24, 5), (1, 9, 13), (1, 14, 16)]
)
def test_whole_cache_lines_of_channels(
    isa: str, size: tuple[int, int, int], bits: int, rank: int
) -> None:
    """One or two tiles of pixels, whose weights an AMX kernel expands on the way, and more of them."""
    batch, height, width = size
    channels = 128 if height == 9 else 64
    kernel = 1 if height == 14 else 3
    shape, n, k = (batch, channels, height, width), 72, channels * kernel**2
    window: dict[str, Any] = {"stride": [1, 1], "dilation": [1, 1]}
    window |= {"kernel_size": [kernel, kernel], "padding": [kernel // 2, kernel // 2]}
    weights = operands(n, k, 1, bits=bits, rank=rank)
    for kinds in (
        ("codes-1", "codes-2", "relu", "codes-1"),
        ("codes-3", "float", "both", "codes"),
        ("static", "none", "none", "float"),
    ):
        x = made_input(kinds[0], shape)
        check(x, weights, shape[1], window, (batch, n, height, width), kinds)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("add", ["none", "codes", "float"])
def test_codes_beyond_the_integers(isa: str, add: str, rank: int) -> None:
    """Numbers that no int32 holds become the least and the largest code, not each other."""
    weights = operands(40, 64, 1, rank=rank)
    prepared = ops.prepare_layer(**weights, channels=64, kernel_size=(1, 1))
    geometry = [40, 1, 1, 1, 1, 0, 0, 1, 1]
    x = codes_like((1, 64, 6, 7), 0, 0)
    run = {"x_scale": 0.03, "x_zero_point": 100, "x_bits": 8}
    if add != "none":
        more = torch.randn(1, 40, 6, 7) if add == "float" else codes_like((1, 40, 6, 7), 0, 0)
        run |= {"add": more, "add_scale": 0.4, "add_zero_point": 90}
    number = ops.run_layer(x, prepared, geometry, **run)
    codes = ops.run_layer(x, prepared, geometry, **run, out_scale=1e-20, out_zero_point=77)
    assert torch.equal(codes, torch.where(number > 0, 255, 0).to(torch.uint8))
    codes = ops.run_layer(
        x, prepared, geometry, **run, clamp_min=-1e-19, clamp_max=3e-19, out_scale=1e-20,
        out_zero_point=77,
    )  # fmt: skip
    assert torch.equal(codes, torch.where(number > 0, 107, 67).to(torch.uint8))


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("name", [*CONVOLUTIONS, "whole lines"])
def test_codes_agree_over_levels(name: str, add: str) -> None:
    """To the bit where there is no adapter: the sums are integers and the steps after them the same."""
    if name == "whole lines":
        shape, n, k, groups, out = (1, 64, 6, 9), 45, 576, 1, (1, 45, 6, 9)
        window = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    else:
        shape, n, k, groups, window, out = convolution(name)
    prepared_from = operands(n, k, groups, rank=0)
    prepared = ops.prepare_layer(**{**prepared_from, **window}, channels=shape[1])
    pairs = [window[key] for key in ("kernel_size", "stride", "padding", "dilation")]
    geometry = [n, *itertools.chain.from_iterable(pairs)]
    options = {**INPUTS["codes-1"], **ADDS[add], **OUTPUTS["codes-1"], "clamp_max": 20.0}
    if add != "none":
        zero, halo = options.get("add_zero_point"), options.get("add_halo", 0)
        options["add"] = torch.randn(out) * 9 if zero is None else codes_like(out, zero, halo)
    x, before, results = made_input("codes-1", shape), ops.isa()["level"], []
    try:
        for level in SUPPORTED:
            ops.set_isa(level)
            results.append(ops.run_layer(x, prepared, geometry, **options))
    finally:
        ops.set_isa(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("rows", [1, 3, 9, 33, 70])
@pytest.mark.parametrize("k", [64, 130, 32704, 32832])
def test_rows_of_their_own_agree_over_levels(k: int, rows: int) -> None:
    """Scales and zero-points a row, and the largest sums of weights: the same bits on every level, and the
    exact integers' values."""
    n, before = 37, ops.isa()["level"]
    codes = torch.randint(0, 2, (n, k), dtype=torch.uint8)
    codes[:5] = 0  # weights of -128
    x = torch.randn(rows, k)
    x[::2] = -x[::2].abs()  # zero-points of 255
    scale, bias = torch.rand(n, 1) + 0.5, torch.randn(n)
    zero_point = torch.full((n, 1), 128, dtype=torch.int32)
    prepared = ops.prepare_layer(codes, scale, zero_point, 8, bias=bias, channels=k)
    results = []
    try:
        for level in SUPPORTED:
            ops.set_isa(level)
            results.append(ops.run_layer(x, prepared, [n], None, 0, 8))
    finally:
        ops.set_isa(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    low, high = x.amin(1, True).clamp_max(0), x.amax(1, True).clamp_min(0)
    step = (high - low) / 255
    zero = (-low / step).round().clamp(0, 255).double()
    q = ((x / step).round().double() + zero).clamp(0, 255)
    sums = (q - zero) @ (codes.double() - 128).T
    expected = sums * scale.double().T * step.double() + bias
    torch.testing.assert_close(results[0].double(), expected, rtol=2e-6, atol=1e-4)


def test_codes_in_place_of_floats(isa: str) -> None:
    """A layer reads the same from floats that it quantizes as from their codes, whatever their border."""
    shape, n, k, groups, window, _ = convolution("3x3")
    weights = operands(n, k, groups, rank=7)
    prepared = ops.prepare_layer(**weights, channels=shape[1], **window)
    geometry = [n, 3, 3, 1, 1, 1, 1, 1, 1]
    x, quantizer = torch.randn(shape), {"x_scale": 0.02, "x_zero_point": 90, "x_bits": 8}
    expected = ops.run_layer(x, prepared, geometry, **quantizer, out_scale=0.3)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        ops.run_layer(last, prepared, geometry, **quantizer, out_scale=0.3), expected
    )
    for halo in (0, 1, 2, 3):
        codes = ops.quantize_activation(x, 0.02, 90, 8, halo)
        got = ops.run_layer(codes, prepared, geometry, **quantizer, x_halo=halo, out_scale=0.3)
        assert torch.equal(got, expected)


def test_threads(threads: Any) -> None:
    shape, n, k, groups, window, _ = convolution("strided")
    weights = operands(n, k, groups, rank=3)
    prepared = ops.prepare_layer(**weights, channels=shape[1], **window)
    geometry = [n, *window["kernel_size"], *window["stride"], *window["padding"], 1, 1]
    x = made_input("codes-1", (5, *shape[1:]))
    results = []
    for count in (1, 2):
        threads(count)
        results.append(
            ops.run_layer(x, prepared, geometry, 0.03, 0, 8, 1, out_scale=0.2, out_halo=2)
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("name", ["linear-1", "linear-37", "3x3", "depthwise", "grouped"])
def test_not_a_number_stays_one(isa: str, name: str, clamp: str) -> None:
    """No clamp turns it into a number, and it goes no farther than its own outputs."""
    window: dict[str, Any] = {}
    shape: tuple[int, ...] = (37 if name.endswith("37") else 1, 97)
    n, k, groups = 33, 97, 1
    if not name.startswith("linear"):
        shape, n, k, groups, window, _ = convolution(name)
    channels = shape[1]
    plain = {key: value for key, value in window.items() if key != "groups"}
    weights = {**operands(n, k, groups, rank=1), **({"groups": groups} if window else {})}
    geometry = [n, *itertools.chain.from_iterable(plain.values())]
    low, high = CLAMPS[clamp]
    for value in (math.nan, math.inf):
        x = torch.randn(shape)
        x.view(-1)[x.numel() // 2] = value
        made = ops.prepare_layer(**weights, channels=channels, **plain)
        oracle = reference.prepare_layer(**weights, channels=channels, **plain)
        got = ops.run_layer(x, made, geometry, clamp_min=low, clamp_max=high)
        want = reference.run_layer(x, oracle, geometry, clamp_min=low, clamp_max=high)
        assert want.isnan().any() or value == math.inf
        assert torch.equal(got.isnan(), want.isnan())
