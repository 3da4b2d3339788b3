"""Bits, groups and ranks chosen together for a target, and the layers fitted to the choice."""

from __future__ import annotations

import math
from collections.abc import Callable

from .evaluation import Evaluator, is_better
from .fitting import FittedLayers
from .planning import Ladders, Plan, PlanResult, cheapest_plan

__all__ = [
    "DEFAULT_TARGET_BITS",
    "Attempt",
    "budget_for_bits",
    "fit_for_bits",
    "fit_within_budget",
    "fit_within_drop",
]

DEFAULT_TARGET_BITS = 3.5  # stored bits a weight, where no quantizer is given

_DOUBT = 2.0  # standard errors by which adapters must win: they cost time at each call
_WORTH = 0.0175  # of the divergence, an eightieth of a bit a weight: what must be foreseen for them to be fitted
_ATTEMPTS = 4  # plans whose layers are fitted
_CLOSE = 0.05  # bits a weight that are not worth another attempt

Attempt = Callable[[float, bool], tuple[PlanResult, FittedLayers]]
"""The plan for a budget of stored bits with its layers fitted, in order or each by itself."""


def budget_for_bits(ladders: Ladders, target_bits: float | None) -> float:
    """Stored bits of so many bits a weight.

    Args:
        target_bits: None: the default, or the fewest that tiny layers can have.

    Raises:
        ValueError: too few for any plan.
    """
    least = ladders.bits(ladders.least)
    target = max(DEFAULT_TARGET_BITS, least) if target_bits is None else target_bits
    if target < least:
        raise ValueError(
            f"target_bits must be at least {least:.2f} (2-bit codes, their "
            f"scales and zero-points, and layers with bits of their own), got {target}"
        )
    return target * ladders.weights


def fit_for_bits(budget: float, least: float, attempt: Attempt) -> tuple[PlanResult, FittedLayers]:
    """The plan for a budget that its layers keep to as they are stored.

    Fitted in order a layer's groups may get zero-points that take more bits than those it was planned with: then
    the next plan has so much less.

    Args:
        least: stored bits of the cheapest plan.
    """
    allowed, tried = budget, 0
    while tried < _ATTEMPTS and allowed >= least:
        planned, fitted = attempt(allowed, True)
        if fitted.stored <= budget:
            planned.budget = budget
            return planned, fitted
        allowed -= fitted.stored - budget
        tried += 1
    return attempt(budget, False)  # each layer by itself is what was planned


def fit_within_budget(
    ladders: Ladders,
    search: Callable[[Ladders], PlanResult],
    fit: Callable[[Plan, Plan | None], FittedLayers],
    evaluator: Evaluator,
) -> tuple[PlanResult, FittedLayers]:
    """The plan that a search finds, with its layers fitted; without adapters, unless they pay.

    A plan weighs an adapter against finer codes by what each leaves of a layer's error. Codes that are fitted
    in order make up for more of it than was foreseen. So where the plan with adapters foresees a difference,
    its layers are first fitted to the inputs of those without; where a difference is left, in order by
    themselves; and they are kept if that clearly brings the held-out samples closer.

    Args:
        search: the plan for the budget from some ladders.
        fit: layers fitted to a plan, and beside them those of another one.
        evaluator: measures what is closer.
    """
    planned = search(ladders)
    if not any(choice.rank for choice in planned.plan.choices.values()):
        return planned, fit(planned.plan, None)
    plain = search(ladders.without_adapters())
    worth = (1 - _WORTH) * plain.plan.loss
    rival = planned.plan if planned.plan.loss <= worth else None
    plainly = fit(plain.plan, rival)
    # In order: the layers' losses, as their errors on the same inputs are to each other.
    foreseen = sum(c.loss * plainly.rivals.get(n, 1.0) for n, c in plain.plan.choices.items())
    if rival is None or (plainly.rivals and foreseen > worth):
        plain.interrupted |= planned.interrupted
        return plain, plainly
    fitted = fit(rival, None)
    with_, without = fitted.losses(evaluator), plainly.losses(evaluator)
    found = (planned, fitted) if is_better(without - with_, _DOUBT) else (plain, plainly)
    found[0].interrupted = planned.interrupted or plain.interrupted
    found[0].candidates |= {"adapters": float(with_.mean()), "no adapters": float(without.mean())}
    return found


def fit_within_drop(
    ladders: Ladders,
    most_changed: float,
    judge: Evaluator,
    attempt: Attempt,
    progress: bool = True,
) -> tuple[PlanResult, FittedLayers, float]:
    """The fewest bits found at which fitted layers change at most a share of the held-out answers.

    The first plan is the cheapest that keeps enough answers with each layer quantized by itself.
    Fitted in order the layers keep more, so that bits can go: one fewer changes about twice as many answers.

    Args:
        judge: counts the changed answers.

    Returns:
        The plan, its layers and the share that they change.

    Raises:
        ValueError: the model's output has no answers, or every plan changes more.
    """
    start = cheapest_plan(ladders, most_changed, judge, progress).stored
    kept: tuple[PlanResult, FittedLayers, float] | None = None
    # Budgets that change too many answers and few enough, each with how often its share doubles the allowed
    # one; nothing is known beyond the ladders.
    failed: tuple[float, float | None] = ladders.least - 1.0, None
    held: tuple[float, float | None] = ladders.most + 1.0, None
    budget = float(start)
    for _ in range(_ATTEMPTS):
        planned, fitted = attempt(budget, True)
        changed = fitted.changed(judge)
        doublings = math.log2(max(changed, most_changed / 4) / most_changed)
        if changed <= most_changed:
            kept, held = (planned, fitted, changed), (budget, doublings)
        else:
            failed = budget, doublings
        guess = budget + doublings * ladders.weights
        if failed[1] is not None and held[1] is not None:
            crossing = held[1] / (held[1] - failed[1])
            guess = held[0] - min(max(crossing, 0.25), 0.75) * (held[0] - failed[0])
        guess = max(guess, float(ladders.least))
        budget = guess if failed[0] < guess < held[0] else (failed[0] + held[0]) / 2
        if kept is not None and held[0] - budget < _CLOSE * ladders.weights:
            break
    if kept is None:  # the first plan holds with each layer by itself: that was measured
        planned, fitted = attempt(start, False)
        kept = planned, fitted, fitted.changed(judge)
    return kept
