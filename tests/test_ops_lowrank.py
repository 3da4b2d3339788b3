"""Low-rank factors: optimal, balanced, deterministic; weighted by an input second moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cora import ops, reference

# n, k, groups: wide, tall, square, grouped both ways, depthwise, vectors
SHAPES = [
    (8, 27, 1),
    (40, 9, 1),
    (24, 24, 1),
    (12, 30, 3),
    (30, 4, 3),
    (6, 9, 6),
    (1, 5, 1),
    (5, 1, 1),
]


def second_moment(groups: int, k: int) -> Tensor:
    x = torch.randn(groups, 2 * k + 1, k)
    return x.transpose(1, 2) @ x / x.shape[1] + 0.01 * torch.eye(k)


def product(a: Tensor, b: Tensor, groups: int) -> Tensor:
    (n, rank), k = b.shape, a.shape[1]
    return (b.reshape(groups, n // groups, rank) @ a.reshape(groups, rank, k)).reshape(n, k)


@pytest.mark.parametrize("n,k,groups", SHAPES)
@pytest.mark.parametrize("weighting", ["plain", "shared", "per-group"])
def test_equals_svd(n: int, k: int, groups: int, weighting: str) -> None:
    residual = torch.randn(n, k)
    moment = {"plain": None, "shared": second_moment(1, k), "per-group": second_moment(groups, k)}[
        weighting
    ]
    full = min(n // groups, k)
    for rank in sorted({0, 1, full // 2, full}):
        a, b, values = ops.lowrank_factors(residual, rank, groups, moment)
        a_ref, b_ref, values_ref = reference.lowrank_factors(residual, rank, groups, moment)
        torch.testing.assert_close(values, values_ref, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            product(a, b, groups), product(a_ref, b_ref, groups), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(a, a_ref, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b, b_ref, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n,k,groups", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_reproduces_the_residual(n: int, k: int, groups: int, weighted: bool) -> None:
    residual = torch.randn(n, k)
    moment = second_moment(1, k).double() if weighted else None
    a, b, _ = ops.lowrank_factors(residual, min(n // groups, k), groups, moment)
    torch.testing.assert_close(product(a, b, groups), residual, rtol=1e-5, atol=1e-5)


# Small, and large enough for float32: wide, tall.
@pytest.mark.parametrize("n,k", [(64, 300), (520, 610), (610, 520)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_captures_the_optimal_energy(threads, n: int, k: int, weighted: bool, count: int) -> None:
    threads(count)
    residual, moment, root = torch.randn(n, k), None, torch.eye(k, dtype=torch.float64)
    if weighted:
        x = torch.randn(3 * k, k) * torch.logspace(0, -1.5, k)
        moment = (x.T @ x / len(x))[None]
        root = torch.linalg.cholesky(moment[0].double())
    best = torch.linalg.svdvals(residual.double() @ root)
    for rank in (8, min(n, k)):
        a, b, values = ops.lowrank_factors(residual, rank, 1, moment)
        assert (values.diff() <= 0).all()
        left = ((residual - b @ a).double() @ root).square().sum()
        energy = best.square().sum()
        assert abs((energy - left) / best[:rank].square().sum() - 1) < 1e-6
        torch.testing.assert_close(values[0, :8].double(), best[:8], rtol=1e-5, atol=0)
        torch.testing.assert_close(values[0].double(), best, rtol=0, atol=1e-3 * float(best[0]))
    torch.testing.assert_close(b @ a, residual, rtol=0, atol=1e-4)


def test_weighting_beats_plain_in_its_own_norm() -> None:
    residual, moment = torch.randn(20, 40), second_moment(1, 40)
    moment[0] *= torch.linspace(0.01, 10, 40).sqrt()[:, None] * torch.linspace(0.01, 10, 40).sqrt()

    def error(a: Tensor, b: Tensor) -> float:
        rest = residual - b @ a
        return float((rest @ moment[0] @ rest.T).trace())

    assert error(*ops.lowrank_factors(residual, 4, 1, moment)[:2]) < 0.9 * error(
        *ops.lowrank_factors(residual, 4)[:2]
    )


def test_balanced_and_signed() -> None:
    a, b, values = ops.lowrank_factors(torch.randn(10, 30), 5)
    torch.testing.assert_close(a.norm(dim=1), values[0, :5].sqrt())
    torch.testing.assert_close(b.norm(dim=0), values[0, :5].sqrt())
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("n,k", [(6, 9), (9, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_zero_and_deficient_residuals(n: int, k: int, weighted: bool) -> None:
    moment = second_moment(1, k) if weighted else None
    a, b, values = ops.lowrank_factors(torch.zeros(n, k), 3, 1, moment)
    assert not a.any() and not b.any() and not values.any()
    residual = torch.randn(n, 1) @ torch.randn(1, k)
    a, b, _ = ops.lowrank_factors(residual, 4, 1, moment)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(b @ a, residual, rtol=1e-4, atol=1e-5)


def test_indefinite_moment_falls_back() -> None:
    """Rounding can leave a second moment slightly indefinite: no Cholesky factor, still an
    answer."""
    x = torch.randn(3, 5)
    moment = (x.T @ x - 1e-6 * torch.eye(5))[None]
    a, b, _ = ops.lowrank_factors(torch.randn(9, 5), 2, 1, moment)
    assert a.isfinite().all() and b.isfinite().all()


def test_same_for_any_thread_count(threads) -> None:
    for n, k in ((64, 200), (700, 900)):
        residual, results = torch.randn(n, 8) @ torch.randn(8, k) + 0.1 * torch.randn(n, k), []
        for count in (1, 2):
            threads(count)
            a, b, values = ops.lowrank_factors(residual, 8)
            results.append((a, b, values[:, :8]))
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_residual_svd_init(isa: str, bits: int, groups: int) -> None:
    weight = torch.randn(8, 3, 3, 3) * 0.1
    scale, zero_point = (
        torch.full((8, 3), 0.5 / 2**bits),
        torch.full((8, 3), 2 ** (bits - 1), dtype=torch.int32),
    )
    moment = second_moment(groups, 27)
    got = ops.residual_svd_init(weight, scale, zero_point, bits, 2, groups, moment)
    want = reference.residual_svd_init(weight, scale, zero_point, bits, 2, groups, moment)
    assert torch.equal(got[0], want[0]) and torch.equal(got[4], want[4])
    for actual, expected in zip(got[1:4], want[1:4], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    restored = ops.dequantize_packed(got[0], scale, zero_point, bits, 27) + got[4]
    torch.testing.assert_close(restored, weight.reshape(8, 27))
