"""error_feedback against its oracle, bit for bit, and against the error it says it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import qparams
from torch import Tensor

from cora import ops, reference

# rows, columns, groups: lanes, tiles and blocks with and without tails, one row a group at the end.
SHAPES = (
    (1, 1, 1),
    (7, 31, 1),
    (31, 7, 1),
    (33, 33, 3),
    (65, 97, 1),
    (99, 65, 3),
    (32, 144, 1),
    (35, 9, 35),
    (3, 49, 3),
)
GRANULARITIES = ("per-tensor", "per-channel", "per-group", "shared-groups")


def divisor(k: int) -> int:
    """The smallest above 1, where there is one."""
    return next((d for d in range(2, k + 1) if k % d == 0), 1)


def arguments(
    n: int, k: int, groups: int, bits: int, granularity: str, *, shuffled: bool, far: bool = False
) -> tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor]:
    """A factor that passes on much, and holds NaN where nothing is to be read."""
    rows = 1 if granularity in ("per-tensor", "shared-groups") else n
    runs = divisor(k) if "group" in granularity else 1
    scale, zero_point = qparams(rows, runs, bits, far=far)
    x = torch.randn(n, k) - (scale.mean() * 2**23 if far else 0)
    factor = torch.randn(groups, k, k) * (0.5 / (k + 1) ** 0.5)
    factor.diagonal(dim1=1, dim2=2).uniform_(0.5, 2.0)
    below = torch.ones(k, k).tril(-1).bool()
    order = [torch.randperm(k) if shuffled else torch.arange(k) for _ in range(groups)]
    return x, scale, zero_point, bits, factor.masked_fill(below, torch.nan), torch.stack(order)


def check(*args: Any) -> None:
    got, want = ops.error_feedback(*args), reference.error_feedback(*args)
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def moments(k: int, groups: int) -> Tensor:
    """Of inputs that resemble their neighbours, float64."""
    distance = torch.arange(k)[:, None] - torch.arange(k)
    smooth = 0.9 ** distance.abs().double()
    size = torch.rand(groups, k, dtype=torch.float64) + 0.5
    return size[:, :, None] * smooth * size[:, None]


def factorised(moment: Tensor, order: Tensor) -> Tensor:
    ordered = torch.stack([m[o][:, o] for m, o in zip(moment, order, strict=True)])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return torch.linalg.cholesky(inverse, upper=True).float()


def output_error(x: Tensor, rounded: Tensor, moment: Tensor) -> Tensor:
    """e H e^T of every row."""
    e = (x - rounded).double().reshape(len(moment), -1, x.shape[1])
    return torch.einsum("gnk,gkl,gnl->gn", e, moment, e).flatten()


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    packed = reference.pack_bits(codes, bits)
    return reference.dequantize_packed(packed, scale, zero_point, bits, codes.shape[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_equal_the_oracle(isa: str, bits: int, granularity: str) -> None:
    for n, k, groups in SHAPES:
        for shuffled in (False, True):
            check(*arguments(n, k, groups, bits, granularity, shuffled=shuffled))
    check(*arguments(9, 40, 1, bits, granularity, shuffled=True, far=True))


@pytest.mark.parametrize("groups", [1, 3])
def test_any_number_of_threads(isa: str, threads: Callable[[int], None], groups: int) -> None:
    """Large enough that every thread gets rows of its own."""
    args = arguments(300, 260, groups, 4, "per-group", shuffled=True)
    for count in (1, 2, 3):
        threads(count)
        check(*args)


def test_levels_agree(isa: str) -> None:
    if isa == "scalar":
        pytest.skip("the one that the others are compared with")
    order = torch.stack([torch.randperm(200) for _ in range(2)])
    scale, zero_point = qparams(150, 4, 3)
    factor = factorised(moments(200, 2), order)
    args = torch.randn(150, 200), scale, zero_point, 3, factor, order
    codes, error = ops.error_feedback(*args)
    ops.set_isa("scalar")  # the fixture takes it back
    expected = ops.error_feedback(*args)
    assert torch.equal(codes, expected[0])
    assert torch.equal(error, expected[1])


@pytest.mark.parametrize("n,k", [(0, 5), (3, 0), (0, 0)])
def test_of_nothing(isa: str, n: int, k: int) -> None:
    for groups in (1, 3):
        args = arguments(n, k, groups, 4, "per-channel", shuffled=False)
        codes, error = ops.error_feedback(*args)
        assert codes.shape == (n, k)
        assert error.tolist() == [0.0] * n


def test_non_contiguous_inputs(isa: str) -> None:
    x, scale, zero_point, bits, factor, order = arguments(33, 36, 3, 4, "per-group", shuffled=True)
    check(
        x.T.contiguous().T,
        scale.T.contiguous().T,
        torch.stack([zero_point, zero_point], 2)[..., 0],
        bits,
        factor.mT.contiguous().mT,
        order.T.contiguous().T,
    )
    check(x, *qparams(1, 1, bits), bits, factor[:1].expand(3, 36, 36), order[:1].expand(3, 36))


def test_without_correlation_it_rounds_to_nearest(isa: str) -> None:
    scale, zero_point = qparams(33, 1, 4)
    x, eye = torch.randn(33, 70), torch.eye(70)[None]
    rounded, nearest = ops.fake_quantize(x, scale, zero_point, 4, codes=True)
    codes, error = ops.error_feedback(x, scale, zero_point, 4, eye, torch.randperm(70)[None])
    assert torch.equal(codes, nearest)
    torch.testing.assert_close(error, (x - rounded).double().square().sum(1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3, 48])
def test_error_is_that_of_the_result(isa: str, bits: int, groups: int) -> None:
    n, k = 48, 90
    x, moment = torch.randn(n, k), moments(k, groups)
    order = torch.stack([torch.randperm(k) for _ in range(groups)])
    scale = x.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    zero_point = torch.full((n, 1), 2 ** (bits - 1), dtype=torch.int32)
    factor = factorised(moment, order)
    codes, error = ops.error_feedback(x, scale, zero_point, bits, factor, order)
    want = output_error(x, dequantize(codes, scale, zero_point, bits), moment)
    torch.testing.assert_close(error, want, rtol=1e-3, atol=0)
    nearest = output_error(x, ops.fake_quantize(x, scale, zero_point, bits), moment)
    assert error.sum() < 0.5 * nearest.sum()


@pytest.mark.parametrize("value,code", [(torch.nan, 0), (torch.inf, 15), (-torch.inf, 0)])
def test_rows_do_not_see_each_other(isa: str, value: float, code: int) -> None:
    args = arguments(40, 50, 1, 4, "per-channel", shuffled=False)
    want, want_error = ops.error_feedback(*args)
    x = args[0].clone()
    x[3, 10] = value
    codes, error = ops.error_feedback(x, *args[1:])
    others = torch.arange(40) != 3
    assert torch.equal(codes[others], want[others])
    assert torch.equal(error[others], want_error[others])
    assert torch.equal(codes[3, :10], want[3, :10])
    assert codes[3, 10] == code
    assert not error[3].isfinite()
