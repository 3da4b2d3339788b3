"""lowrank_factors, plain and weighted, against torch.linalg.svd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cora import ops

SHAPES = [(64, 576), (256, 2304), (512, 4608), (2048, 512)]


@pytest.mark.parametrize("way", ["torch.linalg.svd", "cora", "cora-weighted"])
@pytest.mark.parametrize("n,k", SHAPES)
def bench_lowrank(measure: Any, n: int, k: int, way: str) -> None:
    residual = torch.randn(n, k) * 0.01
    x = torch.randn(2 * k, k)
    moment = (x.T @ x / (2 * k))[None] if way == "cora-weighted" else None
    run = {"torch.linalg.svd": lambda: torch.linalg.svd(residual, full_matrices=False)}.get(
        way, lambda: ops.lowrank_factors(residual, min(32, n, k), 1, moment)
    )
    measure(f"{n}x{k}", run)
