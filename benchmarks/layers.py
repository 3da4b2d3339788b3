"""Real layer shapes, and random packed weights for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cora import ops


@dataclass(frozen=True)
class Conv:
    batch: int
    channels: int
    size: int
    out: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        kind = "dw" if self.groups > 1 else f"{self.kernel}x{self.kernel}"
        return f"{self.batch}x{self.channels}@{self.size}-{self.out}-{kind}"

    @property
    def k(self) -> int:
        return self.channels // self.groups * self.kernel**2

    @property
    def flop(self) -> float:
        side = (self.size - 1) // self.stride + 1
        return 2.0 * self.batch * side**2 * self.out * self.k


# ResNet-18's 3x3 stages and first layer, two of ResNet-50's 1x1, one of EfficientNet's depthwise
# layers.
CONVS = [
    *(Conv(b, c, s, c, 3) for b in (1, 8) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    Conv(1, 3, 224, 64, 7, 2),
    Conv(1, 256, 56, 64, 1),
    Conv(8, 1024, 14, 256, 1),
    Conv(1, 144, 56, 144, 3, 1, 144),
]

# (rows, K, N)
LINEARS = [(1, 1024, 4096), (1, 4096, 4096), (4, 4096, 4096), (16, 4096, 4096), (128, 4096, 4096)]


def packed(
    n: int, k: int, bits: int, rank: int, groups: int = 1
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """(weight, scale, zero_point, bits) and an int8 adapter's arguments."""
    scale = torch.rand(n, 1) * 0.01 + 0.01
    zero_point = torch.full((n, 1), 2 ** (bits - 1) - 1, dtype=torch.int32)
    weight = ops.pack_bits(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    adapter: dict[str, Tensor] = {}
    if rank:
        adapter["a"] = torch.randint(-127, 128, (groups * rank, k), dtype=torch.int8)
        adapter["b"] = torch.randint(-127, 128, (n, rank), dtype=torch.int8)
        adapter["adapter_scale"] = torch.rand(groups * rank) * 1e-4
    return (weight, scale, zero_point, bits), adapter


def rank_at(share: float, n: int, k: int, groups: int = 1) -> int:
    """The rank whose adapter has `share` of the weight's parameters, at least 1."""
    return max(1, int(share * n * k / (groups * k + n)))
