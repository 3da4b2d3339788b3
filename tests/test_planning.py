"""Plans: the hull, the best under a budget against brute force, the search and its promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import batches, trained_net
from torch import Tensor, nn

import cora
from cora import Calibration, QuantSpec
from cora.evaluation import Evaluator
from cora.lowrank import LayerShape, rank_bits
from cora.planning import (
    Choice,
    Ladders,
    Plan,
    _hull,
    _undominated,
    cheapest_plan,
    group_sizes,
    search_plan,
)

NAMES = ["stem", "depthwise", "pointwise", "body.0", "head"]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(trained_net(), batches(4))


def ladders_of(calibration: Calibration, **options: Any) -> Ladders:
    specs = dict.fromkeys(calibration.layers, QuantSpec())
    return Ladders(calibration, **{"specs": specs, "progress": False, **options})


@pytest.fixture(scope="module")
def ladders(calibration: Calibration) -> Ladders:
    return ladders_of(calibration)


def evaluator_of(calibration: Calibration, seed: int = 0) -> Evaluator:
    return Evaluator(calibration, 64, 16, 32, seed, lambda _: nullcontext())


def most(ladders: Ladders) -> int:
    return sum(steps[-1].stored for steps in ladders.steps.values())


def budgets_of(ladders: Ladders, count: int = 25) -> Iterator[float]:
    for i in range(count):
        yield ladders.least + (most(ladders) - ladders.least) * i / (count - 1)


# --- Ladders -------------------------------------------------------------------------------------


def assert_convex(steps: list[Choice]) -> None:
    """Dearer steps are better, and each bit buys less than the one before."""
    slopes = []
    for cheap, dear in itertools.pairwise(steps):
        assert cheap.stored < dear.stored and cheap.loss > dear.loss
        slopes.append((cheap.loss - dear.loss) / (dear.stored - cheap.stored))
    assert slopes == sorted(slopes, reverse=True) and len(set(slopes)) == len(slopes)


def test_the_hull_of_random_choices() -> None:
    generator = torch.Generator().manual_seed(5)
    for count in (1, 2, 3, 10, 200):
        stored = torch.randint(1, 60, (count,), generator=generator).tolist()
        losses = torch.rand(count, generator=generator).tolist()
        choices = [Choice(QuantSpec(), 0, 0, s, v) for s, v in zip(stored, losses, strict=True)]
        hull = _hull(_undominated(choices))
        assert_convex(hull)
        assert set(hull) <= set(choices)
        assert hull[0].stored == min(stored) and hull[-1].loss == min(losses)
        for choice in choices:  # nothing lies under it
            for cheap, dear in itertools.pairwise(hull):
                if cheap.stored <= choice.stored <= dear.stored:
                    share = (choice.stored - cheap.stored) / (dear.stored - cheap.stored)
                    line = cheap.loss + share * (dear.loss - cheap.loss)
                    assert choice.loss >= line - 1e-9


def test_ladders(calibration: Calibration, ladders: Ladders) -> None:
    assert list(ladders.steps) == NAMES
    for name, steps in ladders.steps.items():
        assert_convex(steps)
        assert len(steps) > 4 and steps[0].spec.bits == 2 and steps[-1].spec.bits == 8
        assert all(math.isfinite(step.loss) and step.loss > 0 for step in steps)
        shape = LayerShape.of(calibration.layers[name])
        assert all(0 <= step.rank <= shape.full_rank for step in steps)
    assert ladders.weights == sum(m.weight.numel() for m in calibration.layers.values())
    assert ladders.bits(ladders.least) == ladders.least / ladders.weights > 2


@pytest.mark.parametrize("pay", [True, False])
def test_what_a_step_says_is_what_is_stored(
    calibration: Calibration, ladders: Ladders, pay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan's bits are those of the packed layers, and its weights those that are packed; whether adapters pay
    or not."""
    monkeypatch.setattr("cora.joint.is_better", lambda _gain, _errors: pay)
    net = trained_net()
    for bits in (3.2, 5.0):
        options: dict[str, Any] = {"progress": False, "bias_correction": False}
        adapted = ladders.best(bits * ladders.weights)
        plan = adapted if pay else ladders.without_adapters().best(bits * ladders.weights)
        assert any(choice.rank for choice in adapted.choices.values())
        qmodel = cora.quantize(
            net, calibration, target_bits=bits, tune=None, propagate=False, **options
        )
        stored = {
            row.name: row.stored_bits["weight"] + row.stored_bits["adapter"]
            for row in qmodel.report.layers
        }
        assert stored == {name: choice.stored for name, choice in plan.choices.items()}
        for name, choice in plan.choices.items():
            weight = qmodel.get_submodule(name).weight
            torch.testing.assert_close(weight, ladders.weight(name, choice), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adapter_bits", [(), (4,)], ids=str)
def test_large_layers_are_tried_by_a_share_of_their_rows(
    calibration: Calibration, adapter_bits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is that of all rows; errors are about theirs. Other layers are as before."""
    ladders = ladders_of(calibration, adapter_bits=adapter_bits)
    whole = {name: ladders._measure(name, QuantSpec()) for name in NAMES}
    largest = calibration.matrix("body.0")
    monkeypatch.setattr("cora.planning._ROUNDING_WORK", largest.numel() * largest.shape[1] / 3)
    for name, (choices, probes, probed) in whole.items():
        found, found_probes, found_probed = ladders._measure(name, QuantSpec())
        pairs = list(zip(choices, found, strict=True))
        assert all((a.spec, a.rank, a.stored) == (b.spec, b.rank, b.stored) for a, b in pairs)
        ratios = torch.tensor([b.loss / a.loss for a, b in pairs])  # not losses yet: errors
        if name == "body.0":
            assert not (ratios == 1).any()
            assert ratios.log().mean().abs() < 0.1 and ratios.log().std() < 0.1, ratios
            assert found_probed == pytest.approx(probed, rel=0.1)
        else:
            assert (ratios == 1).all() and found_probed == probed
            assert all(map(torch.equal, found_probes, probes))


@pytest.mark.parametrize("size", [1e-16, 1.0])
def test_a_share_of_rows_of_any_size(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rows of the share are pruned, all rows are looked at."""
    net = nn.Sequential(nn.Linear(16, 12)).requires_grad_(False)
    net[0].weight.mul_(size)
    net[0].weight[0] = net[0].weight[6] = 0
    calibration = Calibration(net, [torch.randn(64, 16)])
    whole, _, _ = ladders_of(calibration, adapter_bits=())._measure("0", QuantSpec())
    for share in (5, 6):
        work = 12 * 16 * 16 / share
        monkeypatch.setattr("cora.planning._ROUNDING_WORK", work)
        found, _, _ = ladders_of(calibration, adapter_bits=())._measure("0", QuantSpec())
        for a, b in zip(whole, found, strict=True):
            assert a.loss == b.loss if share == 6 else 0.2 < b.loss / a.loss < 5


def test_ladders_without_adapters(ladders: Ladders) -> None:
    """Every way of codes alone is there, those that adapters had beaten too; the ladders stay as they were."""
    before = {name: list(steps) for name, steps in ladders.steps.items()}
    plain = ladders.without_adapters()
    assert ladders.steps == before and any(w.rank for ways in ladders.ways.values() for w in ways)
    beaten = 0
    for name, ways in plain.ways.items():
        assert not any(way.rank for way in ways)
        known = [way for way in ladders.ways[name] if not way.rank]
        assert all(way in ways for way in known)
        beaten += len(ways) - len(known)
        assert_convex(plain.steps[name])
    assert beaten > 0
    for budget in budgets_of(ladders, 7):
        assert plain.best(budget).loss >= ladders.best(budget).loss * (1 - 1e-9)


def test_adapters_of_each_width_are_ways_to_store_a_layer() -> None:
    """A residual of few directions is worth fine factors, and every width is counted as it is stored."""
    torch.manual_seed(4)
    layer = nn.Linear(64, 64)
    with torch.no_grad():  # what one scale a channel rounds badly, in one direction
        layer.weight.mul_(0.01).add_(torch.randn(64, 1).exp() @ torch.randn(1, 64).sign() * 0.05)
    found = ladders_of(Calibration(layer, torch.randn(256, 64)), specs={"": QuantSpec()})
    ways = found.ways[""]
    assert {way.adapter_bits for way in ways if way.rank} <= {4, 8}
    for way in ways:
        assert (way.rank == 0) == (way.adapter_bits == 0)
        if way.rank:
            rest = way.stored - way.rank * rank_bits(found.shapes[""], way.adapter_bits)
            plain = [w.stored for w in found._measure("", QuantSpec())[0] if not w.rank]
            assert rest in plain


def test_groups_are_of_whole_channels() -> None:
    for layer in (nn.Linear(96, 8), nn.Conv2d(24, 8, 3), nn.Conv1d(64, 64, 5, groups=2)):
        columns = LayerShape.of(layer).columns
        taps = math.prod(getattr(layer, "kernel_size", ()))
        sizes = group_sizes(layer)
        assert sizes[0] is None and len(sizes) > 1
        assert all(columns % size == 0 and size % taps == 0 for size in sizes[1:] if size)
    assert group_sizes(nn.Conv2d(16, 16, 3, groups=16)) == [None]


def test_fixed_layers_keep_their_quantizer(calibration: Calibration) -> None:
    spec = QuantSpec(8, "per_tensor", clip="minmax")
    specs = {**dict.fromkeys(NAMES, QuantSpec()), "stem": spec, "head": spec}
    found = ladders_of(calibration, specs=specs, fixed=["stem", "head"])
    for name in ("stem", "head"):
        assert [(step.spec, step.rank) for step in found.steps[name]] == [(spec, 0)]
    assert all(len(found.steps[name]) > 4 for name in NAMES[1:-1])


def test_choices_share_clip_symmetry_and_rounding(calibration: Calibration) -> None:
    base = QuantSpec(symmetric=True, clip="minmax", rounding="nearest")
    found = ladders_of(calibration, specs=dict.fromkeys(NAMES, base), adapter_bits=())
    for step in itertools.chain(*found.steps.values()):
        shared = step.spec.replace(bits=base.bits, granularity="per_channel", group_size=None)
        assert shared == base and step.rank == 0


def test_a_residual_of_low_rank_gets_an_adapter() -> None:
    """A few rows of large weights in every column pair: what a shared scale of a row cannot hold."""
    torch.manual_seed(3)
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.mul_(0.1).add_(torch.randn(64, 1) @ torch.randn(1, 64))
    model = nn.Sequential(layer, nn.Linear(64, 8))
    found = ladders_of(Calibration(model, torch.randn(256, 64)))
    assert any(step.rank > 0 for step in found.steps["0"])
    assert not any(
        step.rank
        for steps in ladders_of(
            Calibration(model, torch.randn(64, 64)), adapter_bits=()
        ).steps.values()
        for step in steps
    )


def test_predicted_losses_rank_the_layers(calibration: Calibration, ladders: Ladders) -> None:
    """Of one layer at 2 bits, the rest float: the prediction against the measured divergence."""
    evaluator = evaluator_of(calibration)
    ratios = []
    for name in NAMES:
        two = next(s for s in ladders.steps[name] if s.spec.bits == 2)
        weights = evaluator.weights({name: ladders.weight(name, two)})
        measured = torch.cat(
            [
                evaluator.losses(weights, batch, teacher)
                for batch, teacher in zip(calibration.batches, calibration.teacher(), strict=True)
            ]
        )
        ratios.append(two.loss / float(measured.mean()))
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios


# --- The best under a budget ---------------------------------------------------------------------


def test_best_keeps_the_budget_and_falls_with_it(ladders: Ladders) -> None:
    losses = []
    for budget in budgets_of(ladders, 60):
        plan = ladders.best(budget)
        assert plan.stored <= budget
        losses.append(plan.loss)
        # Nothing that is left would pay for one more step of a layer.
        for name, choice in plan.choices.items():
            i = ladders.ways[name].index(choice)
            for dearer in ladders.ways[name][i + 1 :]:
                assert plan.stored - choice.stored + dearer.stored > budget
    assert all(b <= a * 1.1 for a, b in itertools.pairwise(losses))
    assert losses[-1] < 1e-3 * losses[0]
    assert ladders.best(10 * most(ladders)).stored == most(ladders)


def test_best_against_brute_force(ladders: Ladders) -> None:
    """All combinations of three layers: it misses at most what one step of one layer wins."""
    three = object.__new__(Ladders)
    names = ["depthwise", "pointwise", "head"]
    three.steps = {name: ladders.steps[name] for name in names}
    three.ways = {name: ladders.ways[name] for name in names}
    plans = [
        Plan(dict(zip(names, choices, strict=True)))
        for choices in itertools.product(*three.ways.values())
    ]
    exact = 0
    for budget in budgets_of(three, 40):
        best = min(plan.loss for plan in plans if plan.stored <= budget)
        found = three.best(budget)
        steps = [
            choice.loss - three.steps[name][level + 1].loss
            for name, choice in found.choices.items()
            if (level := three.level(name, choice)) + 1 < len(three.steps[name])
        ]
        assert best - 1e-12 <= found.loss <= best + max(steps, default=0.0)
        exact += found.loss <= best * (1 + 1e-9)
    assert exact >= 10
    # At the corners of the joint front the closed form is the best of all.
    for price in (1e-3, 1e-4, 1e-5, 1e-6):
        corner = min(plans, key=lambda plan: plan.loss + price * plan.stored)
        assert three.best(corner.stored).loss == pytest.approx(corner.loss, rel=1e-9)


def test_the_front(ladders: Ladders) -> None:
    plans = ladders.front()
    stored = [plan.stored for plan in plans]
    assert stored == sorted(stored) and len(plans) > 12
    assert stored[0] >= ladders.least and stored[-1] == most(ladders)
    assert plans[-1].loss < plans[0].loss


# --- The search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 12, 30])
def test_the_search_keeps_budget_and_measurements(
    calibration: Calibration, ladders: Ladders, iterations: int
) -> None:
    budget = 3.3 * ladders.weights
    found = search_plan(ladders, budget, evaluator_of(calibration), iterations, progress=False)
    assert found.plan.stored <= budget
    assert all(entry["stored_bits"] <= budget for entry in found.history)
    assert found.steps <= iterations and not found.interrupted
    assert set(found.plan.choices) == set(NAMES)
    if iterations == 0:
        assert found.history == [] and found.plan == ladders.best(budget)
        assert math.isnan(found.loss)
    else:
        accepted = [entry for entry in found.history if entry["accepted"]]
        assert accepted[0]["kind"] == "closed form"
        assert found.loss == accepted[-1]["loss"]
        score = evaluator_of(calibration).score(
            ladders.parameters(found.plan, evaluator_of(calibration))
        )
        assert float(score.mean()) == pytest.approx(found.loss, rel=1e-5)
    if iterations == 30:
        assert {"closed form", "corrected", "exchange"} == set(found.candidates)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_search_of_few_layers_keeps_its_measurements(layers: int) -> None:
    modules = [nn.Linear(24, 24) for _ in range(layers)]
    calibration = Calibration(nn.Sequential(*modules), torch.randn(48, 24))
    found = ladders_of(calibration)
    for iterations in range(1, 9):
        budget = 3 * found.weights
        result = search_plan(found, budget, evaluator_of(calibration), iterations, progress=False)
        assert result.steps <= iterations and result.plan.stored <= budget


@pytest.mark.parametrize("calls", [0, 1, 4, 9, 11])
def test_interrupt_keeps_the_best_plan(
    calibration: Calibration, ladders: Ladders, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = Evaluator.score, itertools.count()

    def interrupted(self: Evaluator, parameters: Any) -> Tensor:
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(self, parameters)

    monkeypatch.setattr(Evaluator, "score", interrupted)
    budget = 3.0 * ladders.weights
    found = search_plan(ladders, budget, evaluator_of(calibration), 40, progress=False)
    assert found.interrupted and found.plan.stored <= budget
    accepted = [entry for entry in found.history if entry["accepted"]]
    assert bool(accepted) == (calls > 0)
    if accepted:
        assert found.plan.stored == accepted[-1]["stored_bits"]
    else:
        assert found.plan == ladders.best(budget)


def test_two_searches_are_the_same(calibration: Calibration, ladders: Ladders) -> None:
    def run(source: Ladders, seed: int = 0) -> Any:
        budget = 3.0 * source.weights
        return search_plan(source, budget, evaluator_of(calibration, seed), 25, progress=False)

    first, again = run(ladders), run(ladders_of(calibration))
    assert first.plan == again.plan and first.history == again.history
    assert first.history != run(ladders, seed=1).history


# --- The fewest bits -----------------------------------------------------------------------------


def test_cheapest_plan() -> None:
    """Of a classifier that is sure of nothing, so that every bit counts."""
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
    calibration = Calibration(model, torch.randn(400, 24))
    ladders = ladders_of(calibration)
    evaluator = Evaluator(calibration, 400, 16, 200, 0, lambda _: nullcontext())

    def changed(plan: Plan) -> float:
        return evaluator.changed(ladders.parameters(plan, evaluator))

    stored = []
    worst = changed(ladders.front()[-1])
    for share in (worst, 0.07, 0.2, 1.0):
        plan = cheapest_plan(ladders, share, evaluator, progress=False)
        assert changed(plan) <= share
        stored.append(plan.stored)
    assert stored == sorted(stored, reverse=True) and stored[0] > stored[-1]
    assert stored[-1] == ladders.front()[0].stored
    cheaper = [plan for plan in ladders.front() if plan.stored < stored[1]]
    assert changed(cheaper[-1]) > 0.07


def test_too_few_changes_are_refused(
    calibration: Calibration, ladders: Ladders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "changed", lambda *_: 0.125)
    message = "max_drop must be at least 12.50 points, what 8 bits change, got 3"
    with pytest.raises(ValueError, match=message):
        cheapest_plan(ladders, 0.03, evaluator_of(calibration), progress=False)


def test_a_regression_has_no_answers() -> None:
    with pytest.raises(ValueError, match="max_drop needs a model whose output holds logits"):
        cora.quantize(nn.Linear(24, 1), torch.randn(32, 24), max_drop=1.0, progress=False)
