"""Layers whose low-rank adapter is merged into their codes, for speed.

An adapter costs a layer the more the fewer output channels it has: A's rows are computed a vector at a
time, whatever the rank, and B's part once an output. Where a layer's weight is small, that costs more
time than 8-bit codes of What + B A cost memory. Rounding a 4-bit weight's sum to them adds 0.4 % to the
squared error that its own rounding left, as their steps are a seventeenth of its.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import ops
from .lowrank import unfold
from .modules import QuantLayer, quantize_weight
from .quantizer import QuantSpec

__all__ = ["is_worth_merging", "merged", "merging_is_faster"]

_MAX_BITS = 5  # of more the merged codes' rounding would be felt
# Weights of a merged layer: beyond, reading them takes as long as the adapter (measured on ResNet-18
# and ResNet-50, one image and eight).
_MAX_WEIGHTS = 640 * 1024
_MIN_POSITIONS = 32  # fewer use each weight too seldom for its reading not to count


def merging_is_faster() -> bool:
    """Whether this CPU multiplies 8-bit weights as fast as narrow ones: AVX2 does not."""
    return ops.isa()["level"] != "avx2"


def is_worth_merging(layer: QuantLayer, shape: Sequence[int]) -> bool:
    """Whether a layer with quantized inputs has something to merge, and is small and busy enough.

    Args:
        layer: the packed layer.
        shape: of its output, [B, N, ...] or, of a linear one, [..., N].
    """
    rows, columns = layer.shape.rows, layer.shape.columns
    return (
        layer.activation_bits is not None
        and layer.bits <= _MAX_BITS
        and (layer.rank > 0 or layer.scale.shape[1] > 1)
        and rows * columns <= _MAX_WEIGHTS
        and math.prod(shape) >= _MIN_POSITIONS * rows
    )


def merged(layer: QuantLayer) -> QuantLayer:
    """A layer of 8-bit codes, one scale an output channel, no adapter, of the same weight but for rounding.

    Args:
        layer: the packed layer, which stays as it is.
    """
    transposed = getattr(layer, "transposed", False)
    matrix = unfold(layer.weight, transposed, layer.shape.groups)
    spec = QuantSpec(bits=8, symmetric=True, clip="minmax", rounding="nearest")
    plain = layer.to_float()
    result = type(layer)(plain, quantize_weight(matrix, layer.shape, spec), layer.activation_bits)
    if layer.x_scale is not None and layer.x_zero_point is not None:
        result.set_activation_range(layer.x_scale, layer.x_zero_point)
    if layer.y_scale is not None and layer.y_zero_point is not None:
        result.set_output_range(layer.y_scale, layer.y_zero_point)
    result.float_bias = layer.float_bias
    return result.train(layer.training)
