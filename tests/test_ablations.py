"""The ablations of benchmarks/accuracy.py: every row has a place of its own, and can be made and drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import batches, trained_net

from cora import Calibration
from cora.batches import output_logits

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from ablations import ABLATIONS, ablation_tables, ablation_ways, draw_ablations


@pytest.fixture(scope="module")
def task() -> Any:
    return SimpleNamespace(
        model=trained_net,
        calibration=lambda samples, seed: batches(2, 24, labels=True),
        output_logits=output_logits,
    )


@pytest.fixture(scope="module")
def calibration(task: Any) -> Calibration:
    return Calibration(task.model(), task.calibration(48, 0), 48)


ARGUMENTS = argparse.Namespace(samples=48, target=[3.1, 4.1], bits=[2, 3])


@pytest.mark.parametrize("name", ABLATIONS)
def test_rows_of_an_ablation(name: str, task: Any, calibration: Calibration) -> None:
    ways = list(ablation_ways([name], task, calibration, 0, ARGUMENTS))
    assert len({(label, bits) for label, bits, *_ in ways}) == len(ways) >= 8
    places = [(place["ablation"], place["series"], place["x"]) for *_, place in ways]
    assert len(set(places)) == len(ways) and {p[0] for p in places} == {name}
    # A series is of one width, unless its axis is the width.
    widths: dict[str, set[float]] = {}
    for (_, bits, *_), (_, series, _) in zip(ways, places, strict=True):
        widths.setdefault(series, set()).add(bits)
    assert name in ("steps", "adapters") or all(len(found) == 1 for found in widths.values())


@pytest.mark.parametrize("name", ["steps", "composition", "clip"])
def test_an_ablation_s_row_is_made(name: str, task: Any, calibration: Calibration) -> None:
    label, bits, make, _ = list(ablation_ways([name], task, calibration, 0, ARGUMENTS))[-1]
    model, per_weight, total = make()
    with torch.no_grad():
        assert model(batches()[0]).isfinite().all()
    assert bits - 0.1 < per_weight and total > 0, label


def test_tables_and_plots(tmp_path: Path) -> None:
    rows = [
        {"ablation": name, "series": series, "x": x, "kl": 0.1 * x + seed * 0.01}
        for name in ABLATIONS
        for series in ("a", "b")
        for x in (1.0, 2.0)
        for seed in range(2)
    ]
    assert ablation_tables([]) == ""
    text = ablation_tables(rows)
    assert (
        text.count("### ") == len(ABLATIONS) and "| a | 0.105 ± 0.0071 | 0.205 ± 0.0071 |" in text
    )
    path = tmp_path / "ablations.png"
    draw_ablations([{"method": "cora", "kl": 1.0}], path)
    assert not path.exists()  # nothing to draw
    draw_ablations(rows, path)
    assert path.stat().st_size > 10_000
