"""Packed layers by other codes, which run faster when a model is fused.

*Merged.* An adapter costs a layer the more the fewer output channels it has: A's rows are computed a vector
at a time, whatever the rank, and B's part once an output. Where a layer's weight is small, that costs more
time than 8-bit codes of What + B A cost memory. Their steps are a seventeenth of those of 4 bits.

*Evenly padded.* Kernels pad both sides alike. What TensorFlow's "same" pads, one more after than before, is
the same with the larger amount on both sides and a kernel that is wider by a row or column of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .lowrank import LayerShape, quantize_adapter
from .modules import QuantConv2d, QuantLayer, QuantWeight
from .quantizer import QuantSpec, choose_qparams
from .rounding import Feedback

__all__ = ["evenly_padded", "is_worth_merging", "merged", "merging_is_faster"]

_Layer = TypeVar("_Layer", bound=QuantLayer)

_MAX_BITS = 5  # of more the merged codes' rounding would be felt
# Weights of a merged layer: beyond, reading them takes nearly as long as the adapter (measured on
# ResNet-18 and ResNet-50, one image and eight), and they take more memory than that is worth.
_MAX_WEIGHTS = 2**18
_MIN_POSITIONS = 32  # fewer use each weight too seldom for its reading not to count
# Of neighbouring pixels of a channel: what is known of inputs without looking at them. ResNet-20 with
# 3-bit layers and adapters: KL 0.0194 unmerged, 0.0207 rounded to nearest, 0.0196 with it.
_CORRELATION = 0.5


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


def merged(layer: _Layer) -> _Layer:
    """A layer of 8-bit codes, one scale an output channel, no adapter, of the same weight but for rounding.

    Args:
        layer: the packed layer, which stays as it is.
    """
    return _restated(layer, _merged_weight(layer), layer)


def evenly_padded(layer: QuantConv2d, sides: Sequence[tuple[int, int]]) -> QuantConv2d | None:
    """A layer of the same results that pads by the larger amount on both sides; None if its codes cannot say so.

    Args:
        layer: the packed layer, which stays as it is; its own padding is not looked at.
        sides: zeros to pad by before and after, vertically and horizontally.
    """
    packed = layer.packed_weight()
    qparams, zero = packed.qparams, packed.qparams.zero_point
    uneven = [before != after for before, after in sides]
    if any(u and d != 1 for u, d in zip(uneven, layer.dilation, strict=True)):
        return None
    if qparams.scale.shape[1] > 1 or int(zero.min()) < 0 or int(zero.max()) >= 2**qparams.bits:
        return None  # no code of theirs is a zero
    padding = [max(side) for side in sides]
    wider = [
        p - amount
        for p, side in reversed(list(zip(padding, sides, strict=True)))
        for amount in side
    ]

    channels = packed.shape.columns // math.prod(layer.kernel_size)

    def widened(rows: Tensor) -> Tensor:
        kernels = F.pad(rows.reshape(-1, *layer.kernel_size), wider)
        return kernels.reshape(len(rows), channels * kernels.shape[1:].numel())

    codes = ops.unpack_bits(packed.codes, qparams.bits, packed.shape.columns)
    codes = (widened(codes.int() - zero) + zero).to(torch.uint8)
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0] + wider[2] + wider[3], layer.kernel_size[1] + wider[0] + wider[1]),
        _pair(layer.stride),
        _pair(padding),
        _pair(layer.dilation),
        layer.groups,
        device="meta",
    )
    weight = QuantWeight(
        ops.pack_bits(codes, qparams.bits),
        qparams,
        replace(packed.adapter, a=widened(packed.adapter.a)),
        LayerShape(packed.shape.rows, codes.shape[1], packed.shape.groups),
    )
    return _restated(layer, weight, conv)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _restated(layer: _Layer, weight: QuantWeight, shaped: QuantLayer | nn.Conv2d) -> _Layer:
    """A layer with the geometry of `shaped` and all that `layer` has beside its weight."""
    shape = shaped.weight_shape if isinstance(shaped, QuantLayer) else shaped.weight.shape
    like = SimpleNamespace(
        **{name: getattr(shaped, name) for name in layer._geometry},
        weight=torch.empty(shape, device="meta"),
        bias=layer.bias,
    )
    result = type(layer)(like, weight, layer.activation_bits)
    if layer.x_scale is not None and layer.x_zero_point is not None:
        result.set_activation_range(layer.x_scale, layer.x_zero_point)
    if layer.y_scale is not None and layer.y_zero_point is not None:
        result.set_output_range(layer.y_scale, layer.y_zero_point)
    result.float_bias = layer.float_bias
    return result.train(layer.training)


def _merged_weight(layer: QuantLayer) -> QuantWeight:
    """8-bit codes of a layer's weight, an error passed on among the weights of a channel."""
    shape, taps = layer.shape, math.prod(getattr(layer, "kernel_size", ()))
    matrix = layer.matrix()
    qparams = choose_qparams(matrix, QuantSpec(bits=8, symmetric=True, clip="minmax"))
    moment = _CORRELATION + (1 - _CORRELATION) * torch.eye(taps, device=matrix.device)
    feedback = Feedback.of(moment[None])
    codes, _ = ops.error_feedback(
        matrix.reshape(-1, taps),
        qparams.scale.repeat_interleave(shape.columns // taps, 0),
        qparams.zero_point.repeat_interleave(shape.columns // taps, 0),
        8,
        feedback.factor,
        feedback.order,
    )
    a, b = matrix.new_zeros(0, shape.columns), matrix.new_zeros(shape.rows, 0)
    adapter = quantize_adapter(a, b, 8, shape.groups)
    return QuantWeight(codes.reshape(shape.rows, shape.columns), qparams, adapter, shape)
