"""Low-rank factors of a residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import gpu
from . import _native
from ._checks import (
    check,
    check_bits,
    check_dtype,
    check_qparams,
    dtype_name,
    matrix_shape,
    row_bytes,
)
from .packing import pack_bits
from .quantize import fake_quantize

__all__ = ["lowrank_factors", "residual_svd_init"]


def lowrank_factors(
    residual: Tensor, rank: int, groups: int = 1, moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r approximation ``B @ A`` of each group's rows of a residual, optionally weighted.

    Minimises ``||(residual_g - B_g A_g) moment^(1/2)||_F``; without moment, plain. Computed from
    the Gram matrix of the smaller side and its eigenvectors, in float64 where that is cheap; B and
    A share the singular values evenly (unweighted: B = U sqrt(S), A = sqrt(S) V^T). Each
    component's sign is fixed by making the entry of U largest in magnitude positive. Of large
    matrices, singular values beyond ``rank`` are good to a thousandth of the largest.

    Args:
        residual: float32 [N, K].
        rank: 0..min(N / groups, K).
        groups: divisor of N; rows [g * N/groups, (g+1) * N/groups) are group g.
        moment: float32 or float64 [groups or 1, K, K], symmetric and positive definite: the second
            moment E[x x^T] of the layer's (unfolded) input.

    Returns:
        a float32 [groups * rank, K], b float32 [N, rank], singular values of the (weighted)
        residual, float32 [groups, min(N / groups, K)], descending.

    Source: CoRa, arXiv 2408.00923, sec. 3; the weighting: QERA, arXiv 2410.06040.
    """
    return _native.ops.lowrank_factors.default(residual, rank, groups, moment)


def _check_lowrank(
    op: str,
    name: str,
    n: Any,
    k: Any,
    matrix: Tensor,
    rank: int,
    groups: int,
    moment: Tensor | None,
) -> None:
    check_dtype(op, name, matrix, torch.float32)
    check(groups >= 1 and n % groups == 0, op, f"groups must divide the {n} rows, got {groups}")
    most = min(n // groups, k)
    check(0 <= rank <= most, op, f"rank must be 0..{most}, got {rank}")
    if moment is not None:
        fits = moment.dtype in (torch.float32, torch.float64)
        check(fits, op, f"moment must have dtype float32 or float64, got {dtype_name(moment)}")
        fits = moment.dim() == 3 and (moment.shape[0] == 1 or moment.shape[0] == groups)
        fits = fits and moment.shape[1] == k and moment.shape[2] == k
        first = "1" if groups == 1 else f"1 or {groups}"
        check(fits, op, f"moment must have shape [{first}, {k}, {k}], got {list(moment.shape)}")


@torch.library.register_fake("cora::lowrank_factors")
def _(
    residual: Tensor, rank: int, groups: int, moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    op = "lowrank_factors"
    check(
        residual.dim() == 2,
        op,
        f"residual must have 2 dimensions, got shape {list(residual.shape)}",
    )
    n, k = residual.shape
    _check_lowrank(op, "residual", n, k, residual, rank, groups, moment)
    return (
        residual.new_empty([groups * rank, k]),
        residual.new_empty([n, rank]),
        residual.new_empty([groups, min(n // groups, k)]),
    )


def residual_svd_init(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int = 1,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantise a weight and fit its adapter to what was lost, in one call.

    Args:
        weight: float32 [N, ...], seen as [N, K].
        scale: float32 [R, G].
        zero_point: int32 [R, G].
        bits: 2..8.
        rank, groups, moment: as in :func:`lowrank_factors`.

    Returns:
        packed uint8 [N, ceil(K * bits / 8)], a float32 [groups * rank, K], b float32 [N, rank],
        singular values float32 [groups, min(N / groups, K)], residual float32 [N, K] (before the
        adapter).
    """
    return _native.ops.residual_svd_init.default(
        weight, scale, zero_point, bits, rank, groups, moment
    )


@torch.library.register_fake("cora::residual_svd_init")
def _(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int,
    moment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "residual_svd_init"
    check(
        weight.dim() >= 2,
        op,
        f"weight must have 2 or more dimensions, got shape {list(weight.shape)}",
    )
    n, k = matrix_shape(weight)
    _check_lowrank(op, "weight", n, k, weight, rank, groups, moment)
    check_bits(op, bits)
    check_qparams(op, scale, zero_point, n, k)
    return (
        weight.new_empty([n, row_bytes(k, bits)], dtype=torch.uint8),
        weight.new_empty([groups * rank, k]),
        weight.new_empty([n, rank]),
        weight.new_empty([groups, min(n // groups, k)]),
        weight.new_empty([n, k]),
    )


def _residual_svd_init_cuda(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int,
    moment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = matrix_shape(weight)
    matrix = weight.reshape(n, k)
    _check_lowrank("residual_svd_init", "weight", n, k, matrix, rank, groups, moment)
    _, residual, codes = fake_quantize(matrix, scale, zero_point, bits, residual=True, codes=True)
    a, b, values = gpu.lowrank_factors(residual, rank, groups, moment)
    return pack_bits(codes, bits), a, b, values, residual


def _lowrank_factors_cuda(
    residual: Tensor, rank: int, groups: int, moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = residual.shape
    _check_lowrank("lowrank_factors", "residual", n, k, residual, rank, groups, moment)
    return gpu.lowrank_factors(residual, rank, groups, moment)


torch.library.register_kernel("cora::lowrank_factors", "cuda", _lowrank_factors_cuda)
torch.library.register_kernel("cora::residual_svd_init", "cuda", _residual_svd_init_cuda)
