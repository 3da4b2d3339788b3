"""Weights as matrices, and the low-rank adapters that carry part of the quantization residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .quantizer import packed_bytes

__all__ = [
    "ADAPTER_BITS",
    "Adapter",
    "FloatLayer",
    "LayerShape",
    "check_adapter_bits",
    "factors",
    "fold",
    "quantize_adapter",
    "rank_bits",
    "rounded_factors",
    "truncate",
    "unfold",
]

# A Linear or convolution: torch gives them no common type that has weight, groups and kernel_size.
FloatLayer = Any

ADAPTER_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)


def check_adapter_bits(bits: Any) -> None:
    """Raise ValueError unless an argument is a width of adapters' elements."""
    if bits not in ADAPTER_BITS:
        raise ValueError(
            f"adapter_bits must be one of {', '.join(map(str, ADAPTER_BITS))}, got {bits!r}"
        )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer's weight as `groups` matrices of `rows / groups` x `columns`.

    Args:
        rows: output channels N, over all groups.
        columns: inputs a row K = Cin / groups * kernel elements.
        groups: independent matrices; group g owns rows g * N/groups .. (g+1) * N/groups - 1.
    """

    rows: int
    columns: int
    groups: int

    @property
    def full_rank(self) -> int:
        """Largest useful rank of an adapter: min(rows of a group, columns)."""
        return min(self.rows // self.groups, self.columns)

    @staticmethod
    def of(layer: FloatLayer) -> LayerShape:
        """The shape of a Linear or (transposed) convolution layer's weight matrix."""
        weight = layer.weight
        groups = getattr(layer, "groups", 1)
        rows = weight.shape[1] * groups if getattr(layer, "transposed", False) else weight.shape[0]
        return LayerShape(rows, weight.numel() // rows, groups)


def unfold(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """A layer's weight as a matrix [N, K], K in the order (input channel, kernel position).

    Args:
        weight: [N, Cin/groups, *kernel], or for a transposed convolution [Cin, N/groups, *kernel].
    """
    if transposed:
        inputs, outputs, *kernel = weight.shape
        weight = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
        weight = weight.reshape(groups * outputs, inputs // groups, *kernel)
    return weight.reshape(weight.shape[0], -1)


def fold(matrix: Tensor, shape: torch.Size, transposed: bool = False, groups: int = 1) -> Tensor:
    """The inverse of `unfold`: a matrix [N, K] as a weight of `shape`."""
    if not transposed:
        return matrix.reshape(shape)
    inputs, outputs, *kernel = shape
    weight = matrix.reshape(groups, outputs, inputs // groups, *kernel).transpose(1, 2)
    return weight.reshape(shape)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank term B @ diag(scale) @ A of a weight matrix, as it is stored and run.

    Args:
        a: [groups * r, K]; int8 codes, or float16 / float32.
        b: [N, r], same dtype; the rows of group g meet the r rows of A that belong to group g.
        scale: float32 [groups * r] for int8 codes, else None.
        bits: stored bits of an element of A and B.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None
    bits: int

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def matrix(self) -> Tensor:
        """The product as float32 [N, K]."""
        a, b = self.a.float(), self.b.float()
        if self.scale is not None:
            a = a * self.scale[:, None]
        groups = a.shape[0] // max(self.rank, 1)
        if self.rank == 0:
            return a.new_zeros(b.shape[0], a.shape[1])
        a = a.reshape(groups, self.rank, -1)
        b = b.reshape(groups, -1, self.rank)
        return (b @ a).reshape(-1, a.shape[-1])


def rank_bits(shape: LayerShape, bits: int) -> int:
    """Stored bits of one unit of rank: a row of A per group, a column of B, and their scale."""
    a = 8 * packed_bytes(shape.groups, shape.columns, bits)
    b = 8 * packed_bytes(1, shape.rows, bits)
    return a + b + (32 * shape.groups if bits <= 8 else 0)


def truncate(a: Tensor, b: Tensor, rank: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The leading `rank` terms of factors A [groups * R, K] and B [N, R]."""
    full = b.shape[1]
    kept = a.reshape(groups, full, a.shape[1])[:, :rank].reshape(groups * rank, a.shape[1])
    return kept, b[:, :rank].contiguous()


def quantize_adapter(a: Tensor, b: Tensor, bits: int, groups: int = 1) -> Adapter:
    """Store float factors at `bits`: symmetric codes with one scale a rank up to 8 bits, else float.

    Each row of A and each column of B has its own largest magnitude on the code grid; their two
    steps multiply into the one scale a rank that is kept.

    Args:
        a: float32 [groups * r, K].
        b: float32 [N, r].
        bits: 2..8, 16 (float16) or 32 (float32).
    """
    check_adapter_bits(bits)
    rank = b.shape[1]
    if rank == 0 or bits == 32:
        kind = {16: torch.float16, 32: torch.float32}.get(bits, torch.int8)
        scale = a.new_zeros(0) if bits <= 8 else None
        return Adapter(a.to(kind).contiguous(), b.to(kind).contiguous(), scale, bits)
    if bits == 16:
        # A power of two a rank brings both factors to one magnitude, far from float16's limits.
        grouped_b = b.reshape(groups, -1, rank)
        ratio = grouped_b.abs().amax(1).reshape(-1) / a.abs().amax(1)
        shift = (
            torch.where((ratio > 0) & torch.isfinite(ratio), ratio, 1.0)
            .log2()
            .div(2)
            .round()
            .exp2()
        )
        a, grouped_b = a * shift[:, None], grouped_b / shift.reshape(groups, 1, rank)
        return Adapter(a.half(), grouped_b.reshape(b.shape).half(), None, bits)
    codes_a, step_a, codes_b, step_b = _factor_codes(a, b, bits, groups)
    scale = step_a * step_b.reshape(-1)
    return Adapter(codes_a.to(torch.int8), codes_b.reshape(b.shape).to(torch.int8), scale, bits)


def rounded_factors(a: Tensor, b: Tensor, bits: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The factors that `quantize_adapter` stores, as float32 of the same magnitudes as given."""
    if bits == 32:
        return a, b
    if bits == 16:
        return a.half().float(), b.half().float()
    codes_a, step_a, codes_b, step_b = _factor_codes(a, b, bits, groups)
    return codes_a * step_a[:, None], (codes_b * step_b[:, None]).reshape(b.shape)


def _factor_codes(
    a: Tensor, b: Tensor, bits: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of A [groups * r, K] with steps [groups * r], of B [groups, N/groups, r] with [groups, r]."""
    grouped_b = b.reshape(groups, -1, b.shape[1])
    largest = 2 ** (bits - 1) - 1
    step_a, step_b = _step(a.abs().amax(1), largest), _step(grouped_b.abs().amax(1), largest)
    codes_a = torch.round(a / step_a[:, None]).clamp_(-largest, largest)
    codes_b = torch.round(grouped_b / step_b[:, None]).clamp_(-largest, largest)
    return codes_a, step_a, codes_b, step_b


def _step(largest_magnitude: Tensor, largest_code: int) -> Tensor:
    """Size of a code step; 1 for a zero row, whose codes are all zero."""
    step = largest_magnitude / largest_code
    return torch.where(step > 0, step, torch.ones_like(step))


def factors(
    residual: Tensor, groups: int = 1, moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Full-rank factors of a residual, the best approximation at every truncation.

    Args:
        residual: float32 [N, K].
        moment: the input's regularised second moment [groups or 1, K, K]: the error is then measured at
            the layer's output, ||(R - B A) Sxx^(1/2)||; without it, on the weights (the paper's SVD).

    Returns:
        A [groups * R, K], B [N, R] and the singular values [groups, R], largest first.
    """
    rows, columns = residual.shape
    return ops.lowrank_factors(residual, min(rows // groups, columns), groups, moment)
