"""Packed layers prepared once for many calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._checks import (
    FLOATS,
    Pair,
    check,
    check_operands,
    check_packed,
    check_shape,
    check_window,
    dtype_name,
    image_layout,
    pair,
)
from ._gradients import NoGradient

__all__ = ["layer_geometry", "prepare_layer", "run_layer"]


def prepare_layer(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    channels: int,
    kernel_size: Pair = (),
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    a: Tensor | None = None,
    b: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Put a packed layer into the order the kernels read; :func:`run_layer` takes the result.

    The weight keeps its bits; the order is the same on every CPU level, but belongs to the device
    and to this version: it is not for files.

    Args:
        codes: uint8 [N, ceil(K * bits / 8)].
        scale, zero_point: float32 and int32 [R, G].
        bits: 2..8.
        channels: of the input.
        kernel_size: empty for a linear layer (K = channels), else one int or two: a convolution.
        stride, padding, dilation, groups: the convolution's.
        a, b, adapter_scale, bias: as in :func:`conv2d_lowrank`.

    Returns:
        uint8 [bytes].
    """
    linear = kernel_size == ()
    return _native.ops.prepare_layer.default(
        codes,
        scale,
        zero_point,
        bits,
        channels,
        *([] if linear else pair(v) for v in (kernel_size, stride, padding, dilation)),
        groups,
        a,
        b,
        adapter_scale,
        bias,
    )


@torch.library.register_fake("cora::prepare_layer")
def _(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    a: Tensor | None,
    b: Tensor | None,
    adapter_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    op = "prepare_layer"
    check(channels >= 1, op, f"channels must be >= 1, got {channels}")
    divides = groups >= 1 and channels % groups == 0
    check(divides, op, f"groups must divide the {channels} channels, got {groups}")
    if kernel_size:
        pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        for name, values in {**pairs, "dilation": dilation}.items():
            check(len(values) == 2, op, f"{name} must have 2 elements, got {len(values)}")
        check_window(op, kernel_size, stride, padding, dilation)
    k = channels // groups * math.prod(kernel_size)
    check_packed(op, "codes", codes, scale, zero_point, bits, k)
    n = codes.shape[0]
    check(n % groups == 0, op, f"groups must divide the {n} rows of codes, got {groups}")
    check_operands(op, n, k, groups, a, b, adapter_scale, bias)
    return codes.new_empty([torch.library.get_ctx().new_dynamic_size()])


_ADAPTER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}
_TAIL = 8  # numbers of a geometry that do not change the output's shape


def layer_geometry(
    codes: Tensor,
    scale: Tensor,
    bits: int,
    channels: int,
    kernel_size: Pair = (),
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    b: Tensor | None = None,
    bias: bool = True,
) -> list[int]:
    """What :func:`run_layer` must know of a layer besides its prepared tensor, which it does not
    read on the host; arguments as in :func:`prepare_layer`. A bias of False promises that the layer
    has none, which may spare a pass over the result.

    Returns:
        [N] of a linear layer, [N, *kernel_size, *stride, *padding, *dilation] of a convolution, and
        then channels, groups, bits, the two sizes of scale, the rank, a code of the adapter's dtype and bias.
    """
    linear = kernel_size == ()
    pairs = () if linear else (kernel_size, stride, padding, dilation)
    rank, dtype = (0, torch.int8) if b is None else (b.shape[1], b.dtype)
    tail = [channels, groups, bits, *scale.shape, rank, _ADAPTER_TYPES[dtype], int(bias)]
    return [codes.shape[0], *(v for value in pairs for v in pair(value)), *tail]


def run_layer(
    x: Tensor,
    layer: Tensor,
    geometry: list[int],
    x_scale: float | None = None,
    x_zero_point: int = 0,
    x_bits: int = 0,
    x_halo: int = 0,
    add: Tensor | None = None,
    add_scale: float = 1.0,
    add_zero_point: int = 0,
    add_halo: int = 0,
    clamp_min: float = -math.inf,
    clamp_max: float = math.inf,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_halo: int = 0,
) -> Tensor:
    """Run a prepared layer: ``clamp(layer(x) + add, clamp_min, clamp_max)``, quantised or not.

    Tensors of codes are uint8 of 8 bits, ``scale * (code - zero_point)``, of a convolution
    channels_last with ``halo`` pixels of zero_point around them: [batch, channels, H + 2 halo,
    W + 2 halo]. A border at least as wide as the layer's padding is read in place.

    Sums of codes are exact integers within a scale group on every CPU level and thread count. The
    float steps are, in this order: the integer times (weight scale * x_scale) plus bias, fused (scale
    groups are added up in order first); plus the adapter; plus add; clamped; and for codes times
    1 / out_scale, rounded to even. An int8 adapter's hidden values are exact integers too; on AMX its
    second product is done with them split into two bfloat16, starting at the bias, and with codes to
    become of the sum all of it is in units of out_scale from the start. So results agree bit for bit over
    thread counts, and over levels without an adapter or with an int8 one below AMX.

    Args:
        x: float32, float16 or bfloat16, or uint8 codes; [..., K] (linear) or [batch, channels, H, W].
        layer: from :func:`prepare_layer`, on x's device.
        geometry: from :func:`layer_geometry`; the CPU needs its first part only.
        x_scale, x_zero_point: of the input's codes; None: a range for each sample at each call.
        x_bits: 0 (float input) or 2..8.
        x_halo, add_halo: the border that x and add have.
        add: float or codes, of the output's shape, or None.
        add_scale, add_zero_point: of add's codes.
        clamp_min, clamp_max: (0, inf) is ReLU, (0, 6) ReLU6.
        out_scale, out_zero_point: of the output's codes; None: the output is float.
        out_halo: the border the output gets.

    Returns:
        uint8 if out_scale is given, else x's dtype (float32 if x is codes).
    """
    if x.requires_grad:
        x = NoGradient.apply(x)  # type: ignore[no-untyped-call]
    return _native.ops.run_layer.default(
        x,
        layer,
        geometry,
        x_scale,
        x_zero_point,
        x_bits,
        x_halo,
        add,
        add_scale,
        add_zero_point,
        add_halo,
        clamp_min,
        clamp_max,
        out_scale,
        out_zero_point,
        out_halo,
    )


def _check_quantizer(op: str, name: str, scale: float, zero_point: int, top: int) -> None:
    check(0 < scale < math.inf, op, f"{name}_scale must be finite and > 0, got {scale:g}")
    in_range = 0 <= zero_point <= top
    check(in_range, op, f"{name}_zero_point must be 0..{top}, got {zero_point}")


def _check_float_or_codes(op: str, name: str, t: Tensor) -> None:
    wanted, fits = "float32, float16, bfloat16 or uint8", t.dtype in (*FLOATS, torch.uint8)
    check(fits, op, f"{name} must have dtype {wanted}, got {dtype_name(t)}")


@torch.library.register_fake("cora::run_layer")
def _(
    x: Tensor,
    layer: Tensor,
    geometry: list[int],
    x_scale: float | None,
    x_zero_point: int,
    x_bits: int,
    x_halo: int,
    add: Tensor | None,
    add_scale: float,
    add_zero_point: int,
    add_halo: int,
    clamp_min: float,
    clamp_max: float,
    out_scale: float | None,
    out_zero_point: int,
    out_halo: int,
) -> Tensor:
    op = "run_layer"
    whole = len(geometry) in (1 + _TAIL, 9 + _TAIL)
    n, *pairs = geometry[:-_TAIL] if whole else geometry
    check(len(pairs) in (0, 8), op, "geometry must be layer_geometry() of the layer")
    linear = not pairs
    kernel, stride, padding, dilation = pairs[:2], pairs[2:4], pairs[4:6], pairs[6:]
    if not linear:
        check_window(op, kernel, stride, padding, dilation)
    held = f"got shape {list(layer.shape)}, dtype {dtype_name(layer)}"
    what = f"layer must be a tensor that prepare_layer returned on this kind of device, {held}"
    check(layer.dim() == 1 and layer.dtype == torch.uint8, op, what)

    # As check_run in csrc/check.cpp.
    codes = x.dtype == torch.uint8
    _check_float_or_codes(op, "x", x)
    check(x_bits == 0 or 2 <= x_bits <= 8, op, f"x_bits must be 0 or 2..8, got {x_bits}")
    given = x_bits > 0 and x_scale is not None
    check(given or not codes, op, "x_scale and x_bits must be given with codes")
    for name, halo in (("x_halo", x_halo), ("add_halo", add_halo), ("out_halo", out_halo)):
        check(halo >= 0, op, f"{name} must be >= 0, got {halo}")
        check(not linear or halo == 0, op, f"{name} must be 0 for a linear layer, got {halo}")
    check(codes or x_halo == 0, op, f"x_halo must be 0 unless x holds codes, got {x_halo}")
    what = f"out_halo must be 0 for a float output, got {out_halo}"
    check(out_scale is not None or out_halo == 0, op, what)
    if x_scale is not None:
        check(x_bits > 0, op, "x_scale must be None when x_bits is 0")
        _check_quantizer(op, "x", x_scale, x_zero_point, 2**x_bits - 1)
    what = f"clamp_min must be <= clamp_max, got {clamp_min:g} and {clamp_max:g}"
    check(clamp_min <= clamp_max, op, what)
    if out_scale is not None:
        _check_quantizer(op, "out", out_scale, out_zero_point, 255)
    least = "at least 1 dimension" if linear else "4 dimensions"
    dimensions = x.dim() >= 1 if linear else x.dim() == 4
    check(dimensions, op, f"x must have {least}, got shape {list(x.shape)}")
    if whole:  # else only the prepared layer knows its channels
        channels, groups = geometry[-_TAIL : 2 - _TAIL]
        at = x.dim() - 1 if linear else 1
        what = f"x must have {channels} channels along dimension {at}, got shape {list(x.shape)}"
        check(x.shape[at] == channels, op, what)
        k = channels // groups * math.prod(kernel)
        what = f"k must be <= 65536 with quantised input, got {k}"
        check(x_bits == 0 or k <= 65536, op, what)
    size = []  # of the output without its border
    for d in range(0 if linear else 2):
        inner = x.shape[2 + d] - 2 * x_halo
        what = f"x_halo must be at most half of x's height and width, got {x_halo}"
        check(inner >= 0, op, what)
        reach = dilation[d] * (kernel[d] - 1) + 1
        padded = inner + 2 * padding[d]
        what = f"x's padded height and width must be at least {reach} along dimension {2 + d}"
        check(padded >= reach, op, f"{what}, got {padded}")
        size.append((padded - reach) // stride[d] + 1)

    def output(halo: int) -> list[Any]:
        return [*x.shape[:-1], n] if linear else [x.shape[0], n, *(s + 2 * halo for s in size)]

    if add is not None:
        _check_float_or_codes(op, "add", add)
        check_shape(op, "add", add, output(add_halo))
    dtype = torch.uint8 if out_scale is not None else torch.float32 if codes else x.dtype
    layout = torch.contiguous_format
    if not linear:
        layout = torch.channels_last if codes or out_scale is not None else image_layout(x)
    return torch.empty(output(out_halo), dtype=dtype, device=x.device, memory_format=layout)
