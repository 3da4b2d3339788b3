"""Weight quantizers: the specification, the choice of scale and zero-point, and what they cost in bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import ops

__all__ = [
    "FLOAT16_MAX",
    "FLOAT16_MIN_NORMAL",
    "SUPPORTED_BITS",
    "QParams",
    "QuantSpec",
    "better_of",
    "candidate_qparams",
    "check_bits",
    "choose_qparams",
    "make_qparams",
    "packed_bytes",
    "weight_bits",
    "zero_point_bits",
]

SUPPORTED_BITS = range(2, 9)


def check_bits(name: str, bits: Any) -> None:
    """Raise ValueError unless an argument is None or a width of codes."""
    if bits is not None and not _is_width(bits):
        raise ValueError(f"{name} must be None or 2..8, got {bits!r}")


def _is_width(bits: Any) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and bits in SUPPORTED_BITS


Granularity = Literal["per_tensor", "per_channel", "per_group"]
Clip = Literal["minmax", "ksigma", "mse"]
Rounding = Literal["gptq", "nearest"]

# A zero-point beyond 2**24 is not an exact float32 integer, so the kernels could not subtract it exactly.
_MAX_ZERO_POINT = 2**23
FLOAT16_MIN_NORMAL = 2.0**-14
FLOAT16_MAX = 65504.0
# Beyond it a code's value could overflow float32.
_MAX_MAGNITUDE = 1e37
# Shares of the full range that clip="mse" tries, largest first: ties keep the wider range.
_MSE_SHARES = [1.0 - 0.0125 * i for i in range(57)] + [0.3 * 0.93**i for i in range(1, 25)]
_BLOCK = 2**20  # errors, of all groups and candidates, measured at once, to bound memory


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a layer's weight is quantized.

    Args:
        bits: width of a code, 2..8.
        granularity: which weights share a scale: the whole tensor, an output channel, or `group_size`
            neighbours of a row of the weight seen as a matrix [Cout, Cin/groups * kh * kw].
        group_size: weights a group, for "per_group" only; must divide the length of a row.
        symmetric: the range is symmetric around zero and no zero-point is stored.
        clip: how the range is found: "minmax", "ksigma" (mean -+ k standard deviations, never wider
            than min and max), or "mse" (the share of the range with the least squared error).
        k: standard deviations for clip="ksigma".
        rounding: "gptq" rounds column by column and passes each column's error on to the next, for the
            least error at the layer's output (needs the second moment of the layer's input, else it is
            "nearest"); clip="mse" is then the range with the least such error.

    Raises:
        ValueError: a field out of range, naming the field, what was expected and what came.

    Example:
        >>> QuantSpec(bits=3, granularity="per_group", group_size=32)
    """

    bits: int = 4
    granularity: Granularity = "per_channel"
    group_size: int | None = None
    symmetric: bool = False
    clip: Clip = "mse"
    k: float = 3.0
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        if not _is_width(self.bits):
            raise ValueError(f"QuantSpec: bits must be an integer 2..8, got {self.bits!r}")
        for field, names in (
            ("granularity", Granularity),
            ("clip", Clip),
            ("rounding", Rounding),
        ):
            value, allowed = getattr(self, field), get_args(names)
            if value not in allowed:
                raise ValueError(
                    f"QuantSpec: {field} must be one of {', '.join(allowed)}, got {value!r}"
                )
        if self.granularity == "per_group":
            size = self.group_size
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"QuantSpec: group_size must be a positive integer for per_group, got {size!r}"
                )
        elif self.group_size is not None:
            raise ValueError(
                f"QuantSpec: group_size goes with granularity='per_group', got {self.group_size!r} "
                f"with {self.granularity!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"QuantSpec: symmetric must be True or False, got {self.symmetric!r}")
        if not isinstance(self.k, (int, float)) or not 0 < self.k < float("inf"):
            raise ValueError(f"QuantSpec: k must be a positive number, got {self.k!r}")

    @property
    def needs_moment(self) -> bool:
        """Whether rounding takes the second moment of the layer's input."""
        return self.rounding == "gptq"

    def groups_of(self, columns: int, layer: str = "weight") -> int:
        """Scales along a row of `columns` weights (1 unless per_group).

        Raises:
            ValueError: group_size does not divide `columns`.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise ValueError(
                f"{layer}: group_size must divide the {columns} weights of an output channel, "
                f"got {self.group_size}; choose a divisor, or name the layer in skip"
            )
        return columns // self.group_size

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class QParams:
    """Scale and zero-point of a weight matrix [N, K]: What = scale * (code - zero_point).

    Args:
        scale: float32 [R, G], R = 1 or N and G = 1 or K / group_size; exactly representable in `scale_dtype`.
        zero_point: int32 [R, G].
        bits: width of a code.
        scale_dtype: what the scale is stored as: float16, or float32 where float16 could not hold it.
        symmetric: the zero-point is 2**(bits - 1) everywhere and is not stored.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    scale_dtype: torch.dtype
    symmetric: bool


def _grouped(weight: Tensor, spec: QuantSpec, layer: str) -> Tensor:
    """The matrix [N, K] seen as [R, G, weights that share a scale]."""
    if spec.granularity == "per_tensor":
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], spec.groups_of(weight.shape[1], layer), -1)


def _scale_and_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero-point whose grid spans [low, high], before the scale is rounded for storage."""
    levels = 2**spec.bits - 1
    if spec.symmetric:
        half = 2 ** (spec.bits - 1)
        scale = torch.maximum(-low / half, high / (half - 1))
        return scale, torch.full_like(scale, half)
    # The floor keeps the zero-point of a narrow range far from zero within exact float32 integers.
    scale = torch.maximum(
        (high - low) / levels, torch.maximum(low.abs(), high.abs()) / _MAX_ZERO_POINT
    )
    return scale, torch.zeros_like(scale)


def _round_scale(scale: Tensor) -> Tensor:
    """To float16 where it is in float16's normal range; other values stay float32."""
    fits = (scale >= FLOAT16_MIN_NORMAL) & (scale <= FLOAT16_MAX)
    return torch.where(fits, scale.clamp(max=FLOAT16_MAX).half().float(), scale)


def _finish(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Stored scale and zero-point for [low, high]; the zero-point follows the rounded scale."""
    scale, zero = _scale_and_zero(low, high, spec)
    scale = _round_scale(torch.where(scale > 0, scale, torch.ones_like(scale)))
    if not spec.symmetric:
        zero = torch.round(-low / scale)
    return scale, zero


def _checked(weight: Tensor, layer: str) -> Tensor:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"{layer}: weight must be a non-empty matrix, got shape {list(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{layer}: weight must be finite, got NaN or inf")
    weight = weight.float().contiguous()
    if float(weight.abs().max()) > _MAX_MAGNITUDE:
        raise ValueError(
            f"{layer}: weight must be at most {_MAX_MAGNITUDE:g} in magnitude, "
            f"got {float(weight.abs().max()):g}"
        )
    return weight


def candidate_qparams(
    weight: Tensor, spec: QuantSpec, shares: Sequence[float], layer: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Quantizers whose range is a share of a weight's, shrunk towards its mean.

    Args:
        weight: float32 [N, K].
        shares: of the full range, in (0, 1].

    Returns:
        Scales float32 and zero-points int32, both [shares, R, G]; a constant group has the same
        exact one at every share.

    Raises:
        ValueError: as `choose_qparams`.
    """
    groups = _grouped(_checked(weight, layer), spec, layer)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    value, constant = low.clone(), low == high
    if spec.clip == "ksigma":
        mean, std = groups.mean(-1, keepdim=True), groups.std(-1, correction=0, keepdim=True)
        low = torch.maximum(low, mean - spec.k * std)
        high = torch.minimum(high, mean + spec.k * std)
    # Towards the mean, so that a range without 0 shrinks sensibly too.
    mean = torch.zeros_like(low) if spec.symmetric else groups.mean(-1, keepdim=True)
    scales, zeros = [], []
    for share in shares:
        start, end = low, high
        if share != 1:
            start, end = mean + share * (low - mean), mean + share * (high - mean)
        scale, zero = _finish(start, end, spec)
        # A constant c is one step away from zero: scale |c| makes it exact, and 0 is exact with any.
        one = torch.ones_like(value)
        scale = torch.where(constant, torch.where(value == 0, one, value.abs()), scale)
        if not spec.symmetric:
            zero = torch.where(constant, (value < 0).float(), zero)
        scales.append(scale.squeeze(-1))
        zeros.append(zero.squeeze(-1).to(torch.int32))
    return torch.stack(scales), torch.stack(zeros)


def make_qparams(scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> QParams:
    """Chosen scales and zero-points [R, G] with the type they are stored in."""
    exact = bool((scale == scale.half().float()).all()) and float(scale.min()) >= FLOAT16_MIN_NORMAL
    return QParams(
        scale.contiguous(),
        zero_point.contiguous(),
        spec.bits,
        torch.float16 if exact else torch.float32,
        spec.symmetric,
    )


def choose_qparams(weight: Tensor, spec: QuantSpec, layer: str = "weight") -> QParams:
    """Scale and zero-point of a weight that is rounded to nearest.

    A range need not hold 0, constant groups (all zero ones too) are represented exactly, and the
    scale is rounded to its stored precision before the zero-point is taken, so that what is stored
    is what was chosen.

    Args:
        weight: float32 [N, K].
        spec: bits, granularity and clip.
        layer: name for error messages.

    Raises:
        ValueError: the weight is not finite, is empty, or group_size does not divide K.
    """
    weight = _checked(weight, layer)
    if spec.clip != "mse":
        scales, zeros = candidate_qparams(weight, spec, [1.0], layer)
        return make_qparams(scales[0], zeros[0], spec)
    count = _grouped(weight, spec, layer)[..., 0].numel()
    at_once = max(1, _BLOCK // count)
    best: tuple[Tensor, ...] | None = None
    for start in range(0, len(_MSE_SHARES), at_once):
        scales, zeros = candidate_qparams(weight, spec, _MSE_SHARES[start : start + at_once], layer)
        for found in zip(
            ops.quantization_error(weight, scales, zeros, spec.bits), scales, zeros, strict=True
        ):
            best = found if best is None else better_of(found, best)
    assert best is not None
    return make_qparams(best[1], best[2], spec)


def better_of(found: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Element by element the one with the smaller first tensor; of equal ones the best so far."""
    better = found[0] < best[0]  # broadcasts: one error may stand for a whole row
    return tuple(torch.where(better, a, b) for a, b in zip(found, best, strict=True))


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of `rows` packed rows of `columns` codes; a row is padded to a whole byte."""
    return rows * ((columns * bits + 7) // 8)


def zero_point_bits(zero_point: Tensor, bits: int, symmetric: bool) -> int:
    """Stored width of one zero-point: 0 if symmetric, `bits` if all are codes, else 8, 16 or 32.

    Only `bits` stands for unsigned values: 8-bit codes whose zero-points lie outside take 16.
    """
    if symmetric:
        return 0
    low, high = int(zero_point.min()), int(zero_point.max())
    if low >= 0 and high < 2**bits:
        return bits
    widths = (width for width in (8, 16, 32) if width > bits)
    return next(w for w in widths if -(2 ** (w - 1)) <= low and high < 2 ** (w - 1))


def weight_bits(rows: int, columns: int, qparams: QParams) -> int:
    """Stored bits of a quantized weight [rows, columns]: codes, scales and zero-points as in the file."""
    width = zero_point_bits(qparams.zero_point, qparams.bits, qparams.symmetric)
    count = qparams.scale.numel()
    packed_zero = (
        width == qparams.bits
    )  # zero-points that fit a code are packed like codes, in one row
    zero = 8 * packed_bytes(1, count, width) if packed_zero else width * count
    scale = count * qparams.scale_dtype.itemsize * 8
    return 8 * packed_bytes(rows, columns, qparams.bits) + scale + zero
