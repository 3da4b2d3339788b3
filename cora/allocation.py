"""What adapters may cost and who gets how much: the budget, and the closed forms that spend it.

The budget counts stored adapter bits against the stored float bits of the quantized layers'
weights. A new allocator is a function below and an entry in `ALLOCATORS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lowrank import LayerShape, fold, quantize_adapter, rank_bits, truncate

__all__ = ["ALLOCATORS", "Budget", "LayerFit", "allocate"]


@dataclass(slots=True)
class LayerFit:
    """A layer's quantized weight and the full-rank factors of its residual.

    Args:
        dequantized: What, float32 [N, K].
        a: [groups * R, K], R the full rank.
        b: [N, R].
        singular_values: [groups, R], of the residual as the fit measures it.
        shape: the weight as a matrix.
        weight_shape: the layer's weight.
        transposed: the layer is a transposed convolution.
    """

    dequantized: Tensor
    a: Tensor
    b: Tensor
    singular_values: Tensor
    shape: LayerShape
    weight_shape: torch.Size
    transposed: bool

    def energies(self) -> Tensor:
        """Residual energy of each rank, over all groups: float64 [R]."""
        return self.singular_values.double().square().sum(0)

    def weight(self, matrix: Tensor) -> Tensor:
        return fold(matrix, self.weight_shape, self.transposed, self.shape.groups)

    def truncated(self, rank: int, adapter_bits: int) -> Tensor:
        """The weight with an adapter of `rank` as it is stored, in the layer's shape."""
        if rank == 0:
            return self.weight(self.dequantized)
        a, b = truncate(self.a, self.b, rank, self.shape.groups)
        adapter = quantize_adapter(a, b, adapter_bits, self.shape.groups)
        return self.weight(self.dequantized + adapter.matrix())

    def gated(self, gain: Tensor) -> Tensor:
        """The weight with each singular direction scaled by `gain` [R], in the layer's shape."""
        groups, full = self.shape.groups, self.b.shape[1]
        b = (self.b * gain).reshape(groups, -1, full)
        product = b @ self.a.reshape(groups, full, -1)
        return self.weight(self.dequantized + product.reshape(self.dequantized.shape))


def check_rank_budget(share: Any) -> None:
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not (number and 0 <= share < math.inf):
        raise ValueError(f"rank_budget must be a number >= 0, got {share!r}")


@dataclass(frozen=True, slots=True)
class Budget:
    """What adapters may cost.

    Args:
        bits: stored adapter bits allowed, over all layers.
        cost: layer -> stored bits of one unit of rank.
        full: layer -> largest useful rank.
    """

    bits: int
    cost: Mapping[str, int]
    full: Mapping[str, int]

    @staticmethod
    def of(
        shapes: Mapping[str, LayerShape], share: float, float_bits: int, adapter_bits: int
    ) -> Budget:
        """The budget of `share` of the `float_bits` that the layers' float weights take.

        Raises:
            ValueError: share negative, not finite, or too small for one rank in any layer.
        """
        check_rank_budget(share)
        cost = {name: rank_bits(shape, adapter_bits) for name, shape in shapes.items()}
        bits = math.floor(share * float_bits)
        cheapest = min(cost.values())
        if share > 0 and bits < cheapest:
            raise ValueError(
                f"rank_budget must be 0 or at least {cheapest / float_bits:.2g} "
                f"(one rank in the cheapest layer), got {share}"
            )
        return Budget(bits, cost, {name: shape.full_rank for name, shape in shapes.items()})

    def used(self, ranks: Mapping[str, float]) -> float:
        return sum(self.cost[name] * rank for name, rank in ranks.items())

    def round(self, ranks: Mapping[str, float]) -> dict[str, int]:
        """The feasible integer ranks next to real ones: floors, then the largest remainders a bit."""
        floors = {n: min(int(r + 1e-9), self.full[n]) for n, r in ranks.items()}
        left = self.bits - self.used(floors)
        # Floors may exceed the budget when the real ranks do: give back where the remainder is least.
        while left < 0:
            name = max((n for n in floors if floors[n]), key=lambda n: (floors[n] - ranks[n], n))
            floors[name] -= 1
            left += self.cost[name]
        order = sorted(ranks, key=lambda n: (floors[n] - ranks[n], n))
        for name in order:
            if floors[name] < self.full[name] and self.cost[name] <= left:
                floors[name] += 1
                left -= self.cost[name]
        return self.fill(floors)

    def fill(
        self, ranks: Mapping[str, int], gain: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        """Spend what is left of the budget, on the best gain a bit (or the cheapest rank) first."""
        filled = dict(ranks)
        left = self.bits - self.used(filled)
        while True:
            open_ = [n for n in filled if filled[n] < self.full[n] and self.cost[n] <= left]
            if not open_:
                return filled
            if gain is None:
                name = min(open_, key=lambda n: (filled[n] / self.full[n], n))
            else:
                name = max(open_, key=lambda n: (float(gain[n][filled[n]]) / self.cost[n], n))
            filled[name] += 1
            left -= self.cost[name]


# --- Closed forms --------------------------------------------------------------------------------


def _greedy(gains: Mapping[str, Tensor], budget: Budget) -> dict[str, int]:
    """Singular directions by gain a bit, largest first, as long as they fit."""
    return budget.fill(dict.fromkeys(gains, 0), gains)


def _uniform(fits: Mapping[str, LayerFit], budget: Budget, _sensitivity: Any) -> dict[str, int]:
    """The largest common share of full rank that fits, rounded down in every layer."""
    low, high = 0.0, 1.0
    if budget.used(budget.full) <= budget.bits:
        return dict(budget.full)
    for _ in range(60):
        middle = (low + high) / 2
        ranks = {n: int(middle * budget.full[n]) for n in fits}
        low, high = (middle, high) if budget.used(ranks) <= budget.bits else (low, middle)
    return budget.fill({n: int(low * budget.full[n]) for n in fits})


def _energy(fits: Mapping[str, LayerFit], budget: Budget, _sensitivity: Any) -> dict[str, int]:
    """Global water-filling: the largest residual energies of the network a stored bit."""
    return _greedy({n: fit.energies() for n, fit in fits.items()}, budget)


def _sensitivity(
    fits: Mapping[str, LayerFit], budget: Budget, sensitivity: Callable[[], Mapping[str, float]]
) -> dict[str, int]:
    """Residual energies times the loss' sensitivity at the layer's output, a stored bit."""
    weight = sensitivity()
    return _greedy({n: fit.energies() * weight[n] for n, fit in fits.items()}, budget)


# The search starts from the first one.
ALLOCATORS: dict[str, Callable[..., dict[str, int]]] = {
    "sensitivity": _sensitivity,
    "energy": _energy,
    "uniform": _uniform,
}


def allocate(
    method: str,
    fits: Mapping[str, LayerFit],
    budget: Budget,
    sensitivity: Callable[[], Mapping[str, float]],
) -> dict[str, int]:
    """Ranks by a closed form: layer -> rank, within the budget.

    Args:
        method: a name in `ALLOCATORS`.
        sensitivity: gives `curvature.sensitivity`, where the method asks for it.
    """
    if not budget.bits:  # nothing to divide: sensitivities take a backward pass a sample
        method = "uniform"
    return ALLOCATORS[method](fits, budget, sensitivity)
