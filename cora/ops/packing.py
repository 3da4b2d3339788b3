"""Codes in whole bytes: docs/packed_layout.md."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._checks import check, check_bits, check_dtype, check_packed, row_bytes

__all__ = ["dequantize_packed", "pack_bits", "unpack_bits"]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into the layout of docs/packed_layout.md.

    Args:
        codes: uint8 [..., K], each at most 2**bits - 1.
        bits: 2..8.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    return _native.ops.pack_bits.default(codes, bits)


@torch.library.register_fake("cora::pack_bits")
def _(codes: Tensor, bits: int) -> Tensor:
    op = "pack_bits"
    check_bits(op, bits)
    check_dtype(op, "codes", codes, torch.uint8)
    check(codes.dim() >= 1, op, "codes must have at least 1 dimension, got shape []")
    return codes.new_empty([*codes.shape[:-1], row_bytes(codes.shape[-1], bits)])


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        packed: uint8 [..., ceil(k * bits / 8)].
        bits: 2..8.
        k: codes of a row.

    Returns:
        uint8 [..., k].
    """
    return _native.ops.unpack_bits.default(packed, bits, k)


@torch.library.register_fake("cora::unpack_bits")
def _(packed: Tensor, bits: int, k: int) -> Tensor:
    op = "unpack_bits"
    check_bits(op, bits)
    check_dtype(op, "packed", packed, torch.uint8)
    check(k >= 0, op, f"k must be >= 0, got {k}")
    check(packed.dim() >= 1, op, "packed must have at least 1 dimension, got shape []")
    size = row_bytes(k, bits)
    what = f"last dimension {size} for k = {k} and {bits} bits"
    check(packed.shape[-1] == size, op, f"packed must have {what}, got shape {list(packed.shape)}")
    return packed.new_empty([*packed.shape[:-1], k])


def dequantize_packed(
    packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, k: int
) -> Tensor:
    """``scale * (code - zero_point)`` of a packed weight.

    Args:
        packed: uint8 [N, ceil(k * bits / 8)].
        scale: float32 [R, G].
        zero_point: int32 [R, G].
        bits: 2..8.
        k: columns of the weight matrix.

    Returns:
        float32 [N, k].
    """
    return _native.ops.dequantize_packed.default(packed, scale, zero_point, bits, k)


@torch.library.register_fake("cora::dequantize_packed")
def _(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, k: int) -> Tensor:
    check_packed("dequantize_packed", "packed", packed, scale, zero_point, bits, k)
    return packed.new_empty([packed.shape[0], k], dtype=torch.float32)
