"""descend_codes against its oracle, bit for bit, and against the error it is to lower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cora import ops, reference

SHAPES = ((1, 1, 1), (1, 37, 64), (3, 5, 31), (7, 1, 9), (2, 0, 5), (0, 3, 4), (2, 3, 0))


def arguments(shape: tuple[int, int, int], bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Codes far from where they go, and of columns that look alike."""
    groups, _, columns = shape
    codes = torch.randint(0, 2**bits, shape).double()
    gradient, scale = torch.randn(2, *shape, dtype=torch.float64)
    seen = torch.randn(groups, 2 * columns + 1, columns, dtype=torch.float64) + 1
    return codes, gradient * columns, scale.abs() + 0.1, seen.mT @ seen, bits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_equal_the_oracle(bits: int, shape: tuple[int, int, int]) -> None:
    args = arguments(shape, bits)
    got = ops.descend_codes(*args)
    assert got.dtype == torch.float64
    assert torch.equal(got, reference.descend_codes(*args))


def test_any_number_of_threads(threads: Callable[[int], None]) -> None:
    """Large enough that every thread gets rows of its own."""
    args = arguments((2, 150, 64), 4)
    want = reference.descend_codes(*args)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(ops.descend_codes(*args), want)


def test_non_contiguous_inputs() -> None:
    *tensors, bits = arguments((2, 5, 8), 4)
    views = [t.mT.contiguous().mT for t in tensors]
    assert torch.equal(ops.descend_codes(*views, bits), reference.descend_codes(*tensors, bits))


def test_the_error_falls() -> None:
    codes, _, scale, curvature, bits = arguments((2, 40, 24), 4)
    weight = torch.randn(codes.shape, dtype=torch.float64) * scale.mean() * 4

    def error(codes: Tensor) -> Tensor:
        e = weight - scale * (codes - 7)
        return ((e @ curvature) * e).sum(-1)

    gradient = (weight - scale * (codes - 7)) @ curvature
    new = ops.descend_codes(codes, gradient, scale, curvature, bits)
    assert bool((error(new) <= error(codes) * (1 + 1e-12)).all())
    assert float(error(new).sum()) < 0.5 * float(error(codes).sum())


def test_rows_do_not_see_each_other() -> None:
    codes, gradient, scale, curvature, bits = arguments((1, 6, 10), 4)
    want = ops.descend_codes(codes, gradient, scale, curvature, bits)
    gradient[0, 2, 3] = torch.nan
    got = ops.descend_codes(codes, gradient, scale, curvature, bits)
    others = torch.arange(6) != 2
    assert torch.equal(got[0, others], want[0, others])
    assert torch.equal(got[0, 2, :3], want[0, 2, :3])
    assert got[0, 2, 3] == 0


def test_arguments_stay_as_they_are() -> None:
    *tensors, bits = arguments((1, 6, 10), 4)
    before = [t.clone() for t in tensors]
    ops.descend_codes(*tensors, bits)
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t, old)
