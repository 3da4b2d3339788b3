"""Ops that torch's own GPU operators answer well: the CUDA side of what has no kernel of ours.

Plain torch on tensors of any device, which is how the tests run them without a GPU; `ops` registers
them for CUDA. Documentation is in `ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "descend_codes",
    "error_feedback",
    "lowrank_factors",
    "max_pool2d_codes",
    "mean_codes",
    "mean_pixels",
    "quantization_error",
]

_COLUMNS = 128  # rounded between two products of error_feedback


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """M with M M^T = moment and its inverse, by eigenvectors: a Cholesky factorisation would have to
    be asked whether it failed, and the answer waited for."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-14 * values[:, -1:]).clamp_min(1e-300).sqrt()
    return vectors * values[:, None, :], (vectors / values[:, None, :]).mT


def lowrank_factors(
    residual: Tensor, rank: int, groups: int, moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix of the smaller side and its eigenvectors, float64, all groups in one batch.

    GPUs made for computing do float64 at half their float32 speed; squaring then costs nothing
    (singular values are good to 1e-8 of the largest).
    """
    n, k = residual.shape[0] // groups, residual.shape[1]
    d = min(n, k)
    if d == 0:
        return (
            residual.new_zeros(groups * rank, k),
            residual.new_zeros(groups * n, rank),
            residual.new_zeros(groups, d),
        )
    r = residual.reshape(groups, n, k).double()
    sxx = None if moment is None else moment.double()
    if n <= k:  # (R M)(R M)^T = R Sxx R^T -> U; A = S^-1/2 U^T R
        gram = (r if sxx is None else r @ sxx) @ r.mT
        values, vectors = torch.linalg.eigh(gram)
        left = vectors.flip(2)[:, :, :rank]
        right = left.mT @ r
        power = -0.5
    else:  # (R M)^T (R M) -> V; U S = R M V; A = S^1/2 V^T M^-1
        root, inverse = (None, None) if sxx is None else _root(sxx)
        weighted = r if root is None else r @ root
        values, vectors = torch.linalg.eigh(weighted.mT @ weighted)
        basis = vectors.flip(2)[:, :, :rank]
        left = weighted @ basis
        right = basis.mT if inverse is None else basis.mT @ inverse
        power = 0.5
    s = values.flip(1).clamp_min(0).sqrt()
    top = s[:, :rank]
    # Below 1e-12 of the largest there is nothing but the rounding of an exact zero.
    kept = (top > s[:, :1] * 1e-12) & (top >= 1e-30)
    sign = left.gather(1, left.abs().argmax(1, keepdim=True)).sign()
    safe = torch.where(kept, top, torch.ones_like(top))
    zero = torch.zeros_like(top)
    left = left * sign * torch.where(kept, safe**-power, zero)[:, None, :]
    right = right * sign.mT * torch.where(kept, safe**power, zero)[:, :, None]
    return (
        right.reshape(groups * rank, k).float(),
        left.reshape(groups * n, rank).float(),
        s.float(),
    )


def quantization_error(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Candidate by candidate: a batch of them would hold the weight many times over."""
    n, k = x.shape
    errors = []
    for s, z in zip(scale, zero_point, strict=True):
        grouped = x.reshape(n, s.shape[1], -1)
        q = ((grouped / s[:, :, None]).round() + z[:, :, None]).clamp(0, 2**bits - 1)
        error = (grouped - s[:, :, None] * (q - z[:, :, None])).double().square().sum(2)
        errors.append(error if s.shape[0] == n else error.sum(0, keepdim=True))
    return torch.stack(errors) if errors else scale.new_zeros(scale.shape, dtype=torch.float64)


def error_feedback(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """By blocks of columns, all groups at once: a block's errors reach the columns after it in one
    product."""
    n, k = x.shape
    groups = len(factor)

    def in_order(values: Tensor) -> Tensor:
        grouped = values.expand(n, k).reshape(groups, n // groups, k)
        return grouped.gather(2, order[:, None].expand(grouped.shape))

    w = in_order(x).clone()
    run = k // scale.shape[1]
    s = in_order(scale.repeat_interleave(run, 1))
    z = in_order(zero_point.to(x.dtype).repeat_interleave(run, 1))
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, k, _COLUMNS):
        end = min(start + _COLUMNS, k)
        for i in range(start, end):
            q = ((w[..., i] / s[..., i]).round() + z[..., i]).clamp(0, 2**bits - 1)
            error = (w[..., i] - s[..., i] * (q - z[..., i])) / factor[:, i, i, None]
            w[..., i + 1 : end] -= error[..., None] * factor[:, None, i, i + 1 : end]
            codes[..., i], errors[..., i] = q, error
        w[..., end:] -= errors[..., start:end] @ factor[:, start:end, end:]
    result = torch.empty_like(codes).scatter_(2, order[:, None].expand(codes.shape), codes)
    return result.reshape(n, k).to(torch.uint8), errors.double().square().sum(2).reshape(n)


def descend_codes(
    codes: Tensor, gradient: Tensor, scale: Tensor, curvature: Tensor, bits: int
) -> Tensor:
    """Column by column, all rows and groups at once."""
    codes, gradient = codes.clone(), gradient.clone()
    for k in range(codes.shape[2]):
        step = gradient[:, :, k] / (scale[:, :, k] * curvature[:, k, k, None])
        now = (codes[:, :, k] + step).round().nan_to_num(nan=0.0).clamp(0, 2**bits - 1)
        change = scale[:, :, k] * (now - codes[:, :, k])
        codes[:, :, k] = now
        gradient[:, :, k + 1 :] -= change[:, :, None] * curvature[:, None, k, k + 1 :]
    return codes


def _inner(codes: Tensor, halo: int) -> Tensor:
    height, width = codes.shape[2:]
    return codes[:, :, halo : height - halo, halo : width - halo]


def max_pool2d_codes(
    x: Tensor,
    zero_point: int,
    x_halo: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    out_halo: int,
) -> Tensor:
    """As float16, which holds 0..255."""
    image = _inner(x, x_halo).half()
    pooled = F.max_pool2d(image, kernel_size, stride, padding, dilation, ceil_mode).to(torch.uint8)
    bordered = F.pad(pooled, (out_halo,) * 4, value=zero_point)
    return bordered.contiguous(memory_format=torch.channels_last)


def mean_codes(x: Tensor, scale: float, zero_point: int, x_halo: int) -> Tensor:
    """The sum of codes is exact."""
    inner = _inner(x, x_halo)
    pixels = inner.shape[2] * inner.shape[3]
    total = inner.sum((2, 3), dtype=torch.int64) - zero_point * pixels
    unit = float(torch.tensor(scale, dtype=torch.float32)) / pixels
    return (total.double() * unit).float()


def mean_pixels(x: Tensor) -> Tensor:
    return x.mean((2, 3))
