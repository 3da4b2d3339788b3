"""How each layer is stored: bits, groups and ranks chosen together, or ranks for quantizers that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .allocation import Budget
from .calibration import Calibration
from .evaluation import Evaluator
from .fitting import Fit, FittedLayers, QuantizedLayer, Way, fit_layers, quantize_layer
from .joint import budget_for_bits, fit_for_bits, fit_within_budget, fit_within_drop
from .lowrank import LayerShape
from .planning import ADAPTER_WIDTHS, Ladders, Plan, PlanResult, search_plan
from .quantizer import QuantSpec, weight_bits
from .report import float_weight_bits
from .search import SearchConfig, search_ranks

__all__ = ["Chooser"]


@dataclass(frozen=True, slots=True)
class Chooser:
    """Quantizes the layers of a model, by one of two ways to choose how each is stored.

    Args:
        calibration: the float model and its data.
        specs: layer -> quantizer, or what the choices share of it.
        search, adapter_bits, fit, propagate: as in `cora.quantize`.
        correct_means: its `bias_correction`.
        simulate: context manager that makes a float model quantize its activations.
    """

    calibration: Calibration
    specs: Mapping[str, QuantSpec]
    search: SearchConfig
    adapter_bits: int | None
    fit: Fit
    propagate: bool
    correct_means: bool
    simulate: Callable[[nn.Module], Any]
    progress: bool

    def evaluator(self, offset: int = 0, holdout: int | None = None) -> Evaluator:
        """Of the calibration samples; another offset splits and orders them in another way."""
        return Evaluator(
            self.calibration,
            self.search.samples,
            self.search.batch_size,
            self.search.holdout if holdout is None else holdout,
            self.search.seed + offset,
            self.simulate,
            self.search.loss,
            self.search.label_loss,
        )

    def fitted(
        self,
        layers: Mapping[str, QuantizedLayer],
        ways: Mapping[str, Way],
        in_order: bool = True,
        others: Mapping[str, Way] | None = None,
    ) -> FittedLayers:
        return fit_layers(
            self.calibration,
            layers,
            ways,
            self.fit,
            self.evaluator(),
            self.propagate and in_order,
            self.correct_means,
            others,
            self.progress,
        )

    def joint(
        self, target_bits: float | None, max_drop: float | None, adapters: bool, ends: set[str]
    ) -> tuple[FittedLayers, dict[str, Any]]:
        """Bits, groups and ranks of each layer chosen together; and what was found on the way.

        Args:
            adapters: whether any are tried.
            ends: layers that keep their quantizer.
        """
        tried = ADAPTER_WIDTHS if self.adapter_bits is None else (self.adapter_bits,)
        ladders = Ladders(
            self.calibration, self.specs, ends, tried if adapters else (), self.fit, self.progress
        )

        def attempt(budget: float, in_order: bool) -> tuple[PlanResult, FittedLayers]:
            def planned(ladders: Ladders) -> PlanResult:
                iterations = self.search.iterations if self.search.plan == "search" else 0
                return search_plan(ladders, budget, self.evaluator(), iterations, self.progress)

            def ways_of(plan: Plan) -> dict[str, Way]:
                return {
                    name: Way(choice.spec, choice.rank, choice.adapter_bits or tried[0])
                    for name, choice in plan.choices.items()
                }

            def fitted(plan: Plan, rival: Plan | None) -> FittedLayers:
                layers = {
                    name: quantize_layer(
                        name, self.calibration, way.spec, self.fit if way.rank else None
                    )
                    for name, way in plan.choices.items()
                }
                ways = ways_of(plan)
                others = {} if rival is None else ways_of(rival)
                differing = {name: way for name, way in others.items() if way != ways[name]}
                return self.fitted(layers, ways, in_order, differing)

            return fit_within_budget(ladders, planned, fitted, self.evaluator())

        changed = answers = None
        if max_drop is None:
            budget = budget_for_bits(ladders, target_bits)
            result, fitted = fit_for_bits(budget, ladders.least, attempt)
        else:
            judge = self.evaluator(holdout=self.search.samples)
            result, fitted, changed = fit_within_drop(
                ladders, max_drop / 100, judge, attempt, self.progress
            )
            answers = judge.answers
        return fitted, {
            "method": "joint",
            "target_bits": ladders.bits(result.budget),
            "changed": changed,
            "answers": answers,
            "front": [
                {"bits_per_weight": ladders.bits(plan.stored), "predicted": plan.loss}
                for plan in result.front
            ],
            "candidates": result.candidates,
            "history": result.history,
            "interrupted": result.interrupted,
        }

    def fixed(self, rank_budget: float) -> tuple[FittedLayers, dict[str, Any]]:
        """Each layer with the quantizer it was given, ranks chosen for a budget; and what was found."""
        shapes = {n: LayerShape.of(self.calibration.layers[n]) for n in self.specs}
        float_bits = float_weight_bits(self.calibration.layers[name] for name in self.specs)
        width = ADAPTER_WIDTHS[0] if self.adapter_bits is None else self.adapter_bits
        budget = Budget.of(shapes, rank_budget, float_bits, width)
        layers = {
            name: quantize_layer(name, self.calibration, spec, self.fit if budget.bits else None)
            for name, spec in self.specs.items()
        }
        plain_bits = sum(
            weight_bits(shapes[n].rows, shapes[n].columns, q.rounded.qparams)
            for n, q in layers.items()
        )
        weights = sum(s.rows * s.columns for s in shapes.values())
        result = search_ranks(
            {name: q.fit for name, q in layers.items()},
            budget,
            self.calibration,
            self.search,
            width,
            self.simulate,
            lambda adapter: (plain_bits + adapter) / weights,
            self.progress,
        )
        ways = {name: Way(spec, result.ranks[name], width) for name, spec in self.specs.items()}
        fitted = self.fitted(layers, ways)
        return fitted, {
            "method": result.method,
            "candidates": result.candidates,
            "history": result.history,
            "interrupted": result.interrupted,
        }
