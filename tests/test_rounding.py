"""Error feedback: what it wins at a layer's output, and what it must leave as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cora import QuantSpec, rounding
from cora.lowrank import LayerShape
from cora.moments import output_energy
from cora.quantizer import choose_qparams, weight_bits
from cora.rounding import Feedback, Rounded, descend, quantize_matrix

SPECS = [
    QuantSpec(2),
    QuantSpec(3, clip="minmax"),
    QuantSpec(3, "per_tensor"),
    QuantSpec(4, "per_tensor", clip="minmax"),
    QuantSpec(2, "per_group", 6),
    QuantSpec(3, "per_group", 12, clip="ksigma"),
    QuantSpec(3, symmetric=True),
    QuantSpec(2, "per_group", 6, symmetric=True),
]


def correlated(groups: int, columns: int) -> Tensor:
    """Second moments of inputs of few directions and uneven sizes, [groups, K, K]."""
    directions = torch.randn(groups, columns, columns) * torch.logspace(0, -2, columns)[:, None]
    x = torch.randn(groups, 8 * columns, columns) @ directions
    return x.mT @ x / x.shape[1]


def error_of(matrix: Tensor, dequantized: Tensor, moment: Tensor) -> float:
    shape = LayerShape(*matrix.shape, len(moment))
    return output_energy(matrix - dequantized, shape, moment)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "groups"), [(16, 1), (12, 3), (9, 9)])
def test_less_error_at_the_output(spec: QuantSpec, rows: int, groups: int) -> None:
    """One matrix, several groups, and one row a group (a depthwise convolution)."""
    matrix, moment = torch.randn(rows, 24), correlated(groups, 24)
    nearest = quantize_matrix(
        matrix, spec.replace(rounding="nearest"), feedback=Feedback.of(moment)
    )
    fed = quantize_matrix(matrix, spec, feedback=Feedback.of(moment))
    before, after = (error_of(matrix, q.dequantized, moment) for q in (nearest, fed))
    assert after < 0.7 * before
    # It pays with the error of the weights.
    assert (matrix - fed.dequantized).square().sum() > (matrix - nearest.dequantized).square().sum()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("every", [2, 3, 16])
def test_a_share_of_the_rows(spec: QuantSpec, every: int) -> None:
    """Rows do not see each other, but where they share a scale; what is stored is counted for all of them."""
    matrix, feedback = torch.randn(10, 24), Feedback.of(correlated(1, 24))
    best, all_, some = (
        quantize_matrix(matrix, spec, feedback=feedback, every=n, whole=whole)
        for n, whole in ((1, True), (every, True), (every, False))
    )
    assert some.codes.shape == some.dequantized.shape == (-(-10 // every), 24)
    assert torch.equal(some.codes, all_.codes[::every])
    assert torch.equal(some.dequantized, all_.dequantized[::every])
    for rounded in (all_, some):
        assert torch.equal(rounded.qparams.scale, all_.qparams.scale)
        assert torch.equal(rounded.qparams.zero_point, all_.qparams.zero_point)
        stored = [weight_bits(10, 24, q.qparams) for q in (best, rounded)]
        assert stored[0] == stored[1]
    if spec.granularity != "per_tensor":
        assert torch.equal(some.dequantized, best.dequantized[::every])
    q, groups = all_.qparams, all_.qparams.scale.shape[1]
    grouped = all_.codes.reshape(10, groups, -1) - q.zero_point[:, :, None]
    assert torch.equal(all_.dequantized, (q.scale[:, :, None] * grouped).reshape(10, 24))
    errors = [(matrix - q.dequantized).square().sum() for q in (best, all_)]
    assert errors[1] < 3 * errors[0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_those_of_the_codes(spec: QuantSpec) -> None:
    matrix, moment = torch.randn(8, 24), correlated(2, 24)
    found = quantize_matrix(matrix, spec, feedback=Feedback.of(moment))
    q = found.qparams
    rows = 1 if spec.granularity == "per_tensor" else 8
    assert q.scale.shape == q.zero_point.shape == (rows, spec.groups_of(24))
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**spec.bits
    scale, zero = (t.repeat_interleave(24 // t.shape[1], 1) for t in (q.scale, q.zero_point))
    assert torch.equal(found.dequantized, scale * (found.codes.float() - zero.float()))
    assert q.symmetric == spec.symmetric
    assert torch.equal(q.scale, q.scale.to(q.scale_dtype).float())


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_without_a_moment_it_is_nearest(rounding: str) -> None:
    matrix = torch.randn(7, 24)
    for spec in SPECS:
        found = quantize_matrix(matrix, spec.replace(rounding=rounding))
        q, expected = found.qparams, choose_qparams(matrix, spec)
        assert torch.equal(q.scale, expected.scale)
        assert torch.equal(q.zero_point, expected.zero_point)
        scale, zero = (t.repeat_interleave(24 // t.shape[1], 1) for t in (q.scale, q.zero_point))
        nearest = (torch.round(matrix / scale) + zero).clamp(0, 2**spec.bits - 1)
        assert torch.equal(found.codes.float(), nearest.expand(matrix.shape))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.37, -5.25])
def test_constant_weights_are_exact(spec: QuantSpec, value: float) -> None:
    found = quantize_matrix(
        torch.full((6, 24), value), spec, feedback=Feedback.of(correlated(1, 24))
    )
    assert torch.equal(found.dequantized, torch.full((6, 24), value))


def test_a_constant_row_beside_others_is_exact() -> None:
    matrix = torch.randn(4, 24)
    matrix[1], matrix[2] = 0.0, 0.3
    found = quantize_matrix(matrix, QuantSpec(2), feedback=Feedback.of(correlated(1, 24)))
    assert torch.equal(found.dequantized[1:3], matrix[1:3])


def test_a_grid_is_exact() -> None:
    """What is already on the grid of its full range has no error to pass on."""
    codes = torch.randint(0, 8, (5, 24)).float()
    codes[:, 0], codes[:, 1] = 0, 7
    matrix = 0.25 * (codes - 3)
    for clip in ("minmax", "mse"):
        spec = QuantSpec(3, clip=clip)
        found = quantize_matrix(matrix, spec, feedback=Feedback.of(correlated(1, 24)))
        assert torch.equal(found.dequantized, matrix)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.clip != "mse"], ids=str)
def test_a_fixed_clip_keeps_its_range(spec: QuantSpec) -> None:
    matrix = torch.randn(8, 24)
    found = quantize_matrix(matrix, spec, feedback=Feedback.of(correlated(1, 24)))
    expected = choose_qparams(matrix, spec)
    assert torch.equal(found.qparams.scale, expected.scale)
    assert torch.equal(found.qparams.zero_point, expected.zero_point)


def test_mse_is_no_worse_than_the_full_range() -> None:
    """Row by row, at the output: the range is chosen by the error that is left there."""
    matrix, moment = torch.randn(16, 24), correlated(1, 24)
    damped = moment[0] + 0.01 * moment[0].diagonal().mean() * torch.eye(24)
    errors = []
    for clip in ("minmax", "mse"):
        found = quantize_matrix(matrix, QuantSpec(2, clip=clip), feedback=Feedback.of(moment))
        rest = matrix - found.dequantized
        errors.append(((rest @ damped) * rest).sum(1))
    assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_factor(groups: int) -> None:
    """U^T U is the inverse of the damped moment, its columns by falling second moment."""
    moment = correlated(groups, 12)
    found = Feedback.of(moment)
    assert found.factor.shape == (groups, 12, 12) and found.order.shape == (groups, 12)
    diagonal = moment.diagonal(dim1=1, dim2=2)
    assert torch.equal(found.seen, diagonal)
    for g in range(groups):
        order = found.order[g]
        assert sorted(order.tolist()) == list(range(12))
        assert (diagonal[g][order].diff() <= 0).all()
        damped = moment[g].double() + 0.01 * diagonal[g].double().mean() * torch.eye(12)
        factor = found.factor[g].double()
        assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
        product = factor.T @ factor @ damped[order][:, order]
        torch.testing.assert_close(product, torch.eye(12).double(), atol=1e-4, rtol=0)


def test_inputs_that_are_never_seen() -> None:
    """A moment of zeros, or of zeros in places, still gives finite weights close to nearest ones."""
    matrix, moment = torch.randn(4, 12), correlated(1, 12)
    moment[:, 3], moment[:, :, 3] = 0, 0
    for given in (moment, torch.zeros(1, 12, 12)):
        found = quantize_matrix(matrix, QuantSpec(4), feedback=Feedback.of(given))
        assert torch.isfinite(found.dequantized).all()
    nearest = quantize_matrix(matrix, QuantSpec(4, clip="minmax"))
    zeros = Feedback.of(torch.zeros(1, 12, 12))
    fed = quantize_matrix(matrix, QuantSpec(4, clip="minmax"), feedback=zeros)
    assert torch.equal(fed.codes, nearest.codes)


def damped(moment: Tensor) -> Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    return moment.double() + 0.01 * mean[:, None, None] * torch.eye(moment.shape[-1])


def slow_descent(start: Rounded, matrix: Tensor, moment: Tensor, sweeps: int) -> Tensor:
    """Codes one by one, each the best of all levels while the others stay, with the whole error each time."""
    q, groups, columns = start.qparams, len(moment), matrix.shape[1]
    wide = (t.double().repeat_interleave(columns // t.shape[1], 1) for t in (q.scale, q.zero_point))
    scale, zero = (t.expand(matrix.shape) for t in wide)
    codes, per_group, weighted = start.codes.double(), len(matrix) // groups, damped(moment)
    for _ in range(sweeps):
        for row in range(len(matrix)):
            for k in range(columns):
                tried = codes[row].repeat(2**q.bits, 1)
                tried[:, k] = torch.arange(2**q.bits)
                error = matrix[row].double() - scale[row] * (tried - zero[row])
                errors = ((error @ weighted[row // per_group]) * error).sum(1)
                codes[row, k] = errors.argmin()
    return codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "groups", "columns"), [(4, 1, 132), (6, 3, 24), (3, 3, 12)])
def test_descent(
    spec: QuantSpec, rows: int, groups: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code at a time by brute force; columns in several blocks, groups, a row a group."""
    matrix, moment = torch.randn(rows, columns), correlated(groups, columns)
    start = quantize_matrix(matrix, spec, feedback=Feedback.of(moment))
    before = start.codes.clone()
    found = descend(start, matrix, moment)
    assert torch.equal(start.codes, before)
    assert torch.equal(found.codes.double(), slow_descent(start, matrix, moment, 3))
    assert found.qparams is start.qparams and found.codes.dtype == torch.uint8
    scale, zero = (
        t.repeat_interleave(columns // t.shape[1], 1)
        for t in (found.qparams.scale, found.qparams.zero_point)
    )
    assert torch.equal(found.dequantized, scale * (found.codes.float() - zero.float()))
    errors = [error_of(matrix, q.dequantized, damped(moment).float()) for q in (start, found)]
    changed = not torch.equal(found.codes, before)
    assert errors[1] < errors[0] if changed else errors[1] == errors[0]
    assert changed or columns < 100  # a small matrix may have nothing to win
    # Where nothing moves any more, a further descent has nothing to do.
    monkeypatch.setattr(rounding, "_SWEEPS", 100)
    end = descend(found, matrix, moment)
    assert torch.equal(descend(end, matrix, moment).codes, end.codes)
    assert torch.equal(slow_descent(end, matrix, moment, 1), end.codes.double())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_descent_leaves_what_is_exact(spec: QuantSpec) -> None:
    """Constant weights, whose scales may be tiny, and inputs that are never seen."""
    moment = correlated(1, 24)
    for value in (0.0, 0.37):
        matrix = torch.full((6, 24), value)
        found = descend(quantize_matrix(matrix, spec, feedback=Feedback.of(moment)), matrix, moment)
        assert torch.equal(found.dequantized, matrix)
    matrix, unseen = torch.randn(4, 24), torch.zeros(1, 24, 24)
    nearest = quantize_matrix(matrix, spec.replace(rounding="nearest"))
    assert torch.equal(descend(nearest, matrix, unseen).codes, nearest.codes)


def test_errors() -> None:
    feedback = Feedback.of(correlated(1, 24))
    with pytest.raises(ValueError, match="conv: weight must be finite"):
        quantize_matrix(torch.full((2, 24), torch.nan), QuantSpec(3), "conv", feedback)
    with pytest.raises(ValueError, match="conv: group_size must divide the 24 weights"):
        quantize_matrix(torch.randn(2, 24), QuantSpec(3, "per_group", 7), "conv", feedback)
    with pytest.raises(ValueError, match="rounding must be one of gptq, nearest, got 'up'"):
        QuantSpec(3, rounding="up")
