"""The door to the native code: one typed function per op, fake kernel and gradient beside it.

A *weight* is a matrix [N, K]: one row per output channel, a convolution's [Cout, Cin/groups, kh,
kw] flattened in that order. Its codes are unsigned, ``bits`` wide (2..8), packed row by row into
whole bytes (docs/packed_layout.md). ``scale`` float32 and ``zero_point`` int32 are both [R, G]: R =
1 or N, G = 1 or K / group_size, and stand for ``scale * (code - zero_point)``. A zero-point may lie
outside the range of the codes; its magnitude must stay below 2**24.

Every function raises ``RuntimeError`` ("cora::<op>: <argument> must ..., got ...") for a bad
tensor, in eager mode and when traced.
"""

from ._native import isa, set_isa
from .activation import (
    dequantize_activation,
    max_pool2d_codes,
    mean_codes,
    mean_pixels,
    quantize_activation,
)
from .lowrank import lowrank_factors, residual_svd_init
from .packed_layers import conv2d_lowrank, linear_lowrank
from .packing import dequantize_packed, pack_bits, unpack_bits
from .prepared_layers import layer_geometry, prepare_layer, run_layer
from .quantize import (
    descend_codes,
    error_feedback,
    fake_quantize,
    fake_quantize_out,
    quantization_error,
)

__all__ = [
    "conv2d_lowrank",
    "dequantize_activation",
    "dequantize_packed",
    "descend_codes",
    "error_feedback",
    "fake_quantize",
    "fake_quantize_out",
    "isa",
    "layer_geometry",
    "linear_lowrank",
    "lowrank_factors",
    "max_pool2d_codes",
    "mean_codes",
    "mean_pixels",
    "pack_bits",
    "prepare_layer",
    "quantization_error",
    "quantize_activation",
    "residual_svd_init",
    "run_layer",
    "set_isa",
    "unpack_bits",
]
