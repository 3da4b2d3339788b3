"""One choice a layer of bits, groups, rank and adapter bits, under a budget of stored bits: the joint search.

Each layer has a ladder of ways to store it, dearer ones closer to float. Their predicted losses add up, so the
best plan for any budget takes from every ladder the step where a bit buys the same loss: a front of plans, in
closed form. The search then measures what the prediction cannot know, on held-out samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .calibration import Calibration
from .curvature import curvature
from .evaluation import Evaluator, is_better
from .lowrank import (
    FloatLayer,
    LayerShape,
    factors,
    fold,
    quantize_adapter,
    rank_bits,
    truncate,
)
from .moments import output_energy
from .quantizer import QuantSpec, weight_bits
from .rounding import Feedback, quantize_matrix

__all__ = ["ADAPTER_WIDTHS", "Choice", "Ladders", "Plan", "cheapest_plan", "search_plan"]

ADAPTER_WIDTHS = (4, 8)  # bits of an adapter's elements that are tried

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)  # weights a scale, about
_ADAPTED_BITS = (
    4  # adapters are tried on codes up to so many bits: on finer ones a bit more is cheaper
)
_ROUNDING_WORK = 1.4e9  # multiply-adds of error feedback; of larger layers a share of the rows
_ADAPTER_SHARE = 1.5  # and take so many bits a weight at most
_FRONT = 24  # plans of the front that are kept


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a layer.

    Args:
        spec: its quantizer.
        rank: of its adapter.
        adapter_bits: width of the adapter's elements; 0 without one.
        stored: bits of codes, scales, zero-points and adapter.
        loss: predicted divergence from the float model, nats.
    """

    spec: QuantSpec
    rank: int
    adapter_bits: int
    stored: int
    loss: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice for every layer."""

    choices: Mapping[str, Choice]

    @property
    def stored(self) -> int:
        return sum(choice.stored for choice in self.choices.values())

    @property
    def loss(self) -> float:
        return sum(choice.loss for choice in self.choices.values())


def group_sizes(layer: FloatLayer) -> list[int | None]:
    """Sizes of scale groups that are tried: None for a row, and whole input channels of it.

    Kernels go through a convolution's weight channel by channel: a group that ended within a channel's
    kernel would send them the slow way.
    """
    columns = LayerShape.of(layer).columns
    taps = math.prod(getattr(layer, "kernel_size", ()))
    sizes: list[int | None] = [None]
    for group in _GROUPS:
        channels = columns // taps
        size = taps * next(
            n for n in range(max(min(group // taps, channels), 1), 0, -1) if channels % n == 0
        )
        if 16 <= size < columns and size not in sizes:
            sizes.append(size)
    return sizes


class Ladders:
    """For each layer the ways to store it that no mixture of others beats, cheapest first.

    Args:
        calibration: the float model and its data.
        specs: layer -> quantizer whose clip, symmetry and rounding every choice shares; a layer whose
            `fixed` is set keeps bits and granularity too.
        fixed: layers with one choice.
        adapter_bits: widths of adapters that are tried; none: no adapters.
        fit: "weighted" or "plain", as in `cora.quantize`.
    """

    def __init__(
        self,
        calibration: Calibration,
        specs: Mapping[str, QuantSpec],
        fixed: Iterable[str] = (),
        adapter_bits: Sequence[int] = ADAPTER_WIDTHS,
        fit: str = "weighted",
        progress: bool = True,
    ) -> None:
        self.calibration, self.adapter_bits, self.fit = calibration, adapter_bits, fit
        self.fixed = set(fixed)
        self.shapes = {name: LayerShape.of(calibration.layers[name]) for name in specs}
        self.weights = sum(shape.rows * shape.columns for shape in self.shapes.values())
        self._kept: dict[str, tuple[tuple[QuantSpec, int, int], Tensor]] = {}
        energies: dict[str, list[Choice]] = {}
        probes: dict[str, list[Tensor]] = {}
        probed: dict[str, float] = {}
        names = list(specs)
        for name in tqdm(names, desc="ways to store", leave=False, disable=not progress):
            energies[name], probes[name], probed[name] = self._measure(name, specs[name])
        predicted = curvature(calibration, probes)
        # A layer whose gradient never reached the output still costs something.
        factors_ = {n: sum(predicted[n]) / max(probed[n], 1e-30) for n in names}
        least = min((f for f in factors_.values() if f > 0), default=1.0)
        self._measured: dict[str, list[Choice]] = {}
        for name in names:
            factor = max(factors_[name], 1e-3 * least)
            self._measured[name] = [replace(w, loss=factor * w.loss) for w in energies[name]]
        self._climb(self._measured)

    def _climb(self, measured: Mapping[str, Iterable[Choice]]) -> None:
        # Also what only a mixture beats, to fill a budget with.
        self.ways = {name: _undominated(choices) for name, choices in measured.items()}
        self.steps = {name: _hull(ways) for name, ways in self.ways.items()}

    def without_adapters(self) -> Ladders:
        """The same with nothing but codes."""
        plain = copy.copy(self)
        plain._climb({n: [c for c in way if not c.rank] for n, way in self._measured.items()})
        return plain

    def _measure(self, name: str, base: QuantSpec) -> tuple[list[Choice], list[Tensor], float]:
        """Every way, its loss the error at the layer's output; errors to learn the layer's curvature
        from, and the sum of their output errors."""
        shape, moment = self.shapes[name], self.calibration.moment(name)
        matrix = self.calibration.matrix(name)
        found: list[Choice] = []
        probes: list[Tensor] = []
        probed = 0.0
        feedback = Feedback.of(moment) if base.needs_moment else None
        share, outweigh = 1, 1.0
        if feedback is not None and shape.groups == 1 and name not in self.fixed:
            share = math.ceil(matrix.numel() * shape.columns / _ROUNDING_WORK)
        if share > 1:
            # Errors go with the square of a row's step, so with that of its spread.
            spread = (matrix.double().amax(1) - matrix.double().amin(1)).square()
            told = float(spread[::share].sum())
            share, outweigh = (share, float(spread.sum()) / told) if told > 0 else (1, 1.0)

        def energy(residual: Tensor) -> float:
            """Of a residual of all rows, told from those of the share."""
            return outweigh * output_energy(residual[::share], shape, moment)

        for spec in self._specs(name, base):
            plain = spec.group_size is None
            adapted = bool(self.adapter_bits) and plain and spec.bits <= _ADAPTED_BITS
            adapted &= name not in self.fixed
            probe = plain and spec.bits in (2, 4) or name in self.fixed
            whole = adapted or probe
            rounded = quantize_matrix(matrix, spec, name, feedback, share, whole)
            stored = weight_bits(shape.rows, shape.columns, rounded.qparams)
            every = 1 if whole else share
            residual = torch.zeros_like(matrix)
            residual[::every] = matrix[::every] - rounded.dequantized
            found.append(Choice(spec, 0, 0, stored, energy(residual)))
            if probe:
                probes.append(self._folded(name, residual))
                probed += output_energy(residual, shape, moment)
            if adapted:
                found += self._adapted(spec, shape, residual, stored, moment, energy)
        return found, probes, probed

    def _specs(self, name: str, base: QuantSpec) -> list[QuantSpec]:
        if name in self.fixed:
            return [base]
        found = []
        for bits in _BITS:
            for size in group_sizes(self.calibration.layers[name]):
                granularity = "per_group" if size else "per_channel"
                found.append(base.replace(bits=bits, granularity=granularity, group_size=size))
        return found

    def _adapted(
        self,
        spec: QuantSpec,
        shape: LayerShape,
        residual: Tensor,
        stored: int,
        moment: Tensor,
        energy: Callable[[Tensor], float],
    ) -> list[Choice]:
        """The ways to store what the codes leave in an adapter."""
        room = int(_ADAPTER_SHARE * shape.rows * shape.columns)
        units = {bits: rank_bits(shape, bits) for bits in self.adapter_bits}
        if all(unit > room for unit in units.values()):
            return []
        a, b, _ = factors(residual, shape.groups, moment if self.fit == "weighted" else None)
        found = []
        for bits, unit in units.items():
            most = min(shape.full_rank, room // unit)
            rank = 1
            while rank <= most:
                part = truncate(a, b, rank, shape.groups)
                adapter = quantize_adapter(*part, bits, shape.groups).matrix()
                error = energy(residual - adapter)
                found.append(Choice(spec, rank, bits, stored + rank * unit, error))
                rank = max(rank + 1, round(rank * 1.6))
        return found

    def _folded(self, name: str, matrix: Tensor) -> Tensor:
        layer = self.calibration.layers[name]
        transposed = getattr(layer, "transposed", False)
        return fold(matrix, layer.weight.shape, transposed, self.shapes[name].groups)

    def weight(self, name: str, choice: Choice) -> Tensor:
        """The layer's weight as a choice stores it; the last one of each layer is kept."""
        key = (choice.spec, choice.rank, choice.adapter_bits)
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            shape, moment = self.shapes[name], self.calibration.moment(name)
            matrix = self.calibration.matrix(name)
            feedback = Feedback.of(moment)
            effective = quantize_matrix(matrix, choice.spec, name, feedback).dequantized
            if choice.rank:
                weighted = moment if self.fit == "weighted" else None
                a, b, _ = factors(matrix - effective, shape.groups, weighted)
                part = truncate(a, b, choice.rank, shape.groups)
                adapter = quantize_adapter(*part, choice.adapter_bits, shape.groups)
                effective = effective + adapter.matrix()
            self._kept[name] = kept = (key, self._folded(name, effective))
        return kept[1]

    def parameters(self, plan: Plan, evaluator: Evaluator) -> dict[str, Tensor]:
        return evaluator.weights({n: self.weight(n, c) for n, c in plan.choices.items()})

    def bits(self, stored: float) -> float:
        """Stored bits of a whole plan as bits a weight."""
        return stored / self.weights

    @property
    def least(self) -> int:
        """Stored bits of the cheapest plan."""
        return sum(steps[0].stored for steps in self.steps.values())

    @property
    def most(self) -> int:
        """Stored bits of the dearest plan."""
        return sum(steps[-1].stored for steps in self.steps.values())

    def best(self, budget: float, scale: Mapping[str, float] | None = None) -> Plan:
        """The plan of least predicted loss within a budget of stored bits.

        Args:
            scale: corrections of the layers' predicted losses.
        """
        factor = scale or {}

        def at(price: float) -> dict[str, int]:
            return {
                name: min(
                    range(len(steps)),
                    key=lambda i: factor.get(name, 1.0) * steps[i].loss + price * steps[i].stored,
                )
                for name, steps in self.steps.items()
            }

        def stored(levels: Mapping[str, int]) -> int:
            return sum(self.steps[n][i].stored for n, i in levels.items())

        low, high = -60.0, 40.0  # of the price's logarithm: nats a bit
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if stored(at(math.exp(middle))) > budget else (low, middle)
        return self.filled(at(math.exp(high)), budget, factor)

    def filled(self, levels: dict[str, int], budget: float, scale: Mapping[str, float]) -> Plan:
        """Spend what is left on the ways to store a layer that win most a bit."""
        chosen = {name: self.steps[name][i] for name, i in levels.items()}
        left = budget - sum(choice.stored for choice in chosen.values())
        while True:
            best: tuple[float, str, Choice] | None = None
            for name, now in chosen.items():
                for way in self.ways[name]:
                    if now.stored < way.stored <= now.stored + left:
                        gain = scale.get(name, 1.0) * (now.loss - way.loss)
                        value = gain / (way.stored - now.stored)
                        if best is None or value > best[0]:
                            best = value, name, way
            if best is None:
                return Plan(chosen)
            _, name, way = best
            left -= way.stored - chosen[name].stored
            chosen[name] = way

    def level(self, name: str, choice: Choice) -> int:
        """The last step of a layer's ladder that takes no more than a choice."""
        return sum(step.stored <= choice.stored for step in self.steps[name]) - 1

    def front(self, count: int = _FRONT) -> list[Plan]:
        """Plans from the cheapest to the best, evenly spaced in stored bits."""
        least, most = self.least, self.most
        budgets = [least + (most - least) * i / (count - 1) for i in range(count)]
        plans: dict[int, Plan] = {}
        for budget in budgets:
            plan = self.best(budget)
            plans[plan.stored] = plan
        return list(plans.values())


def _undominated(choices: Iterable[Choice]) -> list[Choice]:
    """Choices that none of no more stored bits is as good as, cheapest first."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.stored, c.loss)):
        if not found or choice.loss < found[-1].loss:
            found.append(choice)
    return found


def _hull(undominated: Iterable[Choice]) -> list[Choice]:
    """The lower convex hull of loss over stored bits: from each step to the next a bit buys less."""
    hull: list[Choice] = []
    for choice in undominated:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(cheap: Choice, dear: Choice) -> float:
    return (cheap.loss - dear.loss) / max(dear.stored - cheap.stored, 1)


@dataclass(slots=True)
class PlanResult:
    """The plan found, what led to it, and the front it lies on.

    Args:
        plan: the best measured one.
        budget: stored bits allowed.
        loss: its loss on held-out samples; nan without a search.
        front: closed-form plans, cheapest first.
        history: one entry a proposal: step, kind, loss, stored bits, accepted.
    """

    plan: Plan
    budget: float
    loss: float = math.nan
    front: Sequence[Plan] = ()
    history: list[dict[str, Any]] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    steps: int = 0


def search_plan(
    ladders: Ladders,
    budget: float,
    evaluator: Evaluator,
    iterations: int,
    progress: bool = True,
) -> PlanResult:
    """Improve the closed-form plan on held-out samples; Ctrl-C ends with the best plan so far.

    First each layer in turn takes one step down its ladder, and what that costs corrects its predicted
    losses for the next closed-form plan. Then bits move between pairs of layers. A proposal
    replaces the best plan if it is better by more than the standard error.

    Args:
        budget: stored bits allowed.
        iterations: measurements on the held-out samples.
    """
    result = PlanResult(ladders.best(budget), budget, front=ladders.front())
    if iterations < 1:
        return result
    names = [name for name in ladders.steps if len(ladders.steps[name]) > 1]
    best: Tensor
    bar = tqdm(total=iterations, desc="plan search", disable=not progress, leave=False)

    def measure(plan: Plan) -> Tensor:
        result.steps += 1
        bar.update()
        return evaluator.score(ladders.parameters(plan, evaluator))

    def consider(label: str, plan: Plan) -> bool:
        nonlocal best
        losses = measure(plan)
        # The prediction stands beside the measurement: it saw all samples, and samples that the float
        # model was trained on, as calibration samples often are, flatter what fits them.
        gain = best - losses + (result.plan.loss - plan.loss)
        accepted = is_better(gain)
        if accepted:
            best, result.plan, result.loss = losses, plan, float(losses.mean())
        loss = float(losses.mean())
        result.history.append(
            {
                "step": result.steps,
                "kind": label,
                "loss": loss,
                "stored_bits": plan.stored,
                "accepted": accepted,
            }
        )
        result.candidates[label] = min(loss, result.candidates.get(label, math.inf))
        bar.set_postfix_str(f"loss {result.loss:.4f}, {ladders.bits(plan.stored):.2f} bits")
        return accepted

    try:
        best = measure(result.plan)
        result.loss = float(best.mean())
        result.candidates["closed form"] = result.loss
        result.history.append(
            {
                "step": result.steps,
                "kind": "closed form",
                "loss": result.loss,
                "stored_bits": result.plan.stored,
                "accepted": True,
            }
        )
        scale = dict.fromkeys(ladders.steps, 1.0)
        if max(2 * len(names), len(names) + 3) <= iterations:
            base, start = result.plan, best
            for name in names:
                i = ladders.level(name, base.choices[name])
                other = ladders.steps[name][i - 1 if i else i + 1]
                changed = measure(Plan({**base.choices, name: other}))
                predicted = other.loss - base.choices[name].loss
                measured = float((changed - start).mean()) / predicted
                scale[name] = min(max(measured, 0.1), 10.0)
            for trust in (1.0, 0.5):
                corrected = {n: s**trust for n, s in scale.items()}
                consider("corrected", ladders.best(budget, corrected))
        _exchange(ladders, budget, iterations, evaluator.generator, consider, result, scale)
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        bar.close()
    return result


def _exchange(
    ladders: Ladders,
    budget: float,
    iterations: int,
    generator: torch.Generator,
    consider: Callable[[str, Plan], bool],
    result: PlanResult,
    scale: Mapping[str, float],
) -> None:
    """One layer steps down, and what it saves goes to another."""
    tried: set[tuple[int, ...]] = set()
    idle = 0
    while result.steps < iterations and idle < 200:
        levels = {n: ladders.level(n, c) for n, c in result.plan.choices.items()}
        donors = [n for n, i in levels.items() if i > 0]
        receivers = [n for n, i in levels.items() if i + 1 < len(ladders.steps[n])]
        if not donors or not receivers:
            return
        pick = torch.rand(2, generator=generator)
        donor = donors[int(pick[0] * len(donors))]
        receiver = receivers[int(pick[1] * len(receivers))]
        idle += 1
        if donor == receiver:
            continue
        levels[donor] -= 1
        left = budget - sum(ladders.steps[n][i].stored for n, i in levels.items())
        before = ladders.steps[receiver][levels[receiver]].stored
        up = [
            j
            for j in range(levels[receiver] + 1, len(ladders.steps[receiver]))
            if ladders.steps[receiver][j].stored - before <= left
        ]
        if not up:
            continue
        levels[receiver] = up[0]
        key = tuple(levels.values())
        if key in tried:
            continue
        tried.add(key)
        idle = 0
        consider("exchange", ladders.filled(levels, budget, scale))


def cheapest_plan(
    ladders: Ladders, most_changed: float, evaluator: Evaluator, progress: bool = True
) -> Plan:
    """The closed-form plan of fewest bits that changes at most a share of the held-out answers.

    Raises:
        ValueError: the model's output has no answers, or every plan changes more.
    """
    plans = ladders.front()
    low, high = 0, len(plans) - 1
    bar = tqdm(desc="fewest bits", disable=not progress, leave=False)
    with bar:
        worst = evaluator.changed(ladders.parameters(plans[high], evaluator))
        if worst > most_changed:
            raise ValueError(
                f"max_drop must be at least {100 * worst:.2f} points, what 8 bits change, got "
                f"{100 * most_changed:g}"
            )
        while low < high:
            middle = (low + high) // 2
            changed = evaluator.changed(ladders.parameters(plans[middle], evaluator))
            bar.update()
            bar.set_postfix_str(f"{ladders.bits(plans[middle].stored):.2f} bits: {changed:.2%}")
            low, high = (low, middle) if changed <= most_changed else (middle + 1, high)
    return plans[high]
