"""Rank search: how many singular directions of each layer's residual its adapter keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .allocation import ALLOCATORS, Budget, LayerFit, allocate
from .batches import gradients
from .calibration import Calibration
from .curvature import sensitivity
from .evaluation import Evaluator, Loss, is_better

__all__ = [
    "SearchConfig",
    "SearchResult",
    "butterworth_gain",
    "search_ranks",
]

Method = Literal["gate", "sensitivity", "energy", "uniform"]
PlanMethod = Literal["closed_form", "search"]


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """How ranks are chosen.

    Args:
        method: a closed form, "sensitivity" (residual energy at the output times the loss' sensitivity to
            it, greedily by bit), "energy" (global water-filling of the singular values) or "uniform"
            (the same share of full rank everywhere); or "gate", the search: from the first of them by
            gradient descent through Butterworth gates, then by exchanges.
        plan: where bits are chosen too, "closed_form" (predicted losses, nothing is drawn) or "search"
            (which goes on from there, on held-out samples).
        iterations: steps of the search, gradient steps and exchanges together.
        samples: calibration samples used, at most.
        batch_size: samples a gradient step.
        learning_rate: of Adam, on the logarithm of the ranks.
        order: order n of the Butterworth gate.
        loss: "kl" (to the float model, no labels; squared error for a regression) or "labels".
        label_loss: function (output, labels) -> loss for loss="labels"; cross-entropy by default.
        holdout: samples that take no part in gradients and pick the best ranks; at most half of all.
        seed: of everything drawn in the search.
        doubt: standard errors by which a proposal must beat the best ranks so far, and what
            sensitivities predict against it; 0 takes every lower loss.

    Raises:
        ValueError: a field out of range.
    """

    method: Method = "sensitivity"
    iterations: int = 120
    samples: int = 1600
    batch_size: int = 32
    learning_rate: float = 0.05
    order: int = 4
    loss: Loss = "kl"
    label_loss: Callable[[Any, Any], Tensor] | None = field(default=None, compare=False)
    holdout: int = 256
    seed: int = 0
    plan: PlanMethod = "closed_form"
    doubt: float = 2.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            expected = ", ".join(get_args(Method))
            raise ValueError(f"SearchConfig: method must be one of {expected}, got {self.method!r}")
        if self.plan not in get_args(PlanMethod):
            raise ValueError(
                f"SearchConfig: plan must be one of {', '.join(get_args(PlanMethod))}, got {self.plan!r}"
            )
        if self.loss not in get_args(Loss):
            raise ValueError(f"SearchConfig: loss must be 'kl' or 'labels', got {self.loss!r}")
        lowest = {"iterations": 0, "samples": 1, "batch_size": 1, "order": 1, "holdout": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"SearchConfig: {name} must be an integer >= {low}, got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"SearchConfig: learning_rate must be > 0, got {self.learning_rate!r}")
        if not 0 <= self.doubt < math.inf:
            raise ValueError(f"SearchConfig: doubt must be >= 0, got {self.doubt!r}")


def butterworth_gain(order: int, cutoff: Tensor, full: int) -> Tensor:
    """Squared Butterworth gate of every singular direction: 1 / (1 + (f_i / r)^(2n)).

    Computed as a sigmoid of the difference of logarithms, so that neither the gain nor its gradient
    overflows at any order. Direction i (from 0) sits at f_i = (i + 1/2) / N, so a cutoff of k / N lies
    half way between the last direction kept and the first one dropped.

    Args:
        order: n.
        cutoff: logarithm of the share r of full rank, a scalar tensor.
        full: full rank N.

    Returns:
        float32 [N], the gain T^2 on the singular values.

    Source: CoRa, arXiv 2408.00923, the normalised Butterworth kernel (T on each side of S).
    """
    position = (torch.arange(full, dtype=torch.float32, device=cutoff.device) + 0.5) / full
    return torch.sigmoid(2 * order * (cutoff - position.log()))


@dataclass(slots=True)
class SearchResult:
    """Ranks, what led to them, and how each candidate did on the held-out samples."""

    ranks: dict[str, int]
    method: str
    loss: float = math.nan
    history: list[dict[str, Any]] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    steps: int = 0


class _Ranks(Evaluator):
    """The quantized network as a function of its ranks."""

    def __init__(
        self,
        calibration: Calibration,
        fits: Mapping[str, LayerFit],
        config: SearchConfig,
        simulate: Callable[[torch.nn.Module], Any],
        adapter_bits: int,
    ) -> None:
        super().__init__(
            calibration,
            config.samples,
            config.batch_size,
            config.holdout,
            config.seed,
            simulate,
            config.loss,
            config.label_loss,
        )
        self.fits, self.adapter_bits = fits, adapter_bits
        self._truncated: dict[str, tuple[int, Tensor]] = {}

    def step_loss(self, gains: Mapping[str, Tensor]) -> Tensor:
        weights = {name: fit.gated(gains[name]) for name, fit in self.fits.items()}
        return self.losses(self.weights(weights), *self.next_batch()).mean()

    def _weight(self, name: str, rank: int) -> Tensor:
        """The truncated weight; candidates differ in few layers, so each layer's last one is kept."""
        kept = self._truncated.get(name)
        if kept is None or kept[0] != rank:
            kept = (rank, self.fits[name].truncated(rank, self.adapter_bits))
            self._truncated[name] = kept
        return kept[1]

    def score_ranks(self, ranks: Mapping[str, int]) -> Tensor:
        """Loss of each held-out sample under the network as it would be stored: float32 [n]."""
        return self.score(self.weights({name: self._weight(name, ranks[name]) for name in ranks}))


@torch.enable_grad()  # the caller may have turned gradients off
def search_ranks(
    fits: Mapping[str, LayerFit],
    budget: Budget,
    calibration: Calibration,
    config: SearchConfig,
    adapter_bits: int,
    simulate: Callable[[torch.nn.Module], Any],
    equivalent_bits: Callable[[float], float],
    progress: bool = True,
) -> SearchResult:
    """Find ranks within the budget; Ctrl-C ends the search early with the best ranks so far.

    The closed form by sensitivity comes first. What the others, the gates and the exchanges propose is
    measured on held-out samples with the adapters truncated and rounded. A proposal replaces the best so far
    if it is better by more than `config.doubt` asks for: the losses have heavy tails, many proposals are
    tried, and samples that the float model was trained on flatter what fits them.

    Args:
        fits: layer -> quantized weight and residual factors.
        simulate: context manager that makes the model quantize its activations.
        equivalent_bits: adapter bits -> stored bits a weight, for the progress bar.
    """
    weights = partial(sensitivity, calibration)
    if config.method != "gate" or not budget.bits or budget.used(budget.full) <= budget.bits:
        method = config.method if config.method != "gate" else "uniform"
        return SearchResult(allocate(method, fits, budget, weights), method)
    result = SearchResult({}, "gate")
    evaluator = _Ranks(calibration, fits, config, simulate, adapter_bits)
    predicted = _predictor(fits, weights())
    best: Tensor | None = None
    scale = 1.0  # of predictions, so that the first one is what was measured
    bar = tqdm(total=config.iterations, desc="rank search", disable=not progress, leave=False)

    def consider(label: str, ranks: dict[str, int]) -> bool:
        nonlocal best, scale
        losses = evaluator.score_ranks(ranks)
        loss, used = float(losses.mean()), budget.used(ranks)
        accepted = best is None
        if best is None:
            scale = loss / max(predicted(ranks), 1e-30)
        else:
            foretold = scale * (predicted(ranks) - predicted(result.ranks)) if config.doubt else 0.0
            accepted = is_better(best - losses - max(foretold, 0.0), config.doubt)
        if accepted:
            best, result.ranks, result.loss = losses, dict(ranks), loss
        result.history.append(
            {
                "step": result.steps,
                "kind": label,
                "loss": loss,
                "adapter_bits": int(used),
                "accepted": accepted,
            }
        )
        result.candidates[label] = min(loss, result.candidates.get(label, math.inf))
        bar.set_postfix_str(
            f"loss {result.loss:.4f}, budget {used / budget.bits:.1%}, "
            f"{equivalent_bits(used):.2f} bits"
        )
        return accepted

    try:
        for closed in ALLOCATORS:
            consider(closed, allocate(closed, fits, budget, weights))
        steps = config.iterations * 2 // 3
        _descend(evaluator, budget, config, steps, consider, result, bar)
        _exchange(evaluator, budget, config.iterations - steps, consider, result, bar)
    except KeyboardInterrupt:
        result.interrupted = True
        if not result.ranks:
            result.ranks = allocate("uniform", fits, budget, weights)
    finally:
        bar.close()
    return result


def _predictor(
    fits: Mapping[str, LayerFit], weight: Mapping[str, float]
) -> Callable[[Mapping[str, int]], float]:
    """Loss of the network with adapters of some ranks, up to a factor: what they leave of the residuals, times
    the loss' sensitivity to it."""
    left = {}
    for name, fit in fits.items():
        energies = fit.energies().double() * weight[name]
        left[name] = energies.flip(0).cumsum(0).flip(0).tolist() + [0.0]
    return lambda ranks: sum(left[name][rank] for name, rank in ranks.items())


def _descend(
    evaluator: _Ranks,
    budget: Budget,
    config: SearchConfig,
    steps: int,
    consider: Callable[[str, dict[str, int]], bool],
    result: SearchResult,
    bar: Any,
) -> None:
    """Adam on the logarithm of each layer's cutoff, kept on the budget by a common factor."""
    names = list(evaluator.fits)
    full = torch.tensor([budget.full[n] for n in names], dtype=torch.float32)
    cost = torch.tensor([budget.cost[n] for n in names], dtype=torch.float32)
    start = torch.tensor([result.ranks[n] for n in names], dtype=torch.float32)
    # A rank of 0 starts at a quarter: small enough to round to 0, large enough to feel a gradient.
    log_rank = start.clamp(min=0.25).log().requires_grad_(True)
    optimizer = torch.optim.Adam([log_rank], lr=config.learning_rate, betas=(0.9, 0.98))
    low, high = math.log(0.25), full.log()

    def project() -> None:
        # Bisection on the common factor: the clamped cost grows with it.
        with torch.no_grad():
            lo, hi = -10.0, 10.0
            for _ in range(50):
                mid = (lo + hi) / 2
                spent = ((log_rank + mid).clamp(min=low).minimum(high).exp() * cost).sum()
                lo, hi = (mid, hi) if spent <= budget.bits else (lo, mid)
            log_rank.copy_((log_rank + lo).clamp(min=low).minimum(high))

    def integer(values: Tensor) -> dict[str, int]:
        real = {n: float(v) if v >= 0.5 else 0.0 for n, v in zip(names, values, strict=True)}
        return budget.round(real)

    project()
    average = log_rank.detach().clone()
    check = max(steps // 8, 1)
    for step in range(steps):
        gains = {
            n: butterworth_gain(config.order, log_rank[i] - full[i].log(), budget.full[n])
            for i, n in enumerate(names)
        }
        loss = evaluator.step_loss(gains)
        found = gradients(loss, [log_rank])
        gradient = None if found is None else found[0]
        if gradient is None:  # of a model that gives none
            return
        log_rank.grad = torch.nan_to_num(gradient).clamp_(-1, 1)
        optimizer.step()
        project()
        average.lerp_(log_rank.detach(), 0.1)
        result.history.append(
            {
                "step": result.steps,
                "kind": "gradient",
                "loss": float(loss.detach()),
                "adapter_bits": int((log_rank.detach().exp() * cost).sum()),
            }
        )
        result.steps += 1
        bar.update()
        if (step + 1) % check == 0 or step + 1 == steps:
            consider("gate", integer(average.exp()))


def _exchange(
    evaluator: _Ranks,
    budget: Budget,
    steps: int,
    consider: Callable[[str, dict[str, int]], bool],
    result: SearchResult,
    bar: Any,
) -> None:
    """Move bits between two layers as long as the held-out loss falls.

    The donor gives up a part of its rank, the receiver gains what that pays for; pairs are drawn at
    random and the part halves when a round brings nothing.
    """
    names = list(evaluator.fits)
    if len(names) < 2:
        return
    part = 0.3
    fails = 0
    for _ in range(steps):
        donors = [n for n in names if result.ranks[n]]
        receivers = [n for n in names if result.ranks[n] < budget.full[n]]
        if not donors or not receivers:
            return
        pick = torch.rand(2, generator=evaluator.generator)
        donor = donors[int(pick[0] * len(donors))]
        receiver = receivers[int(pick[1] * len(receivers))]
        result.steps += 1
        bar.update()
        if donor == receiver:
            continue
        ranks = dict(result.ranks)
        ranks[donor] -= max(1, round(part * ranks[donor]))
        room = budget.bits - budget.used(ranks)
        gain = min(int(room // budget.cost[receiver]), budget.full[receiver] - ranks[receiver])
        if gain < 1:
            continue
        ranks[receiver] += gain
        fails = 0 if consider("exchange", budget.fill(ranks)) else fails + 1
        if fails >= len(names):
            part, fails = part / 2, 0
