"""Ranks: the gate, the budget, the closed forms and the search, against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PLAIN, TwoInputs, batches, trained_net
from torch import Tensor, nn

import cora
import cora.evaluation
from cora import Calibration, QuantSpec, SearchConfig
from cora.allocation import ALLOCATORS, Budget, LayerFit, allocate
from cora.batches import divergence
from cora.fitting import quantize_layer
from cora.lowrank import LayerShape, factors, quantize_adapter, rank_bits, truncate
from cora.search import _predictor, butterworth_gain

# --- The gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 16])
def test_butterworth_gain(order: int) -> None:
    for full, rank in [(1, 0.5), (8, 0.3), (8, 4.0), (100, 37.5), (100, 100.0)]:
        gain = butterworth_gain(order, torch.tensor(rank / full).log(), full)
        positions = (torch.arange(full).double() + 0.5) / full
        expected = 1 / (1 + (positions / (rank / full)) ** (2 * order))
        torch.testing.assert_close(gain.double(), expected, atol=1e-5, rtol=1e-4)
        assert (gain.diff() <= 0).all()


def test_gain_is_a_half_at_the_cutoff() -> None:
    for order, index in itertools.product((1, 4, 64), (0, 3, 9)):
        gain = butterworth_gain(order, torch.tensor((index + 0.5) / 10).log(), 10)
        assert float(gain[index]) == pytest.approx(0.5, abs=1e-4)
    sharp = butterworth_gain(64, torch.tensor(4 / 10).log(), 10)
    assert (sharp[:4] > 0.99).all() and (sharp[4:] < 0.01).all()


@pytest.mark.parametrize("order", [1, 8, 64])
@pytest.mark.parametrize("cutoff", [-1e4, -88.0, -20.0, 0.0, 20.0, 1e4])
def test_gate_never_overflows(order: int, cutoff: float) -> None:
    log_rank = torch.tensor(cutoff, requires_grad=True)
    gain = butterworth_gain(order, log_rank, 4608)
    assert torch.isfinite(gain).all() and (gain >= 0).all() and (gain <= 1).all()
    (gradient,) = torch.autograd.grad((gain * torch.randn(4608)).sum(), log_rank)
    assert torch.isfinite(gradient)


# --- Fits and budgets ----------------------------------------------------------------------------


def fit_of(residual: Tensor, groups: int = 1) -> LayerFit:
    """The fit of a linear layer (of one group) whose weight is its residual and a constant."""
    a, b, s = factors(residual, groups)
    shape = LayerShape(*residual.shape, groups)
    return LayerFit(torch.ones_like(residual), a, b, s, shape, residual.shape, False)


def fits_of(*sizes: tuple[int, int]) -> dict[str, LayerFit]:
    return {f"layer{i}": fit_of(torch.randn(*size) * (i + 1)) for i, size in enumerate(sizes)}


def budget_of(fits: Mapping[str, LayerFit], share: float, adapter_bits: int = 8) -> Budget:
    shapes = {name: fit.shape for name, fit in fits.items()}
    return Budget.of(
        shapes, share, sum(32 * s.rows * s.columns for s in shapes.values()), adapter_bits
    )


def assert_fills(ranks: Mapping[str, int], budget: Budget) -> None:
    """Integers within the budget, and no layer could take one more."""
    assert all(isinstance(r, int) and 0 <= r <= budget.full[n] for n, r in ranks.items())
    left = budget.bits - sum(r * budget.cost[n] for n, r in ranks.items())
    assert left >= 0
    assert all(r == budget.full[n] or budget.cost[n] > left for n, r in ranks.items())


def test_fit_weights() -> None:
    residual = torch.randn(6, 10)
    fit = fit_of(residual, groups=2)
    assert fit.energies().sum() == pytest.approx(float(residual.square().sum()), rel=1e-5)
    full = torch.ones(3)
    torch.testing.assert_close(fit.gated(full), residual + 1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fit.gated(0 * full), torch.ones(6, 10))
    assert torch.equal(fit.truncated(0, 8), fit.dequantized)
    for rank, bits in itertools.product((1, 2, 3), (4, 8, 32)):
        stored = quantize_adapter(*truncate(fit.a, fit.b, rank, 2), bits, 2).matrix() + 1
        torch.testing.assert_close(fit.truncated(rank, bits), stored)
        if bits == 32:
            gate = (torch.arange(3) < rank).float()
            torch.testing.assert_close(fit.gated(gate), stored, atol=1e-5, rtol=1e-5)


def test_budget_counts_stored_bits() -> None:
    shapes = {"a": LayerShape(16, 27, 1), "b": LayerShape(8, 9, 4)}
    budget = Budget.of(shapes, 0.25, 10_001, 5)
    assert budget.bits == 2500
    assert budget.cost == {name: rank_bits(shape, 5) for name, shape in shapes.items()}
    assert budget.full == {"a": 16, "b": 2}
    assert budget.used({"a": 3, "b": 1}) == 3 * budget.cost["a"] + budget.cost["b"]
    assert Budget.of(shapes, 0, 10_001, 8).bits == 0


def test_budget_too_small_for_one_rank() -> None:
    shape = LayerShape(16, 16, 1)
    least = rank_bits(shape, 8) / 8192
    with pytest.raises(
        ValueError, match=f"rank_budget must be 0 or at least {least:.2g} .* got 0.01"
    ):
        Budget.of({"a": shape}, 0.01, 8192, 8)
    exact = Budget.of({"a": shape}, least, 8192, 8)
    assert exact.bits == rank_bits(shape, 8)
    assert exact.fill({"a": 0}) == exact.round({"a": 0.4}) == exact.round({"a": 9.0}) == {"a": 1}


def test_rounding_is_feasible_and_fills_the_budget() -> None:
    fits = fits_of((8, 8), (16, 4), (32, 40), (5, 7), (64, 20))
    generator = torch.Generator().manual_seed(3)
    for share in (0.01, 0.05, 0.2, 0.5, 3.0):
        budget = budget_of(fits, share)
        for scale in (0.1, 1.0, 10.0):
            real = {
                n: scale * float(torch.rand((), generator=generator)) * budget.full[n] for n in fits
            }
            ranks = budget.round(real)
            assert_fills(ranks, budget)
        exact = budget.round({n: float(r) for n, r in ranks.items()})
        assert exact == ranks  # what fits already stays
    assert budget.round(dict.fromkeys(fits, 0.0)) == dict(budget.full)


# --- Closed forms --------------------------------------------------------------------------------

SIZES = {
    "mixed": [(8, 8), (16, 4), (32, 40), (5, 7), (64, 20)],
    "equal": [(12, 10)] * 4,
    "one": [(9, 9)],
}


@pytest.mark.parametrize("share", [0, 0.03, 0.1, 0.4, 5.0])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("method", ALLOCATORS)
def test_allocators_fill_the_budget(method: str, sizes: str, share: float) -> None:
    fits = fits_of(*SIZES[sizes])
    shapes = {name: fit.shape for name, fit in fits.items()}
    budget = Budget(
        int(share * sum(32 * shape.rows * shape.columns for shape in shapes.values())),
        {name: rank_bits(shape, 8) for name, shape in shapes.items()},
        {name: shape.full_rank for name, shape in shapes.items()},
    )
    ranks = allocate(method, fits, budget, lambda: {n: i + 1.0 for i, n in enumerate(fits)})
    assert_fills(ranks, budget)
    assert (share < 5) or ranks == budget.full


def test_uniform_is_the_largest_common_share() -> None:
    fits = fits_of(*SIZES["mixed"])
    budget = budget_of(fits, 0.1)
    ranks = allocate("uniform", fits, budget, dict)
    shares = sorted({r / full for full in budget.full.values() for r in range(full + 1)})
    largest = max(
        s
        for s in shares
        if budget.used({n: math.floor(s * f + 1e-9) for n, f in budget.full.items()}) <= budget.bits
    )
    for name, full in budget.full.items():
        assert ranks[name] >= math.floor(largest * full + 1e-9) - (largest * full % 1 < 1e-9)
    equal = fits_of(*SIZES["equal"])
    found = allocate("uniform", equal, budget_of(equal, 0.2), dict).values()
    assert max(found) - min(found) <= 1


def best_of_all(gains: Mapping[str, Tensor], budget: Budget) -> float:
    """The most that any feasible ranks gain."""
    names = list(gains)
    return max(
        sum(float(gains[n][:r].sum()) for n, r in zip(names, ranks, strict=True))
        for ranks in itertools.product(*(range(budget.full[n] + 1) for n in names))
        if budget.used(dict(zip(names, ranks, strict=True))) <= budget.bits
    )


@pytest.mark.parametrize("share", [0.06, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("method", ["energy", "sensitivity"])
def test_greedy_against_brute_force(method: str, share: float) -> None:
    weights = {"layer0": 1.0, "layer1": 0.02, "layer2": 0.5}
    for sizes, exact in (((6, 6), (6, 6), (6, 6)), True), (((4, 9), (9, 3), (6, 12)), False):
        fits = fits_of(*sizes)
        budget = budget_of(fits, share)
        scale = weights if method == "sensitivity" else dict.fromkeys(fits, 1.0)
        gains = {n: fit.energies() * scale[n] for n, fit in fits.items()}
        ranks = allocate(method, fits, budget, lambda: weights)
        found = sum(float(gains[n][:r].sum()) for n, r in ranks.items())
        best = best_of_all(gains, budget)
        # Of one price the greedy choice is the best; else it misses at most one direction's gain.
        slack = 1e-9 if exact else max(float(g.max()) for g in gains.values())
        assert found >= best - slack


# --- The search ----------------------------------------------------------------------------------


def quantize(model: nn.Module, data: Any, config: SearchConfig, **options: Any) -> nn.Module:
    """The search alone: what comes after it moves the losses that it measured."""
    quick = {"weight": QuantSpec(2), "rank_budget": 0.1, "adapter_bits": 8, "progress": False}
    options = {**quick, **PLAIN, **options}
    return cora.quantize(model, data, search=config, **options)


def held_out(config: SearchConfig, sizes: list[int]) -> list[tuple[int, Tensor]]:
    """Rows of each batch that pick the ranks, as the documentation of holdout says."""
    index = [(i, j) for i, size in enumerate(sizes) for j in range(size)]
    order = torch.randperm(
        len(index), generator=torch.Generator().manual_seed(config.seed)
    ).tolist()
    held = [index[k] for k in order[: max(1, min(config.holdout, len(order) // 2))]]
    rows = {i: sorted(j for b, j in held if b == i) for i in range(len(sizes))}
    return [(i, torch.tensor(r)) for i, r in rows.items() if r]


@pytest.mark.parametrize(
    "options", [{}, {"activation_bits": 6}, {"adapter_bits": 4, "fit": "plain"}], ids=str
)
def test_the_search_is_no_worse_than_where_it_starts(options: dict[str, Any]) -> None:
    net, data = trained_net(), batches(4, 32)
    config = SearchConfig("gate", iterations=45, holdout=48)
    qmodel = quantize(net, data, config, **options, bias_correction=False)
    search = qmodel.report.search
    assert set(ALLOCATORS) <= search["candidates"].keys()
    start = search["history"][0]
    assert start["kind"] == "sensitivity" and start["accepted"]
    losses, count = 0.0, 0
    with torch.no_grad():
        for i, rows in held_out(config, [32] * 4):
            losses += float(divergence(qmodel(data[i][rows]), net(data[i][rows]))) * len(rows)
            count += len(rows)
    assert losses / count <= start["loss"] * 1.01
    accepted = [h["loss"] for h in search["history"] if h.get("accepted")]
    assert accepted == sorted(accepted, reverse=True)
    # What the search measured is the packed model, up to rounding of activations.
    assert losses / count == pytest.approx(
        accepted[-1], rel=1e-3 if not options.get("activation_bits") else 0.1
    )
    steps = [h for h in search["history"] if h["kind"] == "gradient"]
    assert len(steps) == 30 and all(math.isfinite(h["loss"]) for h in search["history"])


def test_without_doubt_every_lower_loss_is_taken() -> None:
    net, data = trained_net(), batches(4, 32)
    config = SearchConfig("gate", iterations=45, holdout=48, doubt=0)
    history = quantize(net, data, config, bias_correction=False).report.search["history"]
    best = math.inf
    for entry in history:
        if entry["kind"] != "gradient":
            assert entry["accepted"] == (entry["loss"] < best)
            best = min(best, entry["loss"])


def test_what_ranks_leave_is_predicted() -> None:
    """All of the residual without adapters, nothing at full rank, in between by its singular values."""
    calibration = Calibration(trained_net(), batches())
    fits = {
        name: quantize_layer(name, calibration, QuantSpec(2), "weighted").fit
        for name in calibration.layers
    }
    weights = {name: 1.0 + i for i, name in enumerate(fits)}
    predicted = _predictor(fits, weights)
    assert predicted({name: fit.shape.full_rank for name, fit in fits.items()}) == 0
    for rank in (0, 1):
        left = sum(
            weights[name] * float(fit.singular_values.double().square().sum(0)[rank:].sum())
            for name, fit in fits.items()
        )
        assert predicted(dict.fromkeys(fits, rank)) == pytest.approx(left, rel=1e-9) and left > 0


def used_bits(qmodel: nn.Module) -> int:
    return sum(layer.stored_bits["adapter"] for layer in qmodel.report.layers)


@pytest.mark.parametrize("method", ["gate", *ALLOCATORS])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.25])
def test_every_method_keeps_the_budget(method: str, share: float) -> None:
    net = trained_net()
    qmodel = quantize(net, batches(), SearchConfig(method, iterations=9), rank_budget=share)
    weights = sum(32 * net.get_submodule(row.name).weight.numel() for row in qmodel.report.layers)
    left = math.floor(share * weights) - used_bits(qmodel)
    assert left >= 0
    for layer in qmodel.report.layers:
        shape = LayerShape.of(net.get_submodule(layer.name))
        assert layer.rank == layer.full_rank or rank_bits(shape, 8) > left
    assert qmodel.report.search["method"] == method
    assert qmodel.report.search["ranks"] == {row.name: row.rank for row in qmodel.report.layers}


def test_two_runs_are_the_same() -> None:
    runs = []
    for run in range(2):
        torch.manual_seed(run)
        torch.rand(run + 1)
        runs.append(
            quantize(trained_net(), batches(), SearchConfig("gate", iterations=30)).report.search
        )
    assert runs[0] == runs[1] and len(runs[0]["history"]) > 20
    other = quantize(
        trained_net(), batches(), SearchConfig("gate", iterations=30, seed=1)
    ).report.search
    assert other["history"] != runs[0]["history"]


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 7, 24, 33])
def test_interrupt_returns_the_best_so_far(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = cora.evaluation.functional_call, itertools.count()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(cora.evaluation, "functional_call", interrupted)
    net, data = trained_net(), batches(1, 40)
    qmodel = quantize(net, data, SearchConfig("gate", iterations=40))
    search = qmodel.report.search
    assert search["interrupted"]
    accepted = [h for h in search["history"] if h.get("accepted")]
    if accepted:
        assert used_bits(qmodel) == accepted[-1]["adapter_bits"]
        assert accepted[-1]["loss"] == min(h["loss"] for h in accepted)
    else:
        uniform = quantize(net, data, SearchConfig("uniform"))
        assert search["ranks"] == uniform.report.search["ranks"]
    assert torch.isfinite(qmodel(data[0])).all()


# --- Losses --------------------------------------------------------------------------------------


def test_labels() -> None:
    net, data = trained_net(), batches(labels=True)
    kl = quantize(net, data, SearchConfig("gate", iterations=12)).report.search
    labels = quantize(net, data, SearchConfig("gate", iterations=12, loss="labels")).report.search
    with torch.no_grad():
        floor = float(
            F.cross_entropy(net(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data]))
        )
    assert (
        labels["candidates"] != kl["candidates"] and labels["candidates"]["uniform"] > 0.3 * floor
    )
    seen = []

    def half(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output.shape[0], target.shape[0]))
        return F.cross_entropy(output, target) / 2

    config = SearchConfig("gate", iterations=12, loss="labels", label_loss=half)
    halved = quantize(net, data, config).report.search
    assert seen and all(a == b for a, b in seen)
    assert halved["candidates"]["uniform"] == pytest.approx(
        labels["candidates"]["uniform"] / 2, rel=1e-3
    )


def test_labels_of_frames_and_pixels() -> None:
    for model, x, y in (
        (nn.Linear(6, 4), torch.randn(20, 5, 6), torch.randint(0, 4, (20, 5))),
        (nn.Conv2d(3, 4, 3, padding=1), torch.randn(20, 3, 6, 6), torch.randint(0, 4, (20, 6, 6))),
    ):
        config = SearchConfig("gate", iterations=6, loss="labels")
        qmodel = quantize(model, [(x, y)], config, adapter_bits=32, rank_budget=0.5)
        assert math.isfinite(min(qmodel.report.search["candidates"].values()))


def test_labels_as_probabilities() -> None:
    x, y = torch.randn(20, 6), torch.randint(0, 4, (20,))
    config = SearchConfig("gate", iterations=6, loss="labels")
    model = nn.Linear(6, 4)
    found = [
        quantize(model, [(x, labels)], config, adapter_bits=32, rank_budget=0.5).report.search
        for labels in (y, y[:, None].int(), F.one_hot(y, 4).float())
    ]
    assert found[0]["candidates"] == found[1]["candidates"]
    assert found[2]["candidates"] == pytest.approx(found[0]["candidates"], rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (torch.ones(16, 4).long(), r"\[\d+, 4\] of torch.int64 between 1 and 1"),
        (torch.linspace(0, 1, 16), "of torch.float32 between"),
        (torch.full((16,), 4), "of torch.int64 between 4 and 4"),
        (torch.full((16,), -1), "between -1 and -1"),
        ([0] * 16, "got list"),
    ],
    ids=str,
)
def test_labels_of_a_wrong_form(labels: Any, got: str) -> None:
    config = SearchConfig("gate", iterations=3, loss="labels")
    with pytest.raises(ValueError, match=f"labels must be class indices .* below 4, .*{got}"):
        quantize(nn.Linear(6, 4), [(torch.randn(16, 6), labels)], config, rank_budget=0.5)


def test_label_errors() -> None:
    config = SearchConfig("gate", iterations=3, loss="labels")
    with pytest.raises(ValueError, match="loss='labels' needs calibration batches with labels"):
        quantize(trained_net(), batches(), config)
    data = [(torch.randn(16, 12), torch.randn(16, 1))]
    with pytest.raises(ValueError, match="loss='labels' needs label_loss"):
        quantize(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 1)), data, config, rank_budget=0.3)


class DictOutput(TwoInputs):
    """A regression of two outputs, one of them nested."""

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Any]:  # type: ignore[override]
        hidden = F.relu(self.a(first) + self.b(second))
        return {"hidden": [hidden], "value": self.out(hidden)[:, 0]}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 1)), lambda: torch.randn(48, 12)),
        (DictOutput, lambda: [(torch.randn(24, 4), torch.randn(24, 3))]),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3)),
            lambda: [torch.randn(12, 3, 8, 8)],
        ),
    ],
)  # fmt: skip
def test_regressions(model: Callable[[], nn.Module], data: Callable[[], Any]) -> None:
    qmodel = quantize(model().eval(), data(), SearchConfig("gate", iterations=12), rank_budget=0.2)
    losses = [h["loss"] for h in qmodel.report.search["history"]]
    assert losses and all(0 <= loss < 2 for loss in losses)


def test_few_samples_and_uneven_batches() -> None:
    for sizes in ([1], [2], [1, 1], [3, 5, 2]):
        data = [torch.randn(n, 3, 8 + 2 * n, 8) for n in sizes]
        qmodel = quantize(trained_net(), data, SearchConfig("gate", iterations=6, batch_size=2))
        assert math.isfinite(qmodel.report.search["history"][-1]["loss"])


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "best"}, {"loss": "mse"},
        {"iterations": -1}, {"iterations": 1.5}, {"iterations": True},
        {"samples": 0}, {"batch_size": 0}, {"order": 0}, {"order": "4"}, {"learning_rate": 0},
        {"learning_rate": float("nan")}, {"holdout": 0}, {"holdout": 0.5},
        {"doubt": -1}, {"doubt": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_config_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SearchConfig: {next(iter(fields))} must be .*got"):
        SearchConfig(**fields)
