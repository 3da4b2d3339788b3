"""linear_lowrank at 4, 3 and 2 bits against torch's float32 linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import LINEARS, packed

from cora import ops

# bits, rank, x_bits
WAYS = {
    "W4": (4, 0, 0),
    "W4+r32": (4, 32, 0),
    "W4A8": (4, 0, 8),
    "W4A8+r32": (4, 32, 8),
    "W3A8+r32": (3, 32, 8),
    "W2A8+r32": (2, 32, 8),
}
COPIES = 8  # weights are rotated: few rows then read them from memory, not from a cache


@pytest.mark.parametrize("way", ["torch", *WAYS])
@pytest.mark.parametrize("m,k,n", LINEARS)
def bench_linear(measure: Any, m: int, k: int, n: int, way: str) -> None:
    x, turn = torch.randn(m, k), iter(range(10**9))
    group, flop = f"M{m} K{k} N{n}", 2.0 * m * k * n
    if way == "torch":
        weights = [torch.randn(n, k) for _ in range(COPIES)]
        run = lambda: torch.nn.functional.linear(x, weights[next(turn) % COPIES])  # noqa: E731
        measure(group, run, flop=flop, bytes=4.0 * n * k)
        return
    bits, rank, x_bits = WAYS[way]
    layers = [packed(n, k, bits, rank) for _ in range(COPIES)]

    def call() -> torch.Tensor:
        args, adapter = layers[next(turn) % COPIES]
        return ops.linear_lowrank(x, *args, **adapter, x_bits=x_bits)

    measure(group, call, flop=flop, bytes=n * k * bits / 8 + rank * (n + k))
