"""Per-layer times and floors of a packed model: exact counts, names, order, shared layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cora
from cora.batches import Batch
from cora.roofline import LayerTime, Roof, measure_roof, time_layers

ROOF = Roof(integer=1e12, floating=1e11, bandwidth=1e10)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        x = torch.relu(self.depthwise(self.depthwise(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 12, 12) for _ in range(2)]
    search = cora.SearchConfig(method="uniform")
    return cora.quantize(
        Small().eval(),
        batches,
        cora.QuantSpec(),
        activation_bits=8,
        search=search,
        rank_budget=0.2,
        tune=None,
        progress=False,
    )


def timed(model: nn.Module) -> dict[str, LayerTime]:
    found = time_layers(model, Batch(torch.randn(2, 3, 12, 12)), ROOF, 0)
    assert [t.name for t in found] == ["conv", "depthwise", "fc"]
    return {t.name: t for t in found}


@pytest.mark.parametrize("fused", [False, True], ids=["packed", "fused"])
def test_operations_are_exact(packed: nn.Module, fused: bool) -> None:
    model = cora.fuse(packed, torch.randn(2, 3, 12, 12), merge=False) if fused else packed
    found = timed(model)
    positions = 2 * 6 * 6
    rank = {name: packed.get_submodule(name).rank for name in found}
    assert rank["conv"] > 0
    expected = {
        "conv": 2 * positions * (16 * 27 + rank["conv"] * (16 + 27)),
        "depthwise": 2 * 2 * positions * (16 * 9 + rank["depthwise"] * (16 + 16 * 9)),  # runs twice
        "fc": 2 * 2 * (5 * 16 + rank["fc"] * (5 + 16)),
    }
    assert {name: t.operations for name, t in found.items()} == expected
    assert all(t.ms > 0 and t.reached == t.floor_ms / t.ms for t in found.values())


def test_fused_layers_move_fewer_bytes(packed: nn.Module) -> None:
    before = timed(packed)
    after = timed(cora.fuse(packed, torch.randn(2, 3, 12, 12), merge=False))
    # conv: its output is codes with a border of one pixel instead of float32.
    positions = 2 * 6 * 6
    assert before["conv"].bytes - after["conv"].bytes == 16 * (4 * positions - 2 * 8 * 8)


def test_merged_layers_have_no_adapter(packed: nn.Module) -> None:
    found = timed(cora.fuse(packed, torch.randn(2, 3, 12, 12), merge=True))
    assert found["conv"].operations == 2 * 2 * 6 * 6 * 16 * 27


def test_hooks_are_removed(packed: nn.Module) -> None:
    timed(packed)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in packed.modules())


def test_floor_is_the_slower_of_the_two() -> None:
    assert ROOF.floor(1e9, 1e5, integer=True) == (1e-3, "operations")
    assert ROOF.floor(1e9, 1e5, integer=False) == (1e-2, "operations")
    assert ROOF.floor(1e3, 1e7, integer=True) == (1e-3, "bytes")


def test_roof_is_measured() -> None:
    roof = measure_roof(0, torch.device("cpu"))
    assert roof.integer >= roof.floating > 1e8 and roof.bandwidth > 1e7
