"""Quantizers of weights on floats: rounding, the search for a range, error feedback."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import gpu
from . import _native
from ._checks import (
    check,
    check_bits,
    check_dtype,
    check_float,
    check_qparams,
    check_shape,
    matrix_shape,
)

__all__ = [
    "descend_codes",
    "error_feedback",
    "fake_quantize",
    "fake_quantize_out",
    "quantization_error",
]


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
    out, rest, q = _native.ops.fake_quantize.default(x, scale, zero_point, bits, residual, codes)
    if not residual and not codes:
        return out
    return (out, *([rest] if residual else []), *([q] if codes else []))


def _check_fake_quantize(op: str, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    check_bits(op, bits)
    check_float(op, "x", x)
    check_qparams(op, scale, zero_point, *matrix_shape(x))


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
    _native.ops.fake_quantize_out.default(x, scale, zero_point, bits, out, residual, codes)


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
    check_dtype(op, "x", x, torch.float32)
    for name, t, dtype in (
        ("out", out, torch.float32),
        ("residual", residual, torch.float32),
        ("codes", codes, torch.uint8),
    ):
        if t is not None:
            check_dtype(op, name, t, dtype)
            check_shape(op, name, t, list(x.shape))
            what = f"{name} must be contiguous, got shape {list(t.shape)} in another layout"
            check(t.is_contiguous(), op, what)


@torch.library.register_fake("cora::fake_quantize_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    op = "fake_quantize_backward"
    _check_fake_quantize(op, x, scale, zero_point, bits)
    check_shape(op, "grad", grad, list(x.shape))
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
    grad_x, grad_scale = _native.ops.fake_quantize_backward.default(
        grad, *ctx.saved_tensors, ctx.bits
    )
    if ctx.residual:
        grad_x = grad_x + grad_residual
    return grad_x, grad_scale, None, None, None, None


torch.library.register_autograd(
    "cora::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize
)


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
    return _native.ops.quantization_error.default(x, scale, zero_point, bits)


@torch.library.register_fake("cora::quantization_error")
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    op = "quantization_error"
    check_bits(op, bits)
    check_dtype(op, "x", x, torch.float32)
    check(x.dim() == 2, op, f"x must have 2 dimensions, got shape {list(x.shape)}")
    check_dtype(op, "scale", scale, torch.float32)
    check_dtype(op, "zero_point", zero_point, torch.int32)
    n, k = x.shape
    shape = list(scale.shape)
    fits = len(shape) == 3 and shape[1] in (1, n) and shape[2] >= 1 and k % shape[2] == 0
    rows = "1" if n == 1 else f"1 or {n}"
    what = f"scale must have shape [candidates, {rows}, G] with G a divisor of {k}, got {shape}"
    check(fits, op, what)
    check_shape(op, "zero_point", zero_point, shape)
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
    return _native.ops.error_feedback.default(x, scale, zero_point, bits, factor, order)


@torch.library.register_fake("cora::error_feedback")
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    op = "error_feedback"
    check_bits(op, bits)
    check_dtype(op, "x", x, torch.float32)
    check(x.dim() == 2, op, f"x must have 2 dimensions, got shape {list(x.shape)}")
    n, k = x.shape
    check_qparams(op, scale, zero_point, n, k)
    check_dtype(op, "factor", factor, torch.float32)
    shape = list(factor.shape)
    fits = len(shape) == 3 and shape[0] > 0 and n % shape[0] == 0 and shape[1:] == [k, k]
    what = f"factor must have shape [groups, {k}, {k}] with groups a divisor of {n}, got {shape}"
    check(fits, op, what)
    check_dtype(op, "order", order, torch.int64)
    check_shape(op, "order", order, [shape[0], k])
    return x.new_empty((n, k), dtype=torch.uint8), x.new_empty((n,), dtype=torch.float64)


def descend_codes(
    codes: Tensor, gradient: Tensor, scale: Tensor, curvature: Tensor, bits: int
) -> Tensor:
    """Set the codes of some columns, one after the other, each to where the error is least while the others stay.

    The error is ``E H E^T`` of each row with ``E = W - scale * (codes - zero_point)``. Column k takes
    ``clamp(rint(codes_k + gradient_k / (scale_k H_kk)), 0, 2**bits - 1)``, then each later column j
    ``gradient_j -= scale_k * (change of codes_k) * H_kj``. Products and differences are rounded apart.

    Args:
        codes: float64 [groups, n, W], integers 0..2**bits - 1.
        gradient: float64 [groups, n, W], these columns of ``E H``.
        scale: float64 [groups, n, W], > 0.
        curvature: float64 [groups, W, W], these rows and columns of H; its diagonal > 0.
        bits: 2..8.

    Returns:
        The new codes, float64 [groups, n, W]; 0 where the gradient is NaN.
    """
    return _native.ops.descend_codes.default(codes, gradient, scale, curvature, bits)


@torch.library.register_fake("cora::descend_codes")
def _(codes: Tensor, gradient: Tensor, scale: Tensor, curvature: Tensor, bits: int) -> Tensor:
    op = "descend_codes"
    check_bits(op, bits)
    check_dtype(op, "codes", codes, torch.float64)
    check(codes.dim() == 3, op, f"codes must have 3 dimensions, got shape {list(codes.shape)}")
    groups, _, columns = codes.shape
    for name, t in (("gradient", gradient), ("scale", scale)):
        check_dtype(op, name, t, torch.float64)
        check_shape(op, name, t, list(codes.shape))
    check_dtype(op, "curvature", curvature, torch.float64)
    check_shape(op, "curvature", curvature, [groups, columns, columns])
    return codes.new_empty(codes.shape)


torch.library.register_kernel("cora::quantization_error", "cuda", gpu.quantization_error)
torch.library.register_kernel("cora::error_feedback", "cuda", gpu.error_feedback)
torch.library.register_kernel("cora::descend_codes", "cuda", gpu.descend_codes)
