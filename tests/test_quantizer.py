"""Weight quantizers against a plain loop over their groups, and what they take in bits."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from cora import QuantSpec, ops
from cora.quantizer import (
    SUPPORTED_BITS,
    QParams,
    choose_qparams,
    packed_bytes,
    weight_bits,
    zero_point_bits,
)

GRANULARITIES = {"per_tensor": None, "per_channel": None, "per_group": 8}
SPECS = [
    QuantSpec(bits, granularity, group, symmetric, clip)
    for bits, (granularity, group), symmetric, clip in itertools.product(
        SUPPORTED_BITS, GRANULARITIES.items(), (False, True), ("minmax", "ksigma", "mse")
    )
]


def spec_id(spec: QuantSpec) -> str:
    return f"{spec.bits}-{spec.granularity}-{'sym' if spec.symmetric else 'asym'}-{spec.clip}"


def quantize(weight: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """Values and codes by the definition, in float64."""
    rows, columns = weight.shape
    scale, zero = (
        p.double()
        .expand(rows if p.shape[0] == 1 else -1, -1)
        .repeat_interleave(columns // p.shape[1], 1)
        for p in (qparams.scale, qparams.zero_point)
    )
    codes = ((weight.double() / scale).round() + zero).clamp(0, 2**qparams.bits - 1)
    return scale * (codes - zero), codes


def native(weight: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    return ops.fake_quantize(weight, qparams.scale, qparams.zero_point, qparams.bits, codes=True)


def groups_of(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[groups, weights that share a scale]."""
    size = {"per_tensor": weight.numel(), "per_channel": weight.shape[1]}
    return weight.reshape(-1, size.get(spec.granularity, spec.group_size))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_choose_qparams(spec: QuantSpec) -> None:
    weight = torch.randn(6, 24) * torch.tensor([1e-3, 0.1, 1, 1, 30, 1e3])[:, None]
    weight[3] += 4  # a range without 0
    qparams = choose_qparams(weight, spec)
    rows = {"per_tensor": 1}.get(spec.granularity, 6)
    assert qparams.scale.shape == qparams.zero_point.shape == (rows, 3 if spec.group_size else 1)
    assert qparams.scale.dtype == torch.float32 and qparams.zero_point.dtype == torch.int32
    assert (qparams.scale > 0).all()
    assert torch.equal(qparams.scale.to(qparams.scale_dtype).float(), qparams.scale)
    if spec.symmetric:
        assert (qparams.zero_point == 2 ** (spec.bits - 1)).all()
    values, codes = quantize(weight, qparams)
    found, found_codes = native(weight, qparams)
    assert torch.equal(found_codes.double(), codes)
    torch.testing.assert_close(found.double(), values)
    error = groups_of((weight - values).abs(), spec).amax(1)
    if spec.clip == "minmax":
        steps = error / qparams.scale.reshape(-1)
        assert steps.max() <= 1 + 1e-6
        if not spec.symmetric:  # the low end is on the grid
            lowest = groups_of(weight, spec).argmin(1, keepdim=True)
            at_low = groups_of((weight - values).abs(), spec).gather(1, lowest)[:, 0]
            assert (at_low <= (0.5 + 1e-4) * qparams.scale.reshape(-1)).all()
    if spec.clip == "mse":
        plain = choose_qparams(weight, spec.replace(clip="minmax"))
        minmax_values, _ = quantize(weight, plain)
        best, minmax = (
            groups_of((weight - v).square(), spec).sum(1) for v in (values, minmax_values)
        )
        assert (best <= minmax * (1 + 1e-3)).all()


def test_ksigma_clips_at_k_deviations() -> None:
    weight = torch.randn(4, 1000)
    weight[:, 0], weight[:, 1] = 50, -50
    for k in (1.5, 2.5):
        qparams = choose_qparams(weight, QuantSpec(8, clip="ksigma", k=k))
        ends = qparams.scale * (torch.tensor([[0, 255]]) - qparams.zero_point)
        mean, std = weight.mean(1, keepdim=True), weight.std(1, correction=0, keepdim=True)
        expected = torch.cat([mean - k * std, mean + k * std], 1)
        torch.testing.assert_close(ends, expected, atol=float(qparams.scale.max()), rtol=1e-3)
    wide = choose_qparams(weight, QuantSpec(8, clip="ksigma", k=1e3))
    assert torch.equal(wide.scale, choose_qparams(weight, QuantSpec(8, clip="minmax")).scale)


def test_mse_finds_the_best_of_a_brute_force_over_ranges() -> None:
    """Within a few percent of the best symmetric shrinking of the range, by a fine grid."""
    weight = torch.randn(1, 4096)
    weight[0, 0] = 9.0
    found, _ = quantize(weight, choose_qparams(weight, QuantSpec(3, symmetric=True)))
    best = min(
        float(
            (
                quantize(
                    weight,
                    QParams(torch.tensor([[s]]), torch.tensor([[4]]), 3, torch.float32, True),
                )[0]
                - weight
            )
            .square()
            .sum()
        )
        for s in torch.linspace(0.05, 3, 600).tolist()
    )
    assert float((found - weight).square().sum()) <= 1.02 * best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "ksigma", "mse"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_constants_are_exact(bits: int, granularity: str, clip: str, symmetric: bool) -> None:
    spec = QuantSpec(bits, granularity, GRANULARITIES[granularity], symmetric, clip)
    for value in (0.0, 0.1, -0.1, 1 / 3, -1e-30, 1e30, 6.1e-5, 65504.0, 1e-40):
        weight = torch.full((3, 16), value)
        found, _ = native(weight, choose_qparams(weight, spec))
        assert torch.equal(found, weight), value
        single = torch.full((1, 1), value)
        found, _ = native(
            single, choose_qparams(single, spec.replace(granularity="per_channel", group_size=None))
        )
        assert torch.equal(found, single), value
    if granularity != "per_tensor":  # one constant row beside others
        weight = torch.randn(3, 16)
        weight[0], weight[1] = 0.1, 0.0
        found, _ = native(weight, choose_qparams(weight, spec))
        assert torch.equal(found[:2], weight[:2])


@pytest.mark.parametrize("clip", ["minmax", "ksigma", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-37, 1e-30, 1e-6, 1e5, 1e18, 1e30, 1e37])
def test_extreme_magnitudes(magnitude: float, symmetric: bool, clip: str) -> None:
    weight = torch.rand(4, 32) * 2 - 1
    weight = (weight / weight.abs().amax(1, keepdim=True)) * magnitude
    for bits in (2, 8):
        qparams = choose_qparams(weight, QuantSpec(bits, symmetric=symmetric, clip=clip))
        assert torch.isfinite(qparams.scale).all() and (qparams.scale > 0).all()
        found, _ = native(weight, qparams)
        assert torch.isfinite(found).all()
        # Of weights down to float32's smallest normal, no step is wider than the range.
        reach = 1.01 if bits == 2 else 0.02
        if magnitude > 1e-37:
            error = (found.double() - weight.double()).abs().max()
            assert error <= reach * magnitude * (2 if clip == "ksigma" else 1)
    if magnitude in (1e-6, 1e30):
        assert qparams.scale_dtype == torch.float32


@pytest.mark.parametrize("offset", [1e2, -1e4, 1e6, -1e9])
@pytest.mark.parametrize("clip", ["minmax", "ksigma", "mse"])
def test_far_ranges(offset: float, clip: str) -> None:
    """A narrow range far from zero: the zero-point stays an exact float32 integer."""
    weight = torch.rand(4, 64).double().add(offset).float()
    qparams = choose_qparams(weight, QuantSpec(4, clip=clip))
    assert qparams.zero_point.abs().max() < 2**24
    found, _ = native(weight, qparams)
    resolution = abs(offset) / 2**22
    assert (found - weight).abs().max() <= 0.3 + resolution


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float) -> None:
    weight = torch.randn(4, 4)
    weight[2, 1] = value
    with pytest.raises(ValueError, match="conv1: weight must be finite"):
        choose_qparams(weight, QuantSpec(), "conv1")


def test_too_large() -> None:
    with pytest.raises(
        ValueError, match="conv1: weight must be at most 1e.37 in magnitude, got 3e"
    ):
        choose_qparams(torch.tensor([[1.0, -3e38]]), QuantSpec(), "conv1")


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match=r"fc: group_size must divide the 10 weights .* got 4"):
        choose_qparams(torch.randn(2, 10), QuantSpec(granularity="per_group", group_size=4), "fc")
    with pytest.raises(ValueError, match="non-empty matrix"):
        choose_qparams(torch.zeros(0, 4), QuantSpec())


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"bits": True}, {"bits": "4"},
        {"granularity": "per_row"}, {"granularity": ["per_channel"]}, {"granularity": "per_group"},
        {"granularity": "per_group", "group_size": 0},
        {"granularity": "per_group", "group_size": 2.5},
        {"granularity": "per_group", "group_size": True}, {"group_size": 8}, {"clip": "max"},
        {"k": 0}, {"k": -1.0}, {"k": float("nan")}, {"k": float("inf")}, {"k": "3"},
        {"symmetric": 1}, {"symmetric": None},
    ],
    ids=str,
)  # fmt: skip
def test_spec_errors(fields: dict[str, object]) -> None:
    name = list(fields)[-1] if fields != {"granularity": "per_group"} else "group_size"
    with pytest.raises(ValueError, match=f"QuantSpec: {name} .*got"):
        QuantSpec(**fields)


def test_spec_is_a_value() -> None:
    spec = QuantSpec(3, "per_group", 32)
    assert spec == QuantSpec(3, "per_group", 32) and hash(spec) == hash(
        QuantSpec(3, "per_group", 32)
    )
    assert spec.replace(bits=2) == QuantSpec(2, "per_group", 32)
    with pytest.raises(ValueError, match="bits"):
        spec.replace(bits=17)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 2  # type: ignore[misc]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_zero_point_bits(bits: int) -> None:
    """The narrowest width that holds every zero-point; only `bits` itself means unsigned."""
    for low, high in [
        (0, 2**bits - 1),
        (-1, 3),
        (0, 2**bits),
        (-128, 127),
        (0, 128),
        (-(2**15), 0),
        (0, 2**23),
    ]:
        zero = torch.tensor([[low], [high]], dtype=torch.int32)
        width = zero_point_bits(zero, bits, False)
        if low >= 0 and high < 2**bits:
            assert width == bits
        else:
            assert width > bits and -(2 ** (width - 1)) <= low and high < 2 ** (width - 1)
            assert width == min(
                w for w in (8, 16, 32) if w > bits and max(-low, high + 1) <= 2 ** (w - 1)
            )
        assert zero_point_bits(zero, bits, True) == 0


def test_packed_bytes() -> None:
    for rows, columns, bits in itertools.product((1, 3), (1, 7, 8, 31), SUPPORTED_BITS):
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        assert packed_bytes(rows, columns, bits) == ops.pack_bits(codes, bits).numel()


def test_weight_bits_by_hand() -> None:
    qparams = choose_qparams(torch.randn(8, 9), QuantSpec(3))
    assert weight_bits(8, 9, qparams) == 8 * 4 * 8 + 8 * 16 + 8 * 3  # rows of 27 bits take 4 bytes
    symmetric = choose_qparams(torch.randn(8, 9), QuantSpec(3, "per_tensor", symmetric=True))
    assert weight_bits(8, 9, symmetric) == 8 * 4 * 8 + 16
    outside = choose_qparams(torch.rand(8, 9) + 5, QuantSpec(3, clip="minmax"))
    assert weight_bits(8, 9, outside) == 8 * 4 * 8 + 8 * 16 + 8 * 8
