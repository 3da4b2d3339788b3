"""Activations as uint8 codes, and what works on them as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import gpu
from . import _native
from ._checks import Pair, check, check_bits, check_dtype, check_float, check_window, pair

__all__ = [
    "dequantize_activation",
    "max_pool2d_codes",
    "mean_codes",
    "mean_pixels",
    "quantize_activation",
]


def quantize_activation(
    x: Tensor, scale: float, zero_point: int, bits: int = 8, halo: int = 0
) -> Tensor:
    """Codes of an activation, as quantized layers hand them to each other.

    ``q = clamp(rint(x / scale) + zero_point, 0, 2**bits - 1)``, rounding half to even after a true
    division; a NaN takes code 0.

    Args:
        x: float32, float16 or bfloat16; an image [batch, channels, H, W] or any other shape.
        scale: finite and > 0; rounded to float32.
        zero_point: 0..2**bits - 1.
        bits: 2..8.
        halo: pixels around each image that get the code ``zero_point``, so that a convolution with
            at most this padding reads the codes in place; 0 unless x is an image.

    Returns:
        uint8 channels_last [batch, channels, H + 2 * halo, W + 2 * halo], or of x's shape.
    """
    return _native.ops.quantize_activation.default(x, scale, zero_point, bits, halo)


def dequantize_activation(codes: Tensor, scale: float, zero_point: int, halo: int = 0) -> Tensor:
    """``scale * (code - zero_point)`` without the halo: float32, an image channels_last.

    Args:
        codes: uint8, an image channels_last [batch, channels, H, W] or any other shape.
        scale: finite and > 0; rounded to float32.
        zero_point: 0..255.
        halo: pixels around each image of codes; 0 unless codes are images.
    """
    return _native.ops.dequantize_activation.default(codes, scale, zero_point, halo)


def _check_activation(op: str, t: Tensor, name: str, zero_point: int, bits: int, halo: int) -> None:
    check_bits(op, bits)
    top = 2**bits - 1
    check(0 <= zero_point <= top, op, f"zero_point must be 0..{top}, got {zero_point}")
    check(halo >= 0, op, f"halo must be >= 0, got {halo}")
    what = f"{name} must have 4 dimensions for a halo, got shape {list(t.shape)}"
    check(halo == 0 or t.dim() == 4, op, what)


def _new_activation(t: Tensor, border: int, dtype: torch.dtype) -> Tensor:
    if t.dim() != 4:
        return t.new_empty(t.shape, dtype=dtype)
    shape = [*t.shape[:2], t.shape[2] + 2 * border, t.shape[3] + 2 * border]
    return torch.empty(shape, dtype=dtype, device=t.device, memory_format=torch.channels_last)


@torch.library.register_fake("cora::quantize_activation")
def _(x: Tensor, scale: float, zero_point: int, bits: int, halo: int) -> Tensor:
    op = "quantize_activation"
    check_float(op, "x", x)
    check(0 < scale < math.inf, op, f"scale must be finite and > 0, got {scale}")
    _check_activation(op, x, "x", zero_point, bits, halo)
    return _new_activation(x, halo, torch.uint8)


@torch.library.register_fake("cora::dequantize_activation")
def _(codes: Tensor, scale: float, zero_point: int, halo: int) -> Tensor:
    op = "dequantize_activation"
    check_dtype(op, "codes", codes, torch.uint8)
    check(0 < scale < math.inf, op, f"scale must be finite and > 0, got {scale}")
    _check_activation(op, codes, "codes", zero_point, 8, halo)
    if codes.dim() == 4:
        what = f"codes must hold the border of {halo} pixels, got shape {list(codes.shape)}"
        check(codes.shape[2] >= 2 * halo and codes.shape[3] >= 2 * halo, op, what)
    return _new_activation(codes, -halo, torch.float32)


def max_pool2d_codes(
    x: Tensor,
    zero_point: int,
    x_halo: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    out_halo: int = 0,
) -> Tensor:
    """``torch.nn.functional.max_pool2d`` of codes; borders and padding are never the maximum.

    Args:
        x: uint8 channels_last [batch, channels, H + 2 * x_halo, W + 2 * x_halo].
        zero_point: 0..255, what borders hold.
        x_halo, out_halo: pixels around each image of x and of the result.
        kernel_size, stride, padding, dilation: one int, or (vertical, horizontal).
        ceil_mode: a last window may hang over the end.

    Returns:
        uint8 channels_last [batch, channels, H' + 2 * out_halo, W' + 2 * out_halo].
    """
    pairs = (pair(v) for v in (kernel_size, stride, padding, dilation))
    return _native.ops.max_pool2d_codes.default(x, zero_point, x_halo, *pairs, ceil_mode, out_halo)


def mean_codes(x: Tensor, scale: float, zero_point: int, x_halo: int = 0) -> Tensor:
    """Mean of ``scale * (code - zero_point)`` over height and width.

    Args:
        x: uint8 channels_last [batch, channels, H + 2 * x_halo, W + 2 * x_halo].
        scale: finite and > 0; rounded to float32.
        zero_point: 0..255.
        x_halo: pixels around each image.

    Returns:
        float32 [batch, channels].
    """
    return _native.ops.mean_codes.default(x, scale, zero_point, x_halo)


def mean_pixels(x: Tensor) -> Tensor:
    """Mean over height and width, summed in float64 (by torch on a GPU).

    Args:
        x: float32, float16 or bfloat16 [batch, channels, H, W].

    Returns:
        [batch, channels], of x's dtype.
    """
    return _native.ops.mean_pixels.default(x)


def _check_image(op: str, x: Tensor, zero_point: int, halo: int) -> None:
    check_dtype(op, "x", x, torch.uint8)
    check(x.dim() == 4, op, f"x must have 4 dimensions, got shape {list(x.shape)}")
    check(0 <= zero_point <= 255, op, f"zero_point must be 0..255, got {zero_point}")
    check(halo >= 0, op, f"halo must be >= 0, got {halo}")
    what = f"x must hold pixels inside a border of {halo}, got shape {list(x.shape)}"
    check(x.shape[2] > 2 * halo, op, what)
    check(x.shape[3] > 2 * halo, op, what)


@torch.library.register_fake("cora::max_pool2d_codes")
def _(
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
    op = "max_pool2d_codes"
    _check_image(op, x, zero_point, x_halo)
    check(out_halo >= 0, op, f"out_halo must be >= 0, got {out_halo}")
    check_window(op, kernel_size, stride, padding, dilation)
    size = []
    for d in range(2):
        half = f"padding must be at most half of kernel_size, got {padding[d]} and {kernel_size[d]}"
        check(2 * padding[d] <= kernel_size[d], op, half)
        pixels = x.shape[2 + d] - 2 * x_halo
        reach = dilation[d] * (kernel_size[d] - 1) + 1
        room = pixels + 2 * padding[d] - reach + (stride[d] - 1 if ceil_mode else 0)
        what = f"x must be at least as large as a window along dimension {2 + d}, got {pixels}"
        check(room >= 0, op, what)
        count = room // stride[d] + 1
        if ceil_mode and (count - 1) * stride[d] >= pixels + padding[d]:
            count -= 1
        size.append(count)
    shape = [*x.shape[:2], size[0] + 2 * out_halo, size[1] + 2 * out_halo]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("cora::mean_codes")
def _(x: Tensor, scale: float, zero_point: int, x_halo: int) -> Tensor:
    op = "mean_codes"
    _check_image(op, x, zero_point, x_halo)
    check(0 < scale < math.inf, op, f"scale must be finite and > 0, got {scale}")
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("cora::mean_pixels")
def _(x: Tensor) -> Tensor:
    op = "mean_pixels"
    check_float(op, "x", x)
    check(x.dim() == 4, op, f"x must have 4 dimensions, got shape {list(x.shape)}")
    check(x.shape[2] > 0 and x.shape[3] > 0, op, f"x must hold pixels, got shape {list(x.shape)}")
    return x.new_empty(x.shape[:2])


torch.library.register_kernel("cora::max_pool2d_codes", "cuda", gpu.max_pool2d_codes)
torch.library.register_kernel("cora::mean_codes", "cuda", gpu.mean_codes)
torch.library.register_kernel("cora::mean_pixels", "cuda", gpu.mean_pixels)
