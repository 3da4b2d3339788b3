"""What one choice brings while all others stay: the rows of `accuracy.py --ablation`, and their plots."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cora
from cora import Calibration, QuantSpec, SearchConfig
from cora.batches import Batch
from cora.tasks import Task

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of the float bits, what adapters may take
METHODS = ("uniform", "energy", "sensitivity", "gate")
_ROUNDINGS = {"nearest": "nearest", "error feedback": "gptq"}  # as rows call them
_OVER_BITS = ("steps", "adapters")  # ablations whose axis is bits
ONE = {"propagate": False, "tune": None}  # the step that is looked at, without those after it


def quantized(model: nn.Module, calibration: Calibration, **options: Any) -> Any:
    """A function that quantizes, and gives the model, its bits a weight and all its stored bits.

    Embeddings and recurrent layers stay float, as they do in other libraries.
    """
    options = {"embedding_bits": None, "recurrent_bits": None, **options}

    def make() -> tuple[nn.Module, float, int]:
        qmodel = cora.quantize(model, calibration, progress=False, **options)
        totals = qmodel.report.totals
        return qmodel, totals["bits_per_weight"], int(totals["total_bits"])

    return make


class _Ways:
    """Names an ablation's rows and says where they stand in its plot."""

    def __init__(
        self, task: Task, calibration: Calibration, seed: int, args: argparse.Namespace
    ) -> None:
        self.task, self.calibration, self.seed, self.args = task, calibration, seed, args
        self.model = task.model()
        self.ablation = ""

    def search(self, **changes: Any) -> SearchConfig:
        return SearchConfig(**{"seed": self.seed, "samples": self.args.samples, **changes})

    def way(
        self,
        series: str,
        x: float,
        bits: float,
        calibration: Calibration | None = None,
        **options: Any,
    ) -> Any:
        calibration = calibration or self.calibration
        options.setdefault("search", self.search())
        label = series if self.ablation in _OVER_BITS else f"{series}, {bits:g} bits"
        place = {"ablation": self.ablation, "series": label, "x": x}
        return (
            f"{self.ablation}: {series}, {x}",
            bits,
            quantized(self.model, calibration, **options),
            place,
        )

    def fixed(self, series: str, x: float, spec: QuantSpec, **options: Any) -> Any:
        """The same quantizer in every layer, and no step after it."""
        return self.way(series, x, spec.bits, weight=spec, **ONE, **options)

    # One method an ablation; the first line of its docstring labels the plot's axis.

    def steps(self) -> Iterator[Any]:
        """target bits"""
        for target in self.args.target:
            for label, changes in {
                "plan": ONE,
                "plan searched": {**ONE, "search": self.search(plan="search")},
                "plan, layers in order": {"tune": None},
                "plan, in order, tuned": {},
            }.items():
                yield self.way(label, target, target, target_bits=target, **changes)

    def adapters(self) -> Iterator[Any]:
        """bits of the codes"""
        for name, rounding in _ROUNDINGS.items():
            for fit, budget in (("plain", 0.0), ("plain", 0.05), ("weighted", 0.05)):
                for bits in self.args.bits:
                    yield self.fixed(
                        f"{name}, {f'{fit} adapters' if budget else 'none'}",
                        bits,
                        QuantSpec(bits, rounding=rounding),
                        fit=fit,
                        rank_budget=budget,
                        search=self.search(method="sensitivity"),
                    )

    def ranks(self) -> Iterator[Any]:
        """adapters, share of the float bits"""
        for name, rounding in _ROUNDINGS.items():
            for bits in (2, 3):
                for budget in BUDGETS:
                    for method in METHODS:
                        spec = QuantSpec(bits, rounding=rounding)
                        search = self.search(method=method)
                        yield self.fixed(
                            f"{name}, {method}", budget, spec, rank_budget=budget, search=search
                        )

    def order(self) -> Iterator[Any]:
        """order of the gate"""
        yield from self._searched("order", (1, 2, 4, 8, 16))

    def iterations(self) -> Iterator[Any]:
        """iterations of the rank search"""
        yield from self._searched("iterations", (0, 15, 30, 60, 120, 250))

    def _searched(self, option: str, values: Sequence[int]) -> Iterator[Any]:
        for name, rounding in _ROUNDINGS.items():
            for value in values:
                spec = QuantSpec(2, rounding=rounding)
                search = self.search(method="gate", **{option: value})
                # Larger budgets leave nothing for the search to find.
                yield self.fixed(f"{name}, 2 %", value, spec, rank_budget=0.02, search=search)

    def widths(self) -> Iterator[Any]:
        """bits of an adapter's elements"""
        for bits in (2, 3):
            for width in (2, 3, 4, 6, 8, 16):
                search = self.search(method="sensitivity")
                yield self.fixed(
                    "adapters 5 %", width, QuantSpec(bits), adapter_bits=width, search=search
                )

    def clip(self) -> Iterator[Any]:
        """range: standard deviations; 6: min to max, 7: least error"""
        for name, rounding in _ROUNDINGS.items():
            for bits in (2, 3, 4):
                for x in (2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0):
                    clip: Any = {6.0: "minmax", 7.0: "mse"}.get(x, "ksigma")
                    spec = QuantSpec(bits, clip=clip, k=x, rounding=rounding)
                    yield self.fixed(name, x, spec, rank_budget=0)

    def granularity(self) -> Iterator[Any]:
        """weights a scale; 0: a tensor, 1: a channel; more: first and last layer stay float"""
        for bits in (2, 3, 4):
            for size in (0, 1, 144, 72, 36):
                granularity: Any = {0: "per_tensor", 1: "per_channel"}.get(size, "per_group")
                spec = QuantSpec(bits, granularity, size if size > 1 else None)
                # The first and last layers' rows have no such groups.
                names = list(self.calibration.layers)
                skip = [names[0], names[-1]] if size > 1 else []
                yield self.fixed("error feedback", size, spec, rank_budget=0, skip=skip)

    def calibration_size(self) -> Iterator[Any]:
        """calibration samples"""
        for samples in (16, 64, 256, 1024, 1600):
            made = self._calibration(self.task.calibration(samples, self.seed), samples)
            yield from self._on(made, samples)

    def composition(self) -> Iterator[Any]:
        """calibration: 0 all classes, 1 one class, 2 noise of the images' mean and deviation"""
        batches = [Batch(b) for b in self.task.calibration(1600, self.seed)]
        x = torch.cat([batch.args[0] for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        one = x[labels == labels.bincount().argmax()]
        mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        generator = torch.Generator().manual_seed(self.seed)
        noise = mean + deviation * torch.randn(one.shape, generator=generator)
        for place, images in enumerate((x[: len(one)], one, noise)):
            yield from self._on(self._calibration([images], len(images)), place)

    def _calibration(self, batches: Any, samples: int) -> Calibration:
        logits = self.task.output_logits
        return Calibration(self.model, batches, samples, self.seed, logits=logits)

    def _on(self, calibration: Calibration, x: float) -> Iterator[Any]:
        for target in (2.6, 3.6):
            yield self.way("cora", x, target, calibration, target_bits=target)
        yield self.fixed("error feedback", x, QuantSpec(3), calibration=calibration, rank_budget=0)


ABLATIONS = (
    *("steps", "adapters", "ranks", "order", "iterations", "widths", "clip", "granularity"),
    *("calibration_size", "composition"),
)


def ablation_ways(
    names: Sequence[str], task: Task, calibration: Calibration, seed: int, args: argparse.Namespace
) -> Iterator[Any]:
    """(label, bits, maker, place in the plot) of every row of some ablations."""
    ways = _Ways(task, calibration, seed, args)
    for name in names:
        ways.ablation = name
        yield from getattr(ways, name)()


Found = dict[str, dict[str, dict[float, list[float]]]]
"""Ablation -> series -> x -> KL of each seed."""


def _found(rows: Sequence[dict[str, Any]]) -> Found:
    found: Found = {}
    for row in rows:
        if "ablation" in row:
            series = found.setdefault(row["ablation"], {}).setdefault(row["series"], {})
            series.setdefault(row["x"], []).append(row["kl"])
    return {name: found[name] for name in ABLATIONS if name in found}


def ablation_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a table an ablation: KL, a row a series, a column for what was changed."""
    lines = []
    for name, lined in _found(rows).items():
        xs = sorted({x for points in lined.values() for x in points})
        lines += [
            f"\n### {name.replace('_', ' ')}\n",
            f"KL; columns: {getattr(_Ways, name).__doc__}.\n",
            "| | " + " | ".join(f"{x:g}" for x in xs) + " |",
            "|---|" + "---|" * len(xs),
        ]
        for series, points in lined.items():
            cells = []
            for x in xs:
                values = points.get(x, [])
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
            lines.append(f"| {series} | {' | '.join(cells)} |")
    return "\n".join(["\n## Ablations\n", "![](ablations.png)", *lines]) if lines else ""


def draw_ablations(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel an ablation: KL over what was changed, a line a series, bars over the seeds."""
    from matplotlib.figure import Figure

    found = _found(rows)
    if not found:
        return
    columns = 2
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(7 * columns, 4.4 * lines), layout="constrained")
    for place, name in enumerate(found):
        axes = figure.add_subplot(lines, columns, place + 1)
        for i, (label, points) in enumerate(found[name].items()):
            xs = sorted(points)
            middle = [statistics.mean(points[x]) for x in xs]
            spread = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
            style = "-" if i < 10 else "--"  # there are ten colours
            axes.errorbar(xs, middle, spread, ls=style, marker="o", ms=3, capsize=2, label=label)
        axes.set_yscale("log")
        if name in ("ranks", "order", "calibration_size"):
            axes.set_xscale("log")
        axes.set(title=name.replace("_", " "), xlabel=getattr(_Ways, name).__doc__)
        axes.set_ylabel("KL to the float network, nats")
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
