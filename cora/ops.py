"""The door to the native code: one typed function per op, fake kernel and gradient beside it.

A *weight* is a matrix [N, K]: one row per output channel, a convolution's [Cout, Cin/groups, kh,
kw] flattened in that order. Its codes are unsigned, ``bits`` wide (2..8), packed row by row into
whole bytes (docs/packed_layout.md). ``scale`` float32 and ``zero_point`` int32 are both [R, G]: R =
1 or N, G = 1 or K / group_size, and stand for ``scale * (code - zero_point)``. A zero-point may lie
outside the range of the codes; its magnitude must stay below 2**24.

Every function raises ``RuntimeError`` ("cora::<op>: <argument> must ..., got ...") for a bad
tensor, in eager mode and when traced.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import gpu

__all__ = [
    "conv2d_lowrank",
    "dequantize_activation",
    "dequantize_packed",
    "error_feedback",
    "fake_quantize",
    "fake_quantize_out",
    "isa",
    "layer_geometry",
    "linear_lowrank",
    "lowrank_factors",
    "max_pool2d_codes",
    "mean_codes",
    "pack_bits",
    "prepare_layer",
    "quantization_error",
    "quantize_activation",
    "residual_svd_init",
    "run_layer",
    "set_isa",
    "unpack_bits",
]

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.exists():
    raise ImportError(
        f"cora: {_LIBRARY} is missing: build it with `pip install .` (or `pip install -e .`), "
        "or leave the source folder if another cora is installed"
    )
# The file holds no Python: schemas and kernels register themselves.
torch.ops.load_library(_LIBRARY)
_ops = torch.ops.cora

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_Pair = int | tuple[int, ...]


# --- CPU level -----------------------------------------------------------------------------------


def isa() -> dict[str, str]:
    """The CPU level in force and the level of the kernel each op takes.

    Returns:
        ``{"level": "amx", "tile_s8": "amx", "fake_quantize": "avx512", ...}``.

    Raises:
        RuntimeError: the environment variable ``CORA_ISA`` names no level of this CPU.
    """
    level, *kernels = str(_ops.isa()).split()
    return {"level": level, **dict(kernel.split("=") for kernel in kernels)}


def set_isa(name: str) -> None:
    """Force a CPU level: ``scalar``, ``avx2``, ``avxvnni``, ``avx512`` or ``amx`` (as ``CORA_ISA`` does at start).

    Raises:
        RuntimeError: unknown, or not supported by this CPU; the message lists the valid names.
    """
    _ops.set_isa(name)


# --- Checks shared by the fake kernels (the native ones are csrc/check.cpp) ----------------------


def _check(condition: Any, op: str, message: str) -> None:
    torch._check(condition, lambda: f"cora::{op}: {message}")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _check_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    wanted = str(dtype).removeprefix("torch.")
    _check(t.dtype == dtype, op, f"{name} must have dtype {wanted}, got {_dtype(t)}")


def _check_shape(op: str, name: str, t: Tensor, shape: list[Any]) -> None:
    fits = t.dim() == len(shape) and all(t.shape[i] == size for i, size in enumerate(shape))
    _check(fits, op, f"{name} must have shape {shape}, got {list(t.shape)}")


def _check_bits(op: str, bits: int) -> None:
    _check(2 <= bits <= 8, op, f"bits must be 2..8, got {bits}")


def _check_float(op: str, name: str, t: Tensor) -> None:
    wanted = "float32, float16 or bfloat16"
    _check(t.dtype in _FLOATS, op, f"{name} must have dtype {wanted}, got {_dtype(t)}")


def _check_qparams(op: str, scale: Tensor, zero_point: Tensor, rows: Any, cols: Any) -> None:
    _check_dtype(op, "scale", scale, torch.float32)
    _check_dtype(op, "zero_point", zero_point, torch.int32)
    shape = list(scale.shape)
    fits = (
        len(shape) == 2
        and shape[1] >= 1
        and (shape[0] == 1 or shape[0] == rows)
        and cols % shape[1] == 0
    )
    first = "1" if rows == 1 else f"1 or {rows}"
    _check(fits, op, f"scale must have shape [{first}, G] with G a divisor of {cols}, got {shape}")
    _check_shape(op, "zero_point", zero_point, shape)


def _check_window(
    op: str, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        _check(min(values) >= least, op, f"{name} must be >= {least}, got {list(values)}")


def _row_bytes(k: Any, bits: int) -> Any:
    return (k * bits + 7) // 8


def _check_packed(
    op: str, name: str, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, k: Any
) -> None:
    _check_bits(op, bits)
    _check_dtype(op, name, packed, torch.uint8)
    _check(packed.dim() == 2, op, f"{name} must have 2 dimensions, got shape {list(packed.shape)}")
    _check(k >= 1, op, f"k must be >= 1, got {k}")
    _check_shape(op, name, packed, [packed.shape[0], _row_bytes(k, bits)])
    _check_qparams(op, scale, zero_point, packed.shape[0], k)


def _matrix_shape(x: Tensor) -> tuple[Any, Any]:
    if x.dim() < 2:
        return 1, x.numel()
    return x.shape[0], x.shape[1:].numel()


# --- fake_quantize -------------------------------------------------------------------------------


@overload
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    residual: Literal[False] = False,
    codes: Literal[False] = False,
) -> Tensor: ...
@overload
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    residual: bool = ...,
    codes: bool = ...,
) -> Any: ...
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    residual: bool = False,
    codes: bool = False,
) -> Any:
    """Quantise and dequantise in one pass.

    ``q = clamp(rint(x / scale) + zero_point, 0, 2**bits - 1)``, ``out = scale * (q - zero_point)``.
    Rounds half to even after a true division. Gradients are straight-through: x receives the
    gradient where its code was not clamped, scale receives ``(q - zero_point) - x / scale`` there
    and ``q - zero_point`` elsewhere, summed over its elements; zero_point receives none. A NaN
    takes code 0.

    Args:
        x: float32, float16 or bfloat16, any shape, seen as the matrix [x.shape[0], -1] (0-d and
            1-d: [1, -1]).
        scale: float32 [R, G], finite and > 0; R = 1 or the matrix' rows, G a divisor of its
            columns.
        zero_point: int32 [R, G], within +-2**24.
        bits: 2..8.
        residual: also return ``x - out``.
        codes: also return q.

    Returns:
        out, x's shape and dtype; or the tuple (out, residual if asked, codes uint8 if asked).

    Source: STE, Bengio et al. 2013; scale gradient, LSQ (Esser et al. 2020).
    """
    out, rest, q = _ops.fake_quantize.default(x, scale, zero_point, bits, residual, codes)
    if not residual and not codes:
        return out
    return (out, *([rest] if residual else []), *([q] if codes else []))


def _check_fake_quantize(op: str, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    _check_bits(op, bits)
    _check_float(op, "x", x)
    _check_qparams(op, scale, zero_point, *_matrix_shape(x))


@torch.library.register_fake("cora::fake_quantize")
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, residual: bool, codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_fake_quantize("fake_quantize", x, scale, zero_point, bits)
    none = (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if residual else none),
        x.new_empty(x.shape if codes else none, dtype=torch.uint8),
    )


def fake_quantize_out(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    out: Tensor,
    residual: Tensor | None = None,
    codes: Tensor | None = None,
) -> None:
    """:func:`fake_quantize` into tensors of the caller; no gradient.

    New memory costs more than the arithmetic: the kernel's pages are zeroed at their first touch.

    Args:
        x: float32.
        scale, zero_point, bits: as in :func:`fake_quantize`.
        out: float32 of x's shape, contiguous; may be x itself.
        residual: float32 of x's shape, contiguous, or None.
        codes: uint8 of x's shape, contiguous, or None.
    """
    _ops.fake_quantize_out.default(x, scale, zero_point, bits, out, residual, codes)


@torch.library.register_fake("cora::fake_quantize_out")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    out: Tensor,
    residual: Tensor | None,
    codes: Tensor | None,
) -> None:
    op = "fake_quantize_out"
    _check_fake_quantize(op, x, scale, zero_point, bits)
    _check_dtype(op, "x", x, torch.float32)
    for name, t, dtype in (
        ("out", out, torch.float32),
        ("residual", residual, torch.float32),
        ("codes", codes, torch.uint8),
    ):
        if t is not None:
            _check_dtype(op, name, t, dtype)
            _check_shape(op, name, t, list(x.shape))
            what = f"{name} must be contiguous, got shape {list(t.shape)} in another layout"
            _check(t.is_contiguous(), op, what)


@torch.library.register_fake("cora::fake_quantize_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    op = "fake_quantize_backward"
    _check_fake_quantize(op, x, scale, zero_point, bits)
    _check_shape(op, "grad", grad, list(x.shape))
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, zero_point, ctx.bits, ctx.residual, _ = inputs
    ctx.save_for_backward(x, scale, zero_point)
    ctx.mark_non_differentiable(output[2])


def _fake_quantize_backward(
    ctx: Any, grad_out: Tensor, grad_residual: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    # residual = x - out: its gradient reaches x directly and out with the opposite sign.
    grad = grad_out - grad_residual if ctx.residual else grad_out
    grad_x, grad_scale = _ops.fake_quantize_backward.default(grad, *ctx.saved_tensors, ctx.bits)
    if ctx.residual:
        grad_x = grad_x + grad_residual
    return grad_x, grad_scale, None, None, None, None


torch.library.register_autograd(
    "cora::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize
)


# --- The search for a quantizer ------------------------------------------------------------------


def quantization_error(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Squared error of a weight under each of many candidate quantizers, in one pass over it.

    Args:
        x: float32 [N, K].
        scale: float32 [candidates, R, G], R = 1 or N, G a divisor of K.
        zero_point: int32 [candidates, R, G], within +-2**24.
        bits: 2..8.

    Returns:
        float64 [candidates, R, G], sums over the elements that share a scale.
    """
    return _ops.quantization_error.default(x, scale, zero_point, bits)


@torch.library.register_fake("cora::quantization_error")
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    op = "quantization_error"
    _check_bits(op, bits)
    _check_dtype(op, "x", x, torch.float32)
    _check(x.dim() == 2, op, f"x must have 2 dimensions, got shape {list(x.shape)}")
    _check_dtype(op, "scale", scale, torch.float32)
    _check_dtype(op, "zero_point", zero_point, torch.int32)
    n, k = x.shape
    shape = list(scale.shape)
    fits = len(shape) == 3 and shape[1] in (1, n) and shape[2] >= 1 and k % shape[2] == 0
    rows = "1" if n == 1 else f"1 or {n}"
    what = f"scale must have shape [candidates, {rows}, G] with G a divisor of {k}, got {shape}"
    _check(fits, op, what)
    _check_shape(op, "zero_point", zero_point, shape)
    return scale.new_empty(scale.shape, dtype=torch.float64)


def error_feedback(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Round a weight column by column, passing each column's error on to those not yet rounded.

    With H the second moment of the layer's input, its columns in `order`, and ``H^-1 = U^T U``: ``e_k =
    (w_k - round(w_k)) / U_kk``, then ``w_j -= e_k U_kj`` for all later j. Products and differences are
    rounded apart, so every CPU level and number of threads gives the same codes.

    Args:
        x: float32 [N, K].
        scale: float32 [R, G].
        zero_point: int32 [R, G].
        bits: 2..8.
        factor: float32 [groups, K, K], the upper triangle U for each N/groups rows; its diagonal > 0,
            below it nothing is read.
        order: int64 [groups, K], the columns in the order they are rounded; row and column i of
            `factor` are column ``order[i]`` of x.

    Returns:
        codes uint8 [N, K], and float64 [N]: the output error ``e H e^T`` of each row.

    Source: GPTQ, arXiv 2210.17323.
    """
    return _ops.error_feedback.default(x, scale, zero_point, bits, factor, order)


@torch.library.register_fake("cora::error_feedback")
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    op = "error_feedback"
    _check_bits(op, bits)
    _check_dtype(op, "x", x, torch.float32)
    _check(x.dim() == 2, op, f"x must have 2 dimensions, got shape {list(x.shape)}")
    n, k = x.shape
    _check_qparams(op, scale, zero_point, n, k)
    _check_dtype(op, "factor", factor, torch.float32)
    shape = list(factor.shape)
    fits = len(shape) == 3 and shape[0] > 0 and n % shape[0] == 0 and shape[1:] == [k, k]
    what = f"factor must have shape [groups, {k}, {k}] with groups a divisor of {n}, got {shape}"
    _check(fits, op, what)
    _check_dtype(op, "order", order, torch.int64)
    _check_shape(op, "order", order, [shape[0], k])
    return x.new_empty((n, k), dtype=torch.uint8), x.new_empty((n,), dtype=torch.float64)


# --- Activations ---------------------------------------------------------------------------------


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
    return _ops.quantize_activation.default(x, scale, zero_point, bits, halo)


def dequantize_activation(codes: Tensor, scale: float, zero_point: int, halo: int = 0) -> Tensor:
    """``scale * (code - zero_point)`` without the halo: float32, an image channels_last.

    Args:
        codes: uint8, an image channels_last [batch, channels, H, W] or any other shape.
        scale: finite and > 0; rounded to float32.
        zero_point: 0..255.
        halo: pixels around each image of codes; 0 unless codes are images.
    """
    return _ops.dequantize_activation.default(codes, scale, zero_point, halo)


def _check_activation(op: str, t: Tensor, name: str, zero_point: int, bits: int, halo: int) -> None:
    _check_bits(op, bits)
    top = 2**bits - 1
    _check(0 <= zero_point <= top, op, f"zero_point must be 0..{top}, got {zero_point}")
    _check(halo >= 0, op, f"halo must be >= 0, got {halo}")
    what = f"{name} must have 4 dimensions for a halo, got shape {list(t.shape)}"
    _check(halo == 0 or t.dim() == 4, op, what)


def _new_activation(t: Tensor, border: int, dtype: torch.dtype) -> Tensor:
    if t.dim() != 4:
        return t.new_empty(t.shape, dtype=dtype)
    shape = [*t.shape[:2], t.shape[2] + 2 * border, t.shape[3] + 2 * border]
    return torch.empty(shape, dtype=dtype, device=t.device, memory_format=torch.channels_last)


@torch.library.register_fake("cora::quantize_activation")
def _(x: Tensor, scale: float, zero_point: int, bits: int, halo: int) -> Tensor:
    op = "quantize_activation"
    _check_float(op, "x", x)
    _check(0 < scale < math.inf, op, f"scale must be finite and > 0, got {scale}")
    _check_activation(op, x, "x", zero_point, bits, halo)
    return _new_activation(x, halo, torch.uint8)


@torch.library.register_fake("cora::dequantize_activation")
def _(codes: Tensor, scale: float, zero_point: int, halo: int) -> Tensor:
    op = "dequantize_activation"
    _check_dtype(op, "codes", codes, torch.uint8)
    _check(0 < scale < math.inf, op, f"scale must be finite and > 0, got {scale}")
    _check_activation(op, codes, "codes", zero_point, 8, halo)
    if codes.dim() == 4:
        what = f"codes must hold the border of {halo} pixels, got shape {list(codes.shape)}"
        _check(codes.shape[2] >= 2 * halo and codes.shape[3] >= 2 * halo, op, what)
    return _new_activation(codes, -halo, torch.float32)


def max_pool2d_codes(
    x: Tensor,
    zero_point: int,
    x_halo: int,
    kernel_size: _Pair,
    stride: _Pair,
    padding: _Pair = 0,
    dilation: _Pair = 1,
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
    pairs = (_pair(v) for v in (kernel_size, stride, padding, dilation))
    return _ops.max_pool2d_codes.default(x, zero_point, x_halo, *pairs, ceil_mode, out_halo)


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
    return _ops.mean_codes.default(x, scale, zero_point, x_halo)


def _check_image(op: str, x: Tensor, zero_point: int, halo: int) -> None:
    _check_dtype(op, "x", x, torch.uint8)
    _check(x.dim() == 4, op, f"x must have 4 dimensions, got shape {list(x.shape)}")
    _check(0 <= zero_point <= 255, op, f"zero_point must be 0..255, got {zero_point}")
    _check(halo >= 0, op, f"halo must be >= 0, got {halo}")
    what = f"x must hold pixels inside a border of {halo}, got shape {list(x.shape)}"
    _check(x.shape[2] > 2 * halo, op, what)
    _check(x.shape[3] > 2 * halo, op, what)


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
    _check(out_halo >= 0, op, f"out_halo must be >= 0, got {out_halo}")
    _check_window(op, kernel_size, stride, padding, dilation)
    size = []
    for d in range(2):
        half = f"padding must be at most half of kernel_size, got {padding[d]} and {kernel_size[d]}"
        _check(2 * padding[d] <= kernel_size[d], op, half)
        pixels = x.shape[2 + d] - 2 * x_halo
        reach = dilation[d] * (kernel_size[d] - 1) + 1
        room = pixels + 2 * padding[d] - reach + (stride[d] - 1 if ceil_mode else 0)
        what = f"x must be at least as large as a window along dimension {2 + d}, got {pixels}"
        _check(room >= 0, op, what)
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
    _check(0 < scale < math.inf, op, f"scale must be finite and > 0, got {scale}")
    return x.new_empty(x.shape[:2], dtype=torch.float32)


# --- Packing -------------------------------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into the layout of docs/packed_layout.md.

    Args:
        codes: uint8 [..., K], each at most 2**bits - 1.
        bits: 2..8.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    return _ops.pack_bits.default(codes, bits)


@torch.library.register_fake("cora::pack_bits")
def _(codes: Tensor, bits: int) -> Tensor:
    op = "pack_bits"
    _check_bits(op, bits)
    _check_dtype(op, "codes", codes, torch.uint8)
    _check(codes.dim() >= 1, op, "codes must have at least 1 dimension, got shape []")
    return codes.new_empty([*codes.shape[:-1], _row_bytes(codes.shape[-1], bits)])


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Args:
        packed: uint8 [..., ceil(k * bits / 8)].
        bits: 2..8.
        k: codes of a row.

    Returns:
        uint8 [..., k].
    """
    return _ops.unpack_bits.default(packed, bits, k)


@torch.library.register_fake("cora::unpack_bits")
def _(packed: Tensor, bits: int, k: int) -> Tensor:
    op = "unpack_bits"
    _check_bits(op, bits)
    _check_dtype(op, "packed", packed, torch.uint8)
    _check(k >= 0, op, f"k must be >= 0, got {k}")
    _check(packed.dim() >= 1, op, "packed must have at least 1 dimension, got shape []")
    size = _row_bytes(k, bits)
    what = f"last dimension {size} for k = {k} and {bits} bits"
    _check(packed.shape[-1] == size, op, f"packed must have {what}, got shape {list(packed.shape)}")
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
    return _ops.dequantize_packed.default(packed, scale, zero_point, bits, k)


@torch.library.register_fake("cora::dequantize_packed")
def _(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, k: int) -> Tensor:
    _check_packed("dequantize_packed", "packed", packed, scale, zero_point, bits, k)
    return packed.new_empty([packed.shape[0], k], dtype=torch.float32)


# --- Low-rank initialisation ---------------------------------------------------------------------


def lowrank_factors(
    residual: Tensor, rank: int, groups: int = 1, moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r approximation ``B @ A`` of each group's rows of a residual, optionally weighted.

    Minimises ``||(residual_g - B_g A_g) moment^(1/2)||_F``; without moment, plain. Computed from
    the Gram matrix of the smaller side and its eigenvectors, in float64 where that is cheap; B and
    A share the singular values evenly (unweighted: B = U sqrt(S), A = sqrt(S) V^T). Each
    component's sign is fixed by making the entry of U largest in magnitude positive. Of large
    matrices, singular values beyond ``rank`` are good to a thousandth of the largest.

    Args:
        residual: float32 [N, K].
        rank: 0..min(N / groups, K).
        groups: divisor of N; rows [g * N/groups, (g+1) * N/groups) are group g.
        moment: float32 or float64 [groups or 1, K, K], symmetric and positive definite: the second
            moment E[x x^T] of the layer's (unfolded) input.

    Returns:
        a float32 [groups * rank, K], b float32 [N, rank], singular values of the (weighted)
        residual, float32 [groups, min(N / groups, K)], descending.

    Source: CoRa, arXiv 2408.00923, sec. 3; the weighting: QERA, arXiv 2410.06040.
    """
    return _ops.lowrank_factors.default(residual, rank, groups, moment)


def _check_lowrank(
    op: str,
    name: str,
    n: Any,
    k: Any,
    matrix: Tensor,
    rank: int,
    groups: int,
    moment: Tensor | None,
) -> None:
    _check_dtype(op, name, matrix, torch.float32)
    _check(groups >= 1 and n % groups == 0, op, f"groups must divide the {n} rows, got {groups}")
    most = min(n // groups, k)
    _check(0 <= rank <= most, op, f"rank must be 0..{most}, got {rank}")
    if moment is not None:
        fits = moment.dtype in (torch.float32, torch.float64)
        _check(fits, op, f"moment must have dtype float32 or float64, got {_dtype(moment)}")
        fits = moment.dim() == 3 and (moment.shape[0] == 1 or moment.shape[0] == groups)
        fits = fits and moment.shape[1] == k and moment.shape[2] == k
        first = "1" if groups == 1 else f"1 or {groups}"
        _check(fits, op, f"moment must have shape [{first}, {k}, {k}], got {list(moment.shape)}")


@torch.library.register_fake("cora::lowrank_factors")
def _(
    residual: Tensor, rank: int, groups: int, moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    op = "lowrank_factors"
    _check(
        residual.dim() == 2,
        op,
        f"residual must have 2 dimensions, got shape {list(residual.shape)}",
    )
    n, k = residual.shape
    _check_lowrank(op, "residual", n, k, residual, rank, groups, moment)
    return (
        residual.new_empty([groups * rank, k]),
        residual.new_empty([n, rank]),
        residual.new_empty([groups, min(n // groups, k)]),
    )


def residual_svd_init(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int = 1,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantise a weight and fit its adapter to what was lost, in one call.

    Args:
        weight: float32 [N, ...], seen as [N, K].
        scale: float32 [R, G].
        zero_point: int32 [R, G].
        bits: 2..8.
        rank, groups, moment: as in :func:`lowrank_factors`.

    Returns:
        packed uint8 [N, ceil(K * bits / 8)], a float32 [groups * rank, K], b float32 [N, rank],
        singular values float32 [groups, min(N / groups, K)], residual float32 [N, K] (before the
        adapter).
    """
    return _ops.residual_svd_init.default(weight, scale, zero_point, bits, rank, groups, moment)


@torch.library.register_fake("cora::residual_svd_init")
def _(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int,
    moment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "residual_svd_init"
    _check(
        weight.dim() >= 2,
        op,
        f"weight must have 2 or more dimensions, got shape {list(weight.shape)}",
    )
    n, k = _matrix_shape(weight)
    _check_lowrank(op, "weight", n, k, weight, rank, groups, moment)
    _check_bits(op, bits)
    _check_qparams(op, scale, zero_point, n, k)
    return (
        weight.new_empty([n, _row_bytes(k, bits)], dtype=torch.uint8),
        weight.new_empty([groups * rank, k]),
        weight.new_empty([n, rank]),
        weight.new_empty([groups, min(n // groups, k)]),
        weight.new_empty([n, k]),
    )


# --- Packed layers -------------------------------------------------------------------------------


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
    return _ops.linear_lowrank.default(
        x, weight, scale, zero_point, bits, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits
    )


def _check_operands(
    op: str,
    n: Any,
    k: Any,
    groups: int,
    a: Tensor | None,
    b: Tensor | None,
    adapter_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check((a is None) == (b is None), op, "a and b must be given together")
    if a is not None and b is not None:
        fits = a.dtype in (torch.int8, *_FLOATS)
        _check(fits, op, f"a must have dtype int8, float16, bfloat16 or float32, got {_dtype(a)}")
        _check_dtype(op, "b", b, a.dtype)
        _check(b.dim() == 2, op, f"b must have 2 dimensions, got shape {list(b.shape)}")
        rank = b.shape[1]
        _check_shape(op, "b", b, [n, rank])
        _check_shape(op, "a", a, [groups * rank, k])
        if a.dtype == torch.int8:
            _check(
                adapter_scale is not None, op, "adapter_scale must be given with an int8 adapter"
            )
        else:
            _check(adapter_scale is None, op, "adapter_scale must be None with a float adapter")
        if adapter_scale is not None:
            _check_dtype(op, "adapter_scale", adapter_scale, torch.float32)
            _check_shape(op, "adapter_scale", adapter_scale, [groups * rank])
    else:
        _check(adapter_scale is None, op, "adapter_scale must be None without an adapter")
    if bias is not None:
        _check_dtype(op, "bias", bias, torch.float32)
        _check_shape(op, "bias", bias, [n])


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
    _check_float(op, "x", x)
    _check_operands(op, n, k, groups, a, b, adapter_scale, bias)
    _check(x_bits == 0 or 2 <= x_bits <= 8, op, f"x_bits must be 0 or 2..8, got {x_bits}")
    both = (x_scale is None) == (x_zero_point is None)
    _check(both, op, "x_scale and x_zero_point must be given together")
    if x_scale is not None and x_zero_point is not None:
        _check(x_bits > 0, op, "x_scale must be None when x_bits is 0")
        _check_dtype(op, "x_scale", x_scale, torch.float32)
        _check_dtype(op, "x_zero_point", x_zero_point, torch.int32)
        for name, t in (("x_scale", x_scale), ("x_zero_point", x_zero_point)):
            _check(t.numel() == 1, op, f"{name} must have 1 element, got shape {list(t.shape)}")


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
    _check(x.dim() >= 1, op, "x must have at least 1 dimension, got shape []")
    k = x.shape[-1]
    _check_packed(op, "weight", weight, scale, zero_point, bits, k)
    n = weight.shape[0]
    _check_layer(op, x, n, k, 1, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits)
    return x.new_empty([*x.shape[:-1], n])


def _pair(value: _Pair) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def conv2d_lowrank(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    kernel_size: _Pair,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
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
    return _ops.conv2d_lowrank.default(
        x,
        weight,
        scale,
        zero_point,
        bits,
        _pair(kernel_size),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
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
    _check(x.dim() == 4, op, f"x must have 4 dimensions, got shape {list(x.shape)}")
    _check_window(op, kernel_size, stride, padding, dilation)
    channels = x.shape[1]
    divides = groups >= 1 and channels % groups == 0
    _check(divides, op, f"groups must divide the {channels} channels, got {groups}")
    k = channels // groups * kernel_size[0] * kernel_size[1]
    _check_packed(op, "weight", weight, scale, zero_point, bits, k)
    n = weight.shape[0]
    _check(n % groups == 0, op, f"groups must divide the {n} rows of weight, got {groups}")
    _check_layer(op, x, n, k, groups, a, b, adapter_scale, bias, x_scale, x_zero_point, x_bits)
    size = []
    for d in range(2):
        reach = dilation[d] * (kernel_size[d] - 1) + 1
        padded = x.shape[2 + d] + 2 * padding[d]
        what = f"x's padded height and width must be at least {reach} along dimension {2 + d}"
        _check(padded >= reach, op, f"{what}, got {padded}")
        size.append((padded - reach) // stride[d] + 1)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty([x.shape[0], n, *size], dtype=x.dtype, device=x.device, memory_format=layout)


def prepare_layer(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    channels: int,
    kernel_size: _Pair = (),
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
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
    return _ops.prepare_layer.default(
        codes,
        scale,
        zero_point,
        bits,
        channels,
        *([] if linear else _pair(v) for v in (kernel_size, stride, padding, dilation)),
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
    _check(channels >= 1, op, f"channels must be >= 1, got {channels}")
    divides = groups >= 1 and channels % groups == 0
    _check(divides, op, f"groups must divide the {channels} channels, got {groups}")
    if kernel_size:
        pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        for name, pair in {**pairs, "dilation": dilation}.items():
            _check(len(pair) == 2, op, f"{name} must have 2 elements, got {len(pair)}")
        _check_window(op, kernel_size, stride, padding, dilation)
    k = channels // groups * math.prod(kernel_size)
    _check_packed(op, "codes", codes, scale, zero_point, bits, k)
    n = codes.shape[0]
    _check(n % groups == 0, op, f"groups must divide the {n} rows of codes, got {groups}")
    _check_operands(op, n, k, groups, a, b, adapter_scale, bias)
    return codes.new_empty([torch.library.get_ctx().new_dynamic_size()])


_ADAPTER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}
_TAIL = 6  # numbers of a geometry that do not change the output's shape


def layer_geometry(
    codes: Tensor,
    scale: Tensor,
    bits: int,
    kernel_size: _Pair = (),
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    b: Tensor | None = None,
) -> list[int]:
    """What :func:`run_layer` must know of a layer besides its prepared tensor, which it does not
    read on the host; arguments as in :func:`prepare_layer`.

    Returns:
        [N] of a linear layer, [N, *kernel_size, *stride, *padding, *dilation] of a convolution, and
        then groups, bits, the two sizes of scale, the rank and a code of the adapter's dtype.
    """
    linear = kernel_size == ()
    pairs = () if linear else (kernel_size, stride, padding, dilation)
    rank, dtype = (0, torch.int8) if b is None else (b.shape[1], b.dtype)
    tail = [groups, bits, *scale.shape, rank, _ADAPTER_TYPES[dtype]]
    return [codes.shape[0], *(v for pair in pairs for v in _pair(pair)), *tail]


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
    second product is done with them split into two bfloat16. So results agree bit for bit over
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
        x = _NoGradient.apply(x)  # type: ignore[no-untyped-call]
    return _ops.run_layer.default(
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
    _check(0 < scale < math.inf, op, f"{name}_scale must be finite and > 0, got {scale:g}")
    in_range = 0 <= zero_point <= top
    _check(in_range, op, f"{name}_zero_point must be 0..{top}, got {zero_point}")


def _check_float_or_codes(op: str, name: str, t: Tensor) -> None:
    wanted, fits = "float32, float16, bfloat16 or uint8", t.dtype in (*_FLOATS, torch.uint8)
    _check(fits, op, f"{name} must have dtype {wanted}, got {_dtype(t)}")


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
    _check(len(pairs) in (0, 8), op, "geometry must be layer_geometry() of the layer")
    linear = not pairs
    kernel, stride, padding, dilation = pairs[:2], pairs[2:4], pairs[4:6], pairs[6:]
    if not linear:
        _check_window(op, kernel, stride, padding, dilation)
    held = f"got shape {list(layer.shape)}, dtype {_dtype(layer)}"
    what = f"layer must be a tensor that prepare_layer returned on this kind of device, {held}"
    _check(layer.dim() == 1 and layer.dtype == torch.uint8, op, what)

    # As check_run in csrc/check.cpp; only the prepared layer knows its number of channels.
    codes = x.dtype == torch.uint8
    _check_float_or_codes(op, "x", x)
    _check(x_bits == 0 or 2 <= x_bits <= 8, op, f"x_bits must be 0 or 2..8, got {x_bits}")
    given = x_bits > 0 and x_scale is not None
    _check(given or not codes, op, "x_scale and x_bits must be given with codes")
    for name, halo in (("x_halo", x_halo), ("add_halo", add_halo), ("out_halo", out_halo)):
        _check(halo >= 0, op, f"{name} must be >= 0, got {halo}")
        _check(not linear or halo == 0, op, f"{name} must be 0 for a linear layer, got {halo}")
    _check(codes or x_halo == 0, op, f"x_halo must be 0 unless x holds codes, got {x_halo}")
    what = f"out_halo must be 0 for a float output, got {out_halo}"
    _check(out_scale is not None or out_halo == 0, op, what)
    if x_scale is not None:
        _check(x_bits > 0, op, "x_scale must be None when x_bits is 0")
        _check_quantizer(op, "x", x_scale, x_zero_point, 2**x_bits - 1)
    what = f"clamp_min must be <= clamp_max, got {clamp_min:g} and {clamp_max:g}"
    _check(clamp_min <= clamp_max, op, what)
    if out_scale is not None:
        _check_quantizer(op, "out", out_scale, out_zero_point, 255)
    least = "at least 1 dimension" if linear else "4 dimensions"
    dimensions = x.dim() >= 1 if linear else x.dim() == 4
    _check(dimensions, op, f"x must have {least}, got shape {list(x.shape)}")
    if linear or whole:  # the groups are known
        channels, groups = (x.shape[-1], 1) if linear else (x.shape[1], geometry[-_TAIL])
        divides = groups >= 1 and channels % groups == 0
        _check(divides, op, f"groups must divide the {channels} channels, got {groups}")
        k = channels // groups * math.prod(kernel)
        what = f"k must be <= 65536 with quantised input, got {k}"
        _check(x_bits == 0 or k <= 65536, op, what)
    size = []  # of the output without its border
    for d in range(0 if linear else 2):
        inner = x.shape[2 + d] - 2 * x_halo
        what = f"x_halo must be at most half of x's height and width, got {x_halo}"
        _check(inner >= 0, op, what)
        reach = dilation[d] * (kernel[d] - 1) + 1
        padded = inner + 2 * padding[d]
        what = f"x's padded height and width must be at least {reach} along dimension {2 + d}"
        _check(padded >= reach, op, f"{what}, got {padded}")
        size.append((padded - reach) // stride[d] + 1)

    def output(halo: int) -> list[Any]:
        return [*x.shape[:-1], n] if linear else [x.shape[0], n, *(s + 2 * halo for s in size)]

    if add is not None:
        _check_float_or_codes(op, "add", add)
        _check_shape(op, "add", add, output(add_halo))
    dtype = torch.uint8 if out_scale is not None else torch.float32 if codes else x.dtype
    last = not linear and (
        codes
        or out_scale is not None
        or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
    )
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(output(out_halo), dtype=dtype, device=x.device, memory_format=layout)


_NO_GRADIENT = (
    "cora::{op}: packed layers have no gradient: train the float model, or its merged copy from "
    "cora.dequantize()"
)


def _no_gradient(op: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(_NO_GRADIENT.format(op=op))

    torch.library.register_autograd(f"cora::{op}", backward)


_no_gradient("linear_lowrank")
_no_gradient("conv2d_lowrank")


class _NoGradient(torch.autograd.Function):
    """The identity; its gradient refuses. A registered one would cost each call 8 us."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(_NO_GRADIENT.format(op="run_layer"))


# --- CUDA, where torch's operators do it (csrc/ops/cuda_*.cpp has the others) --------------------


def _residual_svd_init_cuda(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    rank: int,
    groups: int,
    moment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = _matrix_shape(weight)
    matrix = weight.reshape(n, k)
    _check_lowrank("residual_svd_init", "weight", n, k, matrix, rank, groups, moment)
    _, residual, codes = fake_quantize(matrix, scale, zero_point, bits, residual=True, codes=True)
    a, b, values = gpu.lowrank_factors(residual, rank, groups, moment)
    return pack_bits(codes, bits), a, b, values, residual


def _lowrank_factors_cuda(
    residual: Tensor, rank: int, groups: int, moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = residual.shape
    _check_lowrank("lowrank_factors", "residual", n, k, residual, rank, groups, moment)
    return gpu.lowrank_factors(residual, rank, groups, moment)


for _name, _kernel in (
    ("lowrank_factors", _lowrank_factors_cuda),
    ("residual_svd_init", _residual_svd_init_cuda),
    ("quantization_error", gpu.quantization_error),
    ("error_feedback", gpu.error_feedback),
    ("max_pool2d_codes", gpu.max_pool2d_codes),
    ("mean_codes", gpu.mean_codes),
):
    torch.library.register_kernel(f"cora::{_name}", "cuda", _kernel)
