"""conv2d_lowrank at 4 bits against torch's float32 convolution (oneDNN), both memory formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import CONVS, Conv, packed, rank_at

from cora import ops

WAYS = {"W4": (0.0, 0), "W4+5%": (0.05, 0), "W4A8": (0.0, 8), "W4A8+5%": (0.05, 8)}


@pytest.mark.parametrize("format", ["nhwc", "nchw"])
@pytest.mark.parametrize("way", ["torch", *WAYS])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def bench_conv2d(measure: Any, conv: Conv, way: str, format: str) -> None:
    layout = torch.channels_last if format == "nhwc" else torch.contiguous_format
    x = torch.randn(conv.batch, conv.channels, conv.size, conv.size).to(memory_format=layout)
    where = (conv.stride, conv.kernel // 2, 1, conv.groups)
    if way == "torch":
        weight = torch.randn(conv.out, conv.channels // conv.groups, conv.kernel, conv.kernel)
        weight = weight.to(memory_format=layout)
        measure(f"{conv} {format}", lambda: torch.conv2d(x, weight, None, *where), flop=conv.flop)
        return
    share, x_bits = WAYS[way]
    rank = rank_at(share, conv.out // conv.groups, conv.k) if share else 0
    args, adapter = packed(conv.out, conv.k, 4, rank, conv.groups)
    run = lambda: ops.conv2d_lowrank(x, *args, conv.kernel, *where, **adapter, x_bits=x_bits)  # noqa: E731
    measure(f"{conv} {format}", run, flop=conv.flop)
