"""Layers and shapes the op tests run over: small, with tails of every tile dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cora import ops
from cora.quantizer import SUPPORTED_BITS

ALL_BITS = tuple(SUPPORTED_BITS)
RAGGED = (1, 7, 31, 33, 97)

# batch, group channels, H, W, group outputs, groups, kernel, stride, padding, dilation
CONVOLUTIONS = {
    "3x3": (2, 16, 9, 9, 40, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": (1, 33, 7, 5, 31, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    "first-layer": (1, 3, 14, 14, 33, 1, (7, 7), (2, 2), (3, 3), (1, 1)),
    "grey": (1, 1, 12, 11, 19, 1, (7, 7), (1, 1), (3, 3), (1, 1)),
    "strided": (2, 17, 9, 12, 7, 1, (3, 3), (2, 1), (1, 0), (1, 1)),
    "dilated": (1, 8, 12, 12, 16, 1, (3, 3), (1, 1), (2, 2), (2, 2)),
    "wide-kernel": (1, 18, 6, 11, 5, 1, (1, 5), (1, 1), (0, 2), (1, 1)),
    "grouped": (2, 8, 7, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "depthwise": (2, 1, 9, 7, 1, 35, (3, 3), (2, 2), (1, 1), (1, 1)),
    "multiplier": (1, 1, 6, 6, 2, 9, (5, 5), (1, 1), (2, 2), (1, 1)),
    "one-pixel": (3, 20, 1, 1, 12, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}


@dataclass
class Layer:
    """A random packed weight with everything a layer op takes."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    options: dict[str, Tensor | int]

    def args(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.weight, self.scale, self.zero_point, self.bits


def qparams(rows: int, groups: int, bits: int, *, far: bool = False) -> tuple[Tensor, Tensor]:
    """Scale in 0.02..0.12 and a zero-point that may lie outside the codes (far: near -2**23)."""
    scale = torch.rand(rows, groups) * 0.1 + 0.02
    zero_point = torch.randint(-5, 2**bits + 5, (rows, groups), dtype=torch.int32)
    return scale, zero_point - 2**23 if far else zero_point


def layer(
    n: int,
    k: int,
    bits: int = 4,
    *,
    rows: int | None = None,
    groups: int = 1,
    rank: int = 0,
    conv_groups: int = 1,
    adapter: torch.dtype = torch.int8,
    bias: bool = True,
    x_bits: int = 0,
    static: bool = False,
    far: bool = False,
) -> Layer:
    """A weight [n, k] with `groups` scale groups and an adapter of the given rank and dtype."""
    scale, zero_point = qparams(n if rows is None else rows, groups, bits, far=far)
    weight = ops.pack_bits(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    options: dict[str, Tensor | int] = {"x_bits": x_bits}
    if adapter == torch.int8:
        options["a"] = torch.randint(-128, 128, (conv_groups * rank, k), dtype=torch.int8)
        options["b"] = torch.randint(-128, 128, (n, rank), dtype=torch.int8)
        options["adapter_scale"] = torch.rand(conv_groups * rank) * 1e-4
    else:
        options["a"] = (torch.randn(conv_groups * rank, k) * 0.1).to(adapter)
        options["b"] = (torch.randn(n, rank) * 0.1).to(adapter)
    if bias:
        options["bias"] = torch.randn(n)
    if static:
        options["x_scale"] = torch.tensor([0.05])
        options["x_zero_point"] = torch.tensor([2**x_bits // 3], dtype=torch.int32)
    return Layer(weight, scale, zero_point, bits, options)
