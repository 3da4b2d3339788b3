"""Budgets: from a target of bits, and the fewest bits at which fitted layers keep enough answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import batches, trained_net

import cora
from cora import Calibration, QuantSpec
from cora.evaluation import Evaluator
from cora.fitting import FittedLayers, Way, fit_layers, quantize_layer
from cora.joint import budget_for_bits, fit_for_bits, fit_within_budget, fit_within_drop
from cora.planning import Plan, PlanResult

WEIGHTS = 1000


@dataclass
class Fake:
    """Ladders from 2 to 8 bits, plans and judge of one: `alone` and `ordered` give the answers that change
    at so many bits with layers quantized by themselves and in order."""

    ordered: Callable[[float], float]
    alone: Callable[[float], float] = lambda bits: 0.5 ** (bits + 2)
    tried: list[tuple[float, bool]] = field(default_factory=list)
    weights: int = WEIGHTS
    least: int = 2 * WEIGHTS
    most: int = 8 * WEIGHTS

    def front(self) -> list[Any]:
        return [SimpleNamespace(stored=250 * i) for i in range(8, 33)]

    def bits(self, stored: float) -> float:
        return stored / WEIGHTS

    def parameters(self, plan: Any, _judge: Any) -> float:
        return self.alone(self.bits(plan.stored))

    def attempt(self, budget: float, in_order: bool) -> Any:
        assert self.least <= budget <= self.most
        self.tried.append((budget, in_order))
        changed = (self.ordered if in_order else self.alone)(self.bits(budget))
        return budget, SimpleNamespace(changed=lambda judge: judge.changed(changed))

    def run(self, most_changed: float) -> tuple[float, float]:
        judge: Any = SimpleNamespace(changed=lambda value: value)
        ladders: Any = self
        planned, _, changed = fit_within_drop(ladders, most_changed, judge, self.attempt, False)
        return planned, changed  # type: ignore[return-value]


def test_what_fitting_in_order_wins_is_spent() -> None:
    """Layers in order change a quarter: nearly two bits go, in the attempts that there are."""
    fake = Fake(lambda bits: 0.5 ** (bits + 4))
    budget, changed = fake.run(0.005)
    exact = WEIGHTS * (-math.log2(0.005) - 4)
    assert changed <= 0.005
    assert exact <= budget < exact + 150 < fake.tried[0][0] - 1500
    assert len(fake.tried) <= 4 and all(ordered for _, ordered in fake.tried)


def test_a_step_too_far_is_taken_back() -> None:
    """Where a bit costs more than twice the answers, the guess misses and the middle is tried."""
    fake = Fake(lambda bits: 0.2 ** (bits - 1), alone=lambda bits: 0.5 ** (bits + 1))
    budget, changed = fake.run(0.02)
    assert changed <= 0.02 and budget < fake.tried[0][0]
    assert any(fake.ordered(b / WEIGHTS) > 0.02 for b, _ in fake.tried)
    assert budget == min(b for b, _ in fake.tried if fake.ordered(b / WEIGHTS) <= 0.02)
    exact = WEIGHTS * (1 - math.log(0.02) / math.log(5))
    assert budget - exact < 0.25 * WEIGHTS < fake.tried[0][0] - exact


def test_layers_worse_in_order_get_more_bits() -> None:
    fake = Fake(lambda bits: 0.5 ** (bits + 1.5))
    budget, changed = fake.run(0.01)
    assert changed <= 0.01 and budget > fake.tried[0][0]


def test_layers_that_never_hold_in_order_stay_by_themselves() -> None:
    fake = Fake(lambda _: 1.0)
    budget, changed = fake.run(0.01)
    assert fake.tried[-1] == (budget, False) and budget == fake.tried[0][0]
    assert changed <= 0.01 and len(fake.tried) == 5


def test_the_fewest_bits_of_all() -> None:
    """No attempt goes below the ladders, and none is repeated."""
    fake = Fake(lambda _: 0.0)
    budget, changed = fake.run(0.05)
    assert budget == fake.least and changed == 0
    assert len(set(fake.tried)) == len(fake.tried)


def test_a_budget_of_bits() -> None:
    ladders: Any = Fake(lambda _: 0.0)
    assert budget_for_bits(ladders, 3.0) == 3 * WEIGHTS
    assert budget_for_bits(ladders, None) == 3.5 * WEIGHTS
    with pytest.raises(ValueError, match="target_bits must be at least 2.00 .*, got 1.5"):
        budget_for_bits(ladders, 1.5)
    ladders.least = 4 * WEIGHTS
    assert budget_for_bits(ladders, None) == 4 * WEIGHTS


@pytest.mark.parametrize(
    ("more", "budgets"),
    [
        ([0], [3000]),
        ([-50], [3000]),
        ([80, 80], [3000, 2920]),
        ([80, 95, 90], [3000, 2920, 2905]),
        ([400, 600], [3000, 2600]),
        ([2000], [3000]),
    ],
)
def test_layers_keep_to_the_budget_as_they_are_stored(more: list[int], budgets: list[int]) -> None:
    """Each plan's layers take so many bits more in order than planned; by themselves, what was planned."""
    left, tried = list(more), []

    def attempt(budget: float, in_order: bool) -> Any:
        if in_order:
            tried.append(budget)
        stored = budget + left.pop(0) if in_order else budget
        return PlanResult(Plan({}), budget), SimpleNamespace(stored=stored, in_order=in_order)

    planned, fitted = fit_for_bits(3000, 2500, attempt)
    assert planned.budget == 3000
    assert fitted.stored <= 3000  # type: ignore[attr-defined]
    assert tried == budgets
    assert fitted.in_order == (more[-1] <= 3000 - budgets[-1])


def test_stored_bits_are_those_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stored = FittedLayers.stored.fget
    monkeypatch.setattr(
        FittedLayers, "stored", property(lambda self: seen.append(stored(self)) or seen[-1])
    )
    calibration = Calibration(trained_net(), batches(4))
    model: Any = cora.quantize(calibration.model, calibration, target_bits=2.7, tune=None)
    layers = model.report.layers
    bits = sum(layer.stored_bits["weight"] + layer.stored_bits["adapter"] for layer in layers)
    assert seen == [bits]
    assert bits <= 2.7 * sum(layer.weights for layer in layers)
    assert model.report.settings["target_bits"] == pytest.approx(2.7)


@pytest.mark.parametrize(
    ("adapted", "plain", "kept"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, False)]
)
def test_adapters_must_pay(adapted: float, plain: float, kept: bool) -> None:
    """By what is measured of the fitted layers."""
    rank = SimpleNamespace(rank=1, loss=0.98), SimpleNamespace(rank=0, loss=1.0)
    ladders: Any = SimpleNamespace(rank=0, without_adapters=lambda: SimpleNamespace(rank=1))
    evaluator: Any = SimpleNamespace(score=lambda loss: torch.full((8,), loss))

    def search(from_: Any) -> Any:
        plan = Plan({"layer": rank[from_.rank]})  # type: ignore[dict-item]
        return PlanResult(plan, 1.0)

    def fit(plan: Plan, rival: Plan | None) -> Any:
        loss = adapted if plan.choices["layer"].rank else plain
        rivals = {} if rival is None else {"layer": 0.98}
        return SimpleNamespace(losses=lambda evaluator: evaluator.score(loss), rivals=rivals)

    planned, fitted = fit_within_budget(ladders, search, fit, evaluator)
    assert planned.plan.choices["layer"].rank == kept
    assert (fitted.losses(evaluator) == (adapted if kept else plain)).all()
    assert planned.candidates == {"adapters": adapted, "no adapters": plain}


@pytest.mark.parametrize(
    ("foreseen", "in_order", "fitted"),
    [(0.985, 0.9, False), (0.9, 0.985, False), (0.9, 0.9, True), (0.9, None, True)],
)
def test_adapters_that_promise_next_to_nothing_are_not_fitted(
    foreseen: float, in_order: float | None, fitted: bool
) -> None:
    """Neither by their plan, nor on the inputs of layers without them, where those are fitted in order."""
    rank = SimpleNamespace(rank=1, loss=foreseen), SimpleNamespace(rank=0, loss=1.0)
    ladders: Any = SimpleNamespace(rank=0, without_adapters=lambda: SimpleNamespace(rank=1))
    fits: list[tuple[int, bool]] = []

    def search(from_: Any) -> Any:
        plan = Plan({"layer": rank[from_.rank]})  # type: ignore[dict-item]
        return PlanResult(plan, 1.0, interrupted=not from_.rank)

    def fit(plan: Plan, rival: Plan | None) -> Any:
        fits.append((plan.choices["layer"].rank, rival is not None))
        rivals = {"layer": in_order} if rival is not None and in_order is not None else {}
        return SimpleNamespace(losses=lambda _: torch.ones(8), rivals=rivals)

    planned, _ = fit_within_budget(ladders, search, fit, None)  # type: ignore[arg-type]
    assert planned.plan.choices["layer"].rank == 0 and planned.interrupted
    assert fits == [(0, foreseen < 0.98), *[(1, False)] * fitted]


def test_without_adapters_in_the_plan_there_is_one_fit() -> None:
    ladders: Any = SimpleNamespace()
    result = PlanResult(Plan({"layer": SimpleNamespace(rank=0)}), 1.0)  # type: ignore[dict-item]
    fits = []
    found = fit_within_budget(ladders, lambda _: result, lambda p, _: fits.append(p) or "fit", None)  # type: ignore[arg-type, func-returns-value]
    assert found == (result, "fit") and fits == [result.plan]


@pytest.mark.parametrize("propagate", [True, False])
def test_of_a_real_model(propagate: bool) -> None:
    """The share in the report is that of half of the samples, and kept; with layers in order it costs less."""
    calibration = Calibration(trained_net(), batches(4))
    options: dict[str, Any] = {"progress": False, "tune": None, "propagate": propagate}
    qmodel: Any = cora.quantize(calibration.model, calibration, max_drop=6, **options)
    changed = qmodel.report.search["changed"]
    assert 0 <= changed <= 0.06
    answers = calibration.samples // 2
    assert changed * answers == pytest.approx(round(changed * answers))
    told = f"{changed:.2%} of the held-out answers changed before tuning, 6 % were allowed"
    assert told in str(qmodel.report)
    fixed: Any = cora.quantize(calibration.model, calibration, target_bits=3.5, **options)
    assert fixed.report.search["changed"] is None
    assert torch.isfinite(qmodel(batches(1)[0])).all()


def test_rivals_are_fitted_to_the_same_inputs() -> None:
    """A layer stored in another way too: its error there over its own; the layers are as without."""
    calibration = Calibration(trained_net(), batches(4))
    specs = dict.fromkeys(calibration.layers, QuantSpec(3))
    layers = {name: quantize_layer(name, calibration, spec, None) for name, spec in specs.items()}
    ways = {name: Way(spec, 0, 4) for name, spec in specs.items()}
    evaluator = Evaluator(calibration, 64, 16, 32, 0, lambda _: nullcontext())
    others = {
        "stem": Way(QuantSpec(3), 0, 4),
        "body.0": Way(QuantSpec(3), 6, 8),
        "head": Way(QuantSpec(2), 0, 4),
    }
    alone, beside = (
        fit_layers(calibration, layers, ways, "weighted", evaluator, others=o, progress=False)
        for o in (None, others)
    )
    assert alone.in_order and not alone.rivals
    assert beside.rivals.keys() == others.keys()
    assert beside.rivals["stem"] == 1 and beside.rivals["body.0"] < 0.9 < 2 < beside.rivals["head"]
    for name, matrix in alone.matrices().items():
        assert torch.equal(matrix, beside.matrices()[name])
