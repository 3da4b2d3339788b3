"""What benchmarks/performance.py times is what cora runs: its layers are built with cora's own functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from rows import cases, packed_layer, rounded_layer


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 48, 3, padding=1), nn.Linear(64, 48)], ids=str)
def test_a_packed_layer(layer: nn.Conv2d | nn.Linear) -> None:
    packed = packed_layer(layer)
    x = torch.randn(2, 8, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(2, 64)
    packed.set_activation_range(torch.tensor([0.03]), torch.tensor([128]))
    assert packed(x).shape == layer(x).shape
    assert packed.rank == int(0.05 * 48) and packed.bits == 4
    rounded, residual = rounded_layer(layer)
    torch.testing.assert_close(rounded.dequantized + residual, layer.weight.detach().flatten(1))
    assert residual.abs().max() < layer.weight.abs().max() / 4


def test_the_contest_of_a_small_layer() -> None:
    """Every contestant that is there gives its own result of the right shape."""
    case = next(case for case in cases() if str(case) == "gemm: M 128, K 1024, N 4096")
    contest = case.build(1)
    assert any(name.startswith("cora W4") for name in contest.calls)
    for name, call in contest.calls.items():
        if name.startswith("cora"):
            assert call().shape == (128, 4096), name


def test_names_of_cases_are_their_own() -> None:
    names = [str(case) for case in cases()]
    assert len(set(names)) == len(names) > 40
