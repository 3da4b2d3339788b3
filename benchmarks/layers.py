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
        kind = "depthwise" if self.groups > 1 else f"{self.kernel}x{self.kernel}"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.batch} x {self.channels}@{self.size} -> {self.out}, {kind}{stride}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def window(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Kernel, stride, padding and dilation, as the ops take them."""
        return [self.kernel] * 2, [self.stride] * 2, [self.padding] * 2, [1, 1]

    @property
    def k(self) -> int:
        return self.channels // self.groups * self.kernel**2

    @property
    def side(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def input(self) -> tuple[int, int, int, int]:
        return (self.batch, self.channels, self.size, self.size)

    @property
    def output(self) -> tuple[int, int, int, int]:
        return (self.batch, self.out, self.side, self.side)

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.side**2 * self.out * self.k


@dataclass(frozen=True)
class Linear:
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"M {self.m}, K {self.k}, N {self.n}"

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.k * self.n


CONVS_3X3 = [
    Conv(b, c, s, c, 3) for b in (1, 8) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))
]
# ResNet-50: into and out of its bottlenecks, one pair a stage.
CONVS_1X1 = [
    Conv(b, *shape, 1)
    for b in (1, 8)
    for shape in (
        (256, 56, 64), (64, 56, 256), (512, 28, 128), (128, 28, 512),
        (1024, 14, 256), (256, 14, 1024), (2048, 7, 512), (512, 7, 2048),
    )
]  # fmt: skip

LINEARS = [
    Linear(m, k, n) for m in (1, 4, 128) for k, n in ((1024, 4096), (4096, 4096), (4096, 11008))
]


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


def rank_of(share: float, n: int, k: int, groups: int = 1) -> int:
    """`share` of the full rank, at least 1."""
    return max(1, int(share * min(n // groups, k)))


def rank_at(share: float, n: int, k: int, groups: int = 1) -> int:
    """The rank whose 8-bit adapter stores `share` of the bits of the float32 weight, at least 1: what
    `cora quantize --rank-budget` gives a layer on average."""
    return max(1, int(4 * share * n * k / (groups * k + n)))


def prepared(
    n: int,
    k: int,
    bits: int,
    rank: int,
    channels: int,
    kernel: list[int] | tuple[int, ...] = (),
    stride: list[int] | int = 1,
    padding: list[int] | int = 0,
    dilation: list[int] | int = 1,
    groups: int = 1,
) -> Tensor:
    """A random packed layer with bias and an 8-bit adapter, ready for `ops.run_layer`."""
    (codes, scale, zero_point, _), adapter = packed(n, k, bits, rank, groups)
    where = () if not kernel else tuple(kernel)
    pairs = [tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)]
    return ops.prepare_layer(
        codes, scale, zero_point, bits, channels, where, *pairs, groups, **adapter,
        bias=torch.randn(n) * 0.1,
    )  # fmt: skip
