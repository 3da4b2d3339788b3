"""Packed layers called with all their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._checks import (
    Pair,
    check,
    check_dtype,
    check_float,
    check_operands,
    check_packed,
    check_window,
    image_layout,
    pair,
)
from ._gradients import no_gradient

__all__ = ["conv2d_lowrank", "linear_lowrank"]


def linear_lowrank(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    a: Tensor | None = None,
    b: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_bits: int = 0,
) -> Tensor:
    """``x What^T + ((x A^T) * adapter_scale) B^T + bias`` on a packed weight, the adapter fused.

    With ``x_bits`` > 0 the input is quantised first and weight and adapter see the same codes:
    static with x_scale and x_zero_point (codes ``clamp(rint(x / x_scale) + x_zero_point, 0,
    2**x_bits - 1)``), dynamic without (each row from its range min(x, 0)..max(x, 0)). Sums of codes
    are then exact integers within a scale group. :func:`run_layer`, which this is on a layer
    prepared for the call, says in which order the float steps follow and where results agree bit
    for bit.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        weight: uint8 [N, ceil(K * bits / 8)], packed codes.
        scale: float32 [R, G].
        zero_point: int32 [R, G].
        bits: 2..8.
        a: int8, float16, bfloat16 or float32 [r, K], or None.
        b: a's dtype [N, r], or None with a.
        adapter_scale: float32 [r] with an int8 adapter, else None.
        bias: float32 [N] or None.
        x_scale: float32, one element, or None.
        x_zero_point: int32, one element in 0..2**x_bits - 1, or None with x_scale.
        x_bits: 0 (float input) or 2..8.

    Returns:
        x's dtype [..., N].
    """
    return _native.ops.linear_lowrank.default(
        x, weight, scale, zero_point, bits, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits
    )


def _check_layer(
    op: str,
    x: Tensor,
    n: Any,
    k: Any,
    groups: int,
    a: Tensor | None,
    b: Tensor | None,
    adapter_scale: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_bits: int,
) -> None:
    check_float(op, "x", x)
    check_operands(op, n, k, groups, a, b, adapter_scale, bias)
    check(x_bits == 0 or 2 <= x_bits <= 8, op, f"x_bits must be 0 or 2..8, got {x_bits}")
    both = (x_scale is None) == (x_zero_point is None)
    check(both, op, "x_scale and x_zero_point must be given together")
    if x_scale is not None and x_zero_point is not None:
        check(x_bits > 0, op, "x_scale must be None when x_bits is 0")
        check_dtype(op, "x_scale", x_scale, torch.float32)
        check_dtype(op, "x_zero_point", x_zero_point, torch.int32)
        for name, t in (("x_scale", x_scale), ("x_zero_point", x_zero_point)):
            check(t.numel() == 1, op, f"{name} must have 1 element, got shape {list(t.shape)}")


@torch.library.register_fake("cora::linear_lowrank")
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    a: Tensor | None,
    b: Tensor | None,
    adapter_scale: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_bits: int,
) -> Tensor:
    op = "linear_lowrank"
    check(x.dim() >= 1, op, "x must have at least 1 dimension, got shape []")
    k = x.shape[-1]
    check_packed(op, "weight", weight, scale, zero_point, bits, k)
    n = weight.shape[0]
    _check_layer(op, x, n, k, 1, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits)
    return x.new_empty([*x.shape[:-1], n])


def conv2d_lowrank(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    a: Tensor | None = None,
    b: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_bits: int = 0,
) -> Tensor:
    """``conv(x, What) + conv1x1(conv(x, A) * adapter_scale, B) + bias`` on a packed weight, one
    call.

    Padded positions are the real value 0. A grouped layer has r components a group: rows
    [g * r, (g+1) * r) of a, and b's rows of group g apply to those. Quantised input and the order
    of the float steps are as in :func:`linear_lowrank`, dynamic ranges being taken per image.

    Args:
        x: float32, float16 or bfloat16 [batch, channels, H, W], contiguous or channels_last.
        weight: uint8 [N, ceil(K * bits / 8)], K = channels / groups * kh * kw.
        scale: float32 [R, G].
        zero_point: int32 [R, G].
        bits: 2..8.
        kernel_size, stride, padding, dilation: one int, or (vertical, horizontal).
        groups: divisor of channels and N.
        a: int8, float16, bfloat16 or float32 [groups * r, K], or None.
        b: a's dtype [N, r], or None with a.
        adapter_scale: float32 [groups * r] with an int8 adapter, else None.
        bias: float32 [N] or None.
        x_scale: float32, one element, or None.
        x_zero_point: int32, one element in 0..2**x_bits - 1, or None with x_scale.
        x_bits: 0 (float input) or 2..8.

    Returns:
        x's dtype and memory format [batch, N, H', W'].
    """
    return _native.ops.conv2d_lowrank.default(
        x,
        weight,
        scale,
        zero_point,
        bits,
        pair(kernel_size),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        a,
        b,
        adapter_scale,
        bias,
        x_scale,
        x_zero_point,
        x_bits,
    )


@torch.library.register_fake("cora::conv2d_lowrank")
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    a: Tensor | None,
    b: Tensor | None,
    adapter_scale: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_bits: int,
) -> Tensor:
    op = "conv2d_lowrank"
    check(x.dim() == 4, op, f"x must have 4 dimensions, got shape {list(x.shape)}")
    check_window(op, kernel_size, stride, padding, dilation)
    channels = x.shape[1]
    divides = groups >= 1 and channels % groups == 0
    check(divides, op, f"groups must divide the {channels} channels, got {groups}")
    k = channels // groups * kernel_size[0] * kernel_size[1]
    check_packed(op, "weight", weight, scale, zero_point, bits, k)
    n = weight.shape[0]
    check(n % groups == 0, op, f"groups must divide the {n} rows of weight, got {groups}")
    _check_layer(op, x, n, k, groups, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits)
    size = []
    for d in range(2):
        reach = dilation[d] * (kernel_size[d] - 1) + 1
        padded = x.shape[2 + d] + 2 * padding[d]
        what = f"x's padded height and width must be at least {reach} along dimension {2 + d}"
        check(padded >= reach, op, f"{what}, got {padded}")
        size.append((padded - reach) // stride[d] + 1)
    shape, layout = [x.shape[0], n, *size], image_layout(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


no_gradient("linear_lowrank")
no_gradient("conv2d_lowrank")
