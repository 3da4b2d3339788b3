"""From a weight matrix to codes: which quantizer, and each weight up or down.

Rounding to nearest has the least error of the weights; with the second moment of the layer's input, error
feedback has the least error that a left-to-right pass finds at the layer's output, and descent over the codes
goes on from there to one that no change of a single code improves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .quantizer import (
    SUPPORTED_BITS,
    QParams,
    QuantSpec,
    better_of,
    candidate_qparams,
    choose_qparams,
    make_qparams,
    zero_point_bits,
)

__all__ = ["Feedback", "Rounded", "descend", "quantize_matrix"]

# Shares of the full range tried with clip="mse": coarser than for nearest rounding, whose errors are exact,
# because the later columns' corrections make up for a step that is a little too wide or narrow.
# The fewer the levels, the more of the range may go.
_SHARES = {bits: [1.0 - 0.05 * i for i in range(max(5, 17 - 2 * bits))] for bits in SUPPORTED_BITS}
_DAMPING = (
    0.01  # of the mean diagonal, so that weakly seen columns do not take unbounded corrections
)
_SWEEPS = 3  # of descent over the codes; a fourth moves next to nothing
_COLUMNS = 64  # whose gradients are kept up to date one by one; the others follow in one product


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantized weight matrix [N, K].

    Args:
        qparams: its quantizer.
        codes: uint8 [N, K], not packed.
        dequantized: float32 [N, K].
    """

    qparams: QParams
    codes: Tensor
    dequantized: Tensor

    def packed(self) -> Tensor:
        """The codes as stored: uint8 [N, ceil(K * bits / 8)]."""
        return ops.pack_bits(self.codes, self.qparams.bits)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What error feedback needs to know of a layer's input, computed once for any number of quantizers.

    Columns are rounded in the order of falling second moment: what is seen most has the most columns
    left to correct it.

    Args:
        factor: float32 [groups, K, K], see `ops.error_feedback`.
        order: int64 [groups, K].
        seen: mean square of each column's input, [groups, K].
    """

    factor: Tensor
    order: Tensor
    seen: Tensor

    @staticmethod
    def of(moment: Tensor) -> Feedback:
        """From the input's second moment [groups, K, K], positive semidefinite."""
        seen = moment.diagonal(dim1=-2, dim2=-1)
        order = seen.argsort(dim=-1, descending=True, stable=True)
        rows = order[:, :, None].expand(moment.shape)
        ordered = _damped(moment).gather(1, rows).gather(2, rows.mT)
        # H = L L^T in reversed order gives the Cholesky factor of H^-1 without inverting H itself.
        lower = torch.linalg.cholesky(ordered.flip(-1, -2))
        eye = torch.eye(moment.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye.expand(lower.shape), upper=False)
        return Feedback(inverse.flip(-1, -2).float().contiguous(), order.contiguous(), seen)


def _damped(moment: Tensor) -> Tensor:
    """A second moment that every column is seen in: float64 [groups, K, K]."""
    damped = moment.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    damping = _DAMPING * diagonal.mean(-1)
    diagonal.add_(torch.where(damping > 0, damping, torch.ones_like(damping))[:, None])
    return damped


def quantize_matrix(
    matrix: Tensor,
    spec: QuantSpec,
    layer: str = "weight",
    feedback: Feedback | None = None,
    every: int = 1,
    whole: bool = True,
) -> Rounded:
    """Quantize a weight matrix.

    Args:
        matrix: float32 [N, K].
        spec: the quantizer.
        layer: name for error messages.
        feedback: of the layer's input, for spec.rounding "gptq"; None rounds to nearest.
        every: of a matrix with one group error feedback tries the quantizers on one in so many rows only; each of
            the others gets the one that most of those have chosen.
        whole: round those others too; else `codes` and `dequantized` are the rows that were tried.

    Raises:
        ValueError: non-finite weight, group_size that does not divide K.
    """
    if not spec.needs_moment or feedback is None:
        qparams = choose_qparams(matrix, spec, layer)
        dequantized, codes = ops.fake_quantize(
            matrix, qparams.scale, qparams.zero_point, spec.bits, codes=True
        )
        return Rounded(qparams, codes, dequantized)
    matrix = matrix.float().contiguous()
    scales, zeros = candidate_qparams(
        matrix, spec, _SHARES[spec.bits] if spec.clip == "mse" else [1.0], layer
    )
    if spec.granularity == "per_group" and len(scales) > 1:
        # A group's error depends on the other groups' choices, too many to try: each takes its own best, or all
        # groups of a row the same share of their range. Neighbouring shares differ little.
        own = _best_by_group(matrix, spec, feedback.seen, scales, zeros)
        # Groups of nearly equal weights have zero-points far off: no share may widen how they are stored.
        stored_as = zero_point_bits(own[1], spec.bits, spec.symmetric)
        near = [
            i
            for i in range(0, len(zeros), 2)
            if zero_point_bits(zeros[i], spec.bits, spec.symmetric) <= stored_as
        ]
        scales, zeros = torch.cat([own[0], scales[near]]), torch.cat([own[1], zeros[near]])
    tried = matrix[::every].contiguous()
    best: tuple[Tensor, ...] | None = None
    for index, (scale, zero) in enumerate(zip(scales[:, ::every], zeros[:, ::every], strict=True)):
        codes, error = ops.error_feedback(
            tried, scale, zero, spec.bits, feedback.factor, feedback.order
        )
        if len(scale) == 1:  # all rows share a scale, so they must agree
            error = error.sum().expand(len(error))
        found = (error[:, None], codes, torch.full((len(tried), 1), index))
        best = found if best is None else better_of(found, best)
    assert best is not None
    _, codes, chosen = best
    if scales.shape[1] == 1:
        scale, zero = scales[chosen[0, 0]], zeros[chosen[0, 0]]
    else:
        picks = chosen.mode(dim=0).values.repeat(len(matrix))
        picks[::every] = chosen[:, 0]
        scale, zero = (t[picks, torch.arange(len(matrix))] for t in (scales, zeros))
    qparams = make_qparams(scale, zero, spec)
    if whole and every > 1:
        codes, _ = ops.error_feedback(
            matrix, scale, zero, spec.bits, feedback.factor, feedback.order
        )
    elif len(scale) > 1:
        scale, zero = scale[::every], zero[::every]
    return Rounded(qparams, codes, _dequantized(codes, scale, zero))


def descend(rounded: Rounded, matrix: Tensor, moment: Tensor) -> Rounded:
    """Codes changed one by one, each to the best while all others stay: coordinate descent of the error.

    A pass from left to right never comes back to a code whose error later columns could not make up for.
    Scales and zero-points stay.

    Args:
        rounded: where to start.
        matrix: what was quantized, float32 [N, K].
        moment: of the layer's input, float32 [groups, K, K]; damped as for error feedback.

    Returns:
        A matrix with at most the error trace(E H E^T) of `rounded`, E = matrix - dequantized, H the
        damped moment.
    """
    qparams, groups = rounded.qparams, len(moment)
    columns = matrix.shape[1]
    curvature = _damped(moment)

    def by_column(value: Tensor) -> Tensor:
        wide = value.double().repeat_interleave(columns // value.shape[1], 1)
        return wide.expand(matrix.shape).reshape(groups, -1, columns)

    scale, zero = by_column(qparams.scale), by_column(qparams.zero_point)
    codes = by_column(rounded.codes).clone()
    gradient = (by_column(matrix) - scale * (codes - zero)) @ curvature
    for _ in range(_SWEEPS):
        moved = False
        for start in range(0, columns, _COLUMNS):
            block = slice(start, start + _COLUMNS)
            old, step, inner = codes[:, :, block], scale[:, :, block], curvature[:, block, block]
            new = ops.descend_codes(old, gradient[:, :, block], step, inner, qparams.bits)
            change = step * (new - old)
            if change.any():
                codes[:, :, block] = new
                gradient -= change @ curvature[:, block]
                moved = True
        if not moved:
            break
    codes = codes.reshape(matrix.shape)
    dequantized = _dequantized(codes, qparams.scale, qparams.zero_point)
    return replace(rounded, codes=codes.to(torch.uint8), dequantized=dequantized)


def _dequantized(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of codes [N, K] with scales and zero-points [1 or N, G]: float32 [N, K]."""
    grouped = codes.reshape(len(codes), scale.shape[1], -1).float()
    return (scale[:, :, None] * (grouped - zero[:, :, None].float())).reshape(codes.shape)


def _best_by_group(
    matrix: Tensor, spec: QuantSpec, seen: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """The candidate of each scale group with the least error of nearest rounding, weights counted by how
    much their input is seen: both [1, R, G]."""
    best: tuple[Tensor, ...] | None = None
    for scale, zero in zip(scales, zeros, strict=True):
        _, residual = ops.fake_quantize(matrix, scale, zero, spec.bits, residual=True)
        weighted = residual.square_().reshape(len(seen), -1, matrix.shape[1]) * seen[:, None]
        error = weighted.reshape(*scale.shape, -1).sum(-1)
        found = (error, scale, zero)
        best = found if best is None else better_of(found, best)
    assert best is not None
    return best[1][None], best[2][None]
