"""A real pretrained network, float in, packed file out, on its own data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cora
from cora import Calibration, QuantSpec, SearchConfig, TuneConfig
from cora.batches import divergence
from cora.tasks import resolve_task

# Without the last steps, which take longest and have a test of their own.
QUICK: dict[str, Any] = {"tune": None, "propagate": False, "progress": False}

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def data_folder() -> Any:
    """CORA_DATA, or the folder beside the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        if DATA.is_dir() and "CORA_DATA" not in os.environ:
            patch.setenv("CORA_DATA", str(DATA))
        missing = resolve_task("cifar10-resnet20").missing()
        if missing is not None:
            pytest.skip(missing)
        yield


@pytest.fixture(scope="module")
def model(data_folder: None) -> nn.Module:
    return resolve_task("cifar10-resnet20").model()


@pytest.fixture(scope="module")
def calibration(model: nn.Module) -> Calibration:
    return Calibration(model, resolve_task("cifar10-resnet20").calibration(256), samples=256)


@pytest.fixture(scope="module")
def validation(data_folder: None) -> tuple[Tensor, Tensor]:
    parts = list(resolve_task("cifar10-resnet20").validation(500))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.fixture(scope="module")
def searched(model: nn.Module, calibration: Calibration) -> nn.Module:
    config = SearchConfig("gate", iterations=30, samples=256)
    return cora.quantize(model, calibration, QuantSpec(3), rank_budget=0.05, search=config, **QUICK)


@torch.no_grad()
def kl(model: nn.Module, student: nn.Module, x: Tensor) -> float:
    return float(divergence(student(x), model(x)))


def test_search_wins_back_half_of_the_loss(
    model: nn.Module,
    calibration: Calibration,
    searched: nn.Module,
    validation: tuple[Tensor, Tensor],
) -> None:
    x, y = validation
    plain = cora.quantize(model, calibration, QuantSpec(3), rank_budget=0, **QUICK)
    uniform = cora.quantize(
        model, calibration, QuantSpec(3), rank_budget=0.05, search=None, **QUICK
    )
    kls = {
        name: kl(model, m, x)
        for name, m in (("plain", plain), ("uniform", uniform), ("searched", searched))
    }
    assert kls["searched"] < 0.5 * kls["plain"], kls
    assert kls["searched"] < kls["uniform"], kls
    with torch.no_grad():
        accuracy = [float((m(x).argmax(1) == y).float().mean()) for m in (model, searched)]
    assert accuracy[0] > 0.75 and accuracy[1] > accuracy[0] - 0.05
    stored = {
        name: m.report.totals["adapter_bits"]
        for name, m in (("uniform", uniform), ("searched", searched))
    }
    allowed = 0.05 * 32 * sum(p.numel() for p in model.parameters())
    assert all(0.97 * allowed < bits <= allowed for bits in stored.values())


def test_packed_is_simulated_and_comes_back_from_the_file(
    model: nn.Module, searched: nn.Module, validation: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, path = validation[0][:100], tmp_path / "resnet20.safetensors"
    with torch.no_grad():
        y = searched(x)
        torch.testing.assert_close(y, cora.dequantize(searched)(x), atol=2e-3, rtol=1e-3)
        cora.save(searched, path)
        assert torch.equal(cora.load(path, resolve_task("cifar10-resnet20").model())(x), y)
    float_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert path.stat().st_size < float_bytes / 5
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    bits = searched.report.totals["total_bits"]
    assert 8 * (path.stat().st_size - header) == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": QuantSpec(8), "rank_budget": 0},
        {"weight": QuantSpec(2), "rank_budget": 9, "adapter_bits": 32},
    ],
    ids=["8-bit", "full-rank"],
)
def test_close_to_float(
    model: nn.Module,
    calibration: Calibration,
    validation: tuple[Tensor, Tensor],
    options: dict[str, Any],
) -> None:
    x = validation[0][:100]
    qmodel = cora.quantize(model, calibration, **QUICK, **options)
    assert kl(model, qmodel, x) < 1e-3
    if options["rank_budget"]:
        with torch.no_grad():
            torch.testing.assert_close(qmodel(x), model(x), atol=0.02, rtol=0.01)


def test_eight_bit_activations_cost_little(
    model: nn.Module,
    calibration: Calibration,
    searched: nn.Module,
    validation: tuple[Tensor, Tensor],
) -> None:
    x, config = validation[0][:200], SearchConfig("sensitivity")
    found = cora.quantize(
        model, calibration, QuantSpec(3), activation_bits=8, search=config, **QUICK
    )
    floated = cora.quantize(model, calibration, QuantSpec(3), search=config, **QUICK)
    assert kl(model, found, x) < 1.2 * kl(model, floated, x) + 0.01


def test_everything_together_at_the_same_bits(
    model: nn.Module, calibration: Calibration, validation: tuple[Tensor, Tensor]
) -> None:
    """Bits and ranks chosen, layers fitted in order, tuned: against 3 bits in every layer."""
    plain = cora.quantize(model, calibration, QuantSpec(3), rank_budget=0, **QUICK)
    stored = plain.report.totals["bits_per_weight"]
    options = {"target_bits": stored, "tune": TuneConfig(iterations=12), "progress": False}
    found = cora.quantize(model, calibration, **options)
    assert 0.97 * stored < found.report.totals["bits_per_weight"] <= stored
    assert kl(model, found, validation[0]) < 0.85 * kl(model, plain, validation[0])
