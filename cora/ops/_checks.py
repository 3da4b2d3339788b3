"""What the fake kernels check of their arguments; the native ones' checks are csrc/check.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "Pair",
    "check",
    "check_bits",
    "check_dtype",
    "check_float",
    "check_operands",
    "check_packed",
    "check_qparams",
    "check_shape",
    "check_window",
    "dtype_name",
    "matrix_shape",
    "pair",
    "row_bytes",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Pair = int | tuple[int, ...]


def check(condition: Any, op: str, message: str) -> None:
    torch._check(condition, lambda: f"cora::{op}: {message}")


def dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def check_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    wanted = str(dtype).removeprefix("torch.")
    check(t.dtype == dtype, op, f"{name} must have dtype {wanted}, got {dtype_name(t)}")


def check_shape(op: str, name: str, t: Tensor, shape: list[Any]) -> None:
    fits = t.dim() == len(shape) and all(t.shape[i] == size for i, size in enumerate(shape))
    check(fits, op, f"{name} must have shape {shape}, got {list(t.shape)}")


def check_bits(op: str, bits: int) -> None:
    check(2 <= bits <= 8, op, f"bits must be 2..8, got {bits}")


def check_float(op: str, name: str, t: Tensor) -> None:
    wanted = "float32, float16 or bfloat16"
    check(t.dtype in FLOATS, op, f"{name} must have dtype {wanted}, got {dtype_name(t)}")


def check_qparams(op: str, scale: Tensor, zero_point: Tensor, rows: Any, cols: Any) -> None:
    check_dtype(op, "scale", scale, torch.float32)
    check_dtype(op, "zero_point", zero_point, torch.int32)
    shape = list(scale.shape)
    fits = (
        len(shape) == 2
        and shape[1] >= 1
        and (shape[0] == 1 or shape[0] == rows)
        and cols % shape[1] == 0
    )
    first = "1" if rows == 1 else f"1 or {rows}"
    check(fits, op, f"scale must have shape [{first}, G] with G a divisor of {cols}, got {shape}")
    check_shape(op, "zero_point", zero_point, shape)


def check_window(
    op: str, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check(min(values) >= least, op, f"{name} must be >= {least}, got {list(values)}")


def image_layout(x: Tensor) -> torch.memory_format:
    """The layout of what is computed from x [batch, channels, H, W]: channels_last if x is.

    Of one channel or one pixel, which is both layouts at once, the strides tell, as in torch.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    strides = x.stride()
    if last and x.is_contiguous():
        last = strides[1] == 1 and strides[3] == x.shape[1] and strides[0] != 1
    return torch.channels_last if last else torch.contiguous_format


def row_bytes(k: Any, bits: int) -> Any:
    return (k * bits + 7) // 8


def check_packed(
    op: str, name: str, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, k: Any
) -> None:
    check_bits(op, bits)
    check_dtype(op, name, packed, torch.uint8)
    check(packed.dim() == 2, op, f"{name} must have 2 dimensions, got shape {list(packed.shape)}")
    check(k >= 1, op, f"k must be >= 1, got {k}")
    check_shape(op, name, packed, [packed.shape[0], row_bytes(k, bits)])
    check_qparams(op, scale, zero_point, packed.shape[0], k)


def matrix_shape(x: Tensor) -> tuple[Any, Any]:
    if x.dim() < 2:
        return 1, x.numel()
    return x.shape[0], x.shape[1:].numel()


def check_operands(
    op: str,
    n: Any,
    k: Any,
    groups: int,
    a: Tensor | None,
    b: Tensor | None,
    adapter_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    check((a is None) == (b is None), op, "a and b must be given together")
    if a is not None and b is not None:
        fits = a.dtype in (torch.int8, *FLOATS)
        check(
            fits, op, f"a must have dtype int8, float16, bfloat16 or float32, got {dtype_name(a)}"
        )
        check_dtype(op, "b", b, a.dtype)
        check(b.dim() == 2, op, f"b must have 2 dimensions, got shape {list(b.shape)}")
        rank = b.shape[1]
        check_shape(op, "b", b, [n, rank])
        check_shape(op, "a", a, [groups * rank, k])
        if a.dtype == torch.int8:
            check(adapter_scale is not None, op, "adapter_scale must be given with an int8 adapter")
        else:
            check(adapter_scale is None, op, "adapter_scale must be None with a float adapter")
        if adapter_scale is not None:
            check_dtype(op, "adapter_scale", adapter_scale, torch.float32)
            check_shape(op, "adapter_scale", adapter_scale, [groups * rank])
    else:
        check(adapter_scale is None, op, "adapter_scale must be None without an adapter")
    if bias is not None:
        check_dtype(op, "bias", bias, torch.float32)
        check_shape(op, "bias", bias, [n])


def pair(value: Pair) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
