"""Tuning: it mends what was damaged, keeps what is stored as it is stored, and never makes things worse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import batches, trained_net
from torch import Tensor, nn

import cora
from cora import Calibration, QuantSpec, TuneConfig
from cora.evaluation import Evaluator
from cora.modules import QuantLayer
from cora.tuning import TuneResult, tune

STEPS = TuneConfig(iterations=36, learning_rate=0.01)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(trained_net(), batches(4))


def packed(calibration: Calibration, **options: Any) -> tuple[nn.Module, dict[str, QuantLayer]]:
    """A packed model as it is before tuning."""
    options = {"rank_budget": 0.1, "search": None, "progress": False, **options}
    spec = options.pop("weight", QuantSpec(4))
    qmodel = cora.quantize(trained_net(), calibration, spec, tune=None, propagate=False, **options)
    return qmodel, layers_of(qmodel)


def layers_of(qmodel: nn.Module) -> dict[str, QuantLayer]:
    return {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}


def damage(layers: dict[str, QuantLayer]) -> None:
    """Every scale off by about a tenth."""
    generator = torch.Generator().manual_seed(2)
    for layer in layers.values():
        noise = torch.randn(layer.scale.shape, generator=generator)
        layer.scale = (layer.scale * (1 + 0.1 * noise)).to(layer.scale_dtype).float()
        layer.prepare()


def evaluator_of(calibration: Calibration) -> Evaluator:
    return Evaluator(calibration, 64, 16, 32, 0, lambda _: nullcontext())


def held_out(calibration: Calibration, qmodel: nn.Module) -> float:
    """Loss of the packed model itself on the samples that pick the best iterate."""
    evaluator = evaluator_of(calibration)
    losses: list[Tensor] = []
    with torch.no_grad():
        for index, rows in evaluator.held_out:
            batch, teacher = evaluator.part(index, rows)
            losses.append(cora.batches.divergences(batch.run(qmodel), teacher))
    return float(torch.cat(losses).mean())


def run(
    calibration: Calibration, layers: Any, config: TuneConfig = STEPS, **options: Any
) -> TuneResult:
    return tune(layers, evaluator_of(calibration), config, progress=False, **options)


def state(qmodel: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in qmodel.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(value, after[key]) for key, value in before.items()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_budget": 0},
        {"adapter_bits": 8, "weight": QuantSpec(3, "per_group", 3)},
        {"adapter_bits": 32, "weight": QuantSpec(4, "per_tensor", symmetric=True)},
        {"adapter_bits": 16},
    ],
    ids=str,
)
def test_a_damaged_model_is_mended(calibration: Calibration, options: dict[str, Any]) -> None:
    if "weight" in options and options["weight"].group_size:
        options = {**options, "skip": ["pointwise", "head"]}
    qmodel, layers = packed(calibration, **options)
    damage(layers)
    before, start = state(qmodel), held_out(calibration, qmodel)
    found = run(calibration, layers)
    assert found.step > 0 and found.after < 0.6 * found.before and not found.alarm
    # What was measured is the packed model, before and after.
    assert found.before == pytest.approx(start, rel=1e-2)
    assert found.after == pytest.approx(held_out(calibration, qmodel), rel=1e-2)
    checks = [h for h in found.history if h["kind"] == "held out"]
    assert found.after == min(h["loss"] for h in checks)
    assert found.step == min(checks, key=lambda h: h["loss"])["step"]
    changed = {
        key.rpartition(".")[2]
        for key, value in before.items()
        if not torch.equal(value, state(qmodel)[key])
    }
    assert "scale" in changed
    assert changed <= {"scale", "bias", "adapter_a", "adapter_b", "adapter_scale", "prepared"}
    for layer in layers.values():
        assert torch.equal(layer.scale, layer.scale.to(layer.scale_dtype).float())
        assert layer.scale_dtype == torch.float16 and (layer.scale > 0).all()
        if layer.rank:
            bits = options.get("adapter_bits", 4)
            assert layer.adapter_bits == bits
            kind = {16: torch.float16, 32: torch.float32}.get(bits, torch.int8)
            assert layer.adapter_a.dtype == layer.adapter_b.dtype == kind
            if bits <= 8:
                assert int(layer.adapter_a.abs().max()) == 2 ** (bits - 1) - 1
    assert not any(buffer.requires_grad for buffer in qmodel.buffers())


def test_no_steps_change_nothing(calibration: Calibration) -> None:
    qmodel, layers = packed(calibration)
    damage(layers)
    before = state(qmodel)
    found = run(calibration, layers, TuneConfig(iterations=0))
    assert same(before, state(qmodel)) and found.history == [] and found.step == 0


@pytest.mark.parametrize("adapter_bits", [4, 32])
def test_steps_that_are_too_large_change_nothing(
    calibration: Calibration, adapter_bits: int
) -> None:
    qmodel, layers = packed(calibration, adapter_bits=adapter_bits)
    before = state(qmodel)
    found = run(calibration, layers, TuneConfig(iterations=24, learning_rate=2.0))
    assert found.alarm and found.step == 0 and found.after == found.before
    assert same(before, state(qmodel))
    # It does not go on for long after the held-out loss has stopped falling.
    assert len([h for h in found.history if h["kind"] == "gradient"]) < 24


def test_twice_the_same(calibration: Calibration) -> None:
    states, results = [], []
    for seed in range(2):
        qmodel, layers = packed(calibration)
        damage(layers)
        torch.manual_seed(seed)
        results.append(run(calibration, layers))
        states.append(state(qmodel))
    assert results[0] == results[1] and same(states[0], states[1])


@pytest.mark.parametrize("calls", [0, 3, 10, 25])
def test_interrupt_keeps_the_best(
    calibration: Calibration, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = Evaluator.next_batch
    count = itertools.count()

    def interrupted(self: Evaluator) -> Any:
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(self)

    qmodel, layers = packed(calibration)
    damage(layers)
    before = state(qmodel)
    monkeypatch.setattr(Evaluator, "next_batch", interrupted)
    found = run(calibration, layers)
    assert found.interrupted
    assert len([h for h in found.history if h["kind"] == "gradient"]) == calls
    if found.step:
        assert found.step <= calls and found.after < found.before
    else:
        assert same(before, state(qmodel))
    assert calls < 25 or found.step > 0
    assert found.after == pytest.approx(held_out(calibration, qmodel), rel=1e-2)


@pytest.mark.parametrize("interrupt", [False, True])
def test_float_layers_get_their_missing_bias_back(
    interrupt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False))
    calibration = Calibration(model, torch.randn(64, 12))
    qmodel = cora.quantize(
        model, calibration, QuantSpec(2), rank_budget=0, tune=None, propagate=False, progress=False
    )
    layers = layers_of(qmodel)
    for layer in layers.values():
        layer.set_bias(torch.randn(layer.shape.rows))
    if interrupt:
        monkeypatch.setattr(
            Evaluator, "next_batch", lambda _: (_ for _ in ()).throw(KeyboardInterrupt())
        )
    found = run(calibration, layers)
    assert found.interrupted == interrupt and (interrupt or found.after < 0.9 * found.before)
    assert all(layer.bias is None for layer in calibration.layers.values())
    assert all(layer.bias is not None for layer in layers.values())
    assert not any(p.requires_grad for p in calibration.model.parameters())


@pytest.mark.parametrize(("bits", "tuned"), [(3, True), (8, False)])
def test_ranges_below_eight_bits_are_tuned(
    calibration: Calibration, bits: int, tuned: bool
) -> None:
    options: dict[str, Any] = {"activation_bits": bits, "activation_range": "minmax"}
    options |= {"search": None, "propagate": False, "progress": False}
    plain, after = (
        cora.quantize(trained_net(), calibration, QuantSpec(4), tune=config, **options)
        for config in (None, STEPS)
    )
    scales = [torch.cat([n.x_scale for n in layers_of(m).values()]) for m in (plain, after)]
    found = after.report.search["tuning"]
    if not tuned:
        assert torch.equal(*scales)
        return
    assert found["step"] > 0 and found["after"] < 0.9 * found["before"]
    assert not torch.isclose(*scales, rtol=1e-3).all()
    assert calibration.divergence(after) < calibration.divergence(plain)
    for layer in layers_of(after).values():  # what the layer runs with is what it holds
        assert layer._range[0] == float(layer.x_scale)


@pytest.mark.parametrize("kind", ["no gradients", "in place"])
def test_models_without_gradients_are_left_as_they_are(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(torch.is_grad_enabled() and kind == "in place"):
                x = torch.relu(self.first(x))
                y = self.last(x)
                x.mul_(2)
                return y

    model = Model()
    calibration = Calibration(model, torch.randn(64, 12))
    options: dict[str, Any] = {"target_bits": 4, "progress": False}
    plain = cora.quantize(model, calibration, tune=None, **options)
    with pytest.warns(UserWarning, match="tune: the model has no gradients"):
        tuned = cora.quantize(model, calibration, **options)
    assert same(state(plain), state(tuned)) and tuned.report.search["tuning"]["step"] == 0


def test_with_gradients_turned_off(calibration: Calibration) -> None:
    results = []
    for context in (nullcontext(), torch.no_grad()):
        _, layers = packed(calibration)
        damage(layers)
        with context:
            results.append(run(calibration, layers, TuneConfig(iterations=6)))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"iterations": -1}, {"iterations": 1.5}, {"iterations": True}, {"batch_size": 0},
        {"learning_rate": 0}, {"learning_rate": float("inf")}, {"learning_rate": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_config_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"TuneConfig: {next(iter(fields))} must be .*got"):
        TuneConfig(**fields)
