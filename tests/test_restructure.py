"""Layers in other clothes, other libraries' by their names, become plain ones; packed and saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import cora
from cora import Calibration
from cora.fold import FoldedBatchNorm
from cora.modules import QuantLinear
from cora.restructure import hides_layers, restructure


class Conv1D(nn.Module):
    """As in transformers: y = x W + b with W [in, out]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"


class Model(nn.Module):
    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.head = Conv1D(48, 16), Conv1D(16, 48), nn.Linear(16, 7)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        if self.reads:
            x = x + self.up.weight.sum(1)
        return self.head(x)


@pytest.fixture
def model() -> Model:
    return Model().eval()


def test_computes_the_same(model: Model) -> None:
    x = torch.randn(5, 3, 16)
    expected, keys = model(x), set(model.state_dict())
    assert hides_layers(model)
    plain = restructure(model)
    assert plain is model and not hides_layers(model) and type(model.up) is nn.Linear
    assert set(model.state_dict()) == keys and not model.up.training
    torch.testing.assert_close(model(x), expected)
    alone = Conv1D(4, 8)
    layer = restructure(alone)
    assert type(layer) is nn.Linear and torch.equal(layer.weight, alone.weight.mT)


def test_packed_and_saved(model: Model, tmp_path: Path) -> None:
    x = torch.randn(64, 3, 16)
    qmodel = cora.quantize(model, x, target_bits=6, progress=False)
    assert isinstance(model.up, Conv1D)  # what was given is not changed
    assert [la.name for la in qmodel.report.layers] == ["up", "down", "head"]
    assert isinstance(qmodel.up, QuantLinear)
    with torch.no_grad():
        expected, found = model(x), qmodel(x)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    cora.save(qmodel, tmp_path / "m")
    loaded = cora.load(tmp_path / "m", Model())
    with torch.no_grad():
        assert torch.equal(loaded(x), found)
        torch.testing.assert_close(cora.dequantize(loaded)(x), found, atol=1e-4, rtol=1e-3)


def test_skipped(model: Model, tmp_path: Path) -> None:
    x = torch.randn(40, 3, 16)
    qmodel = cora.quantize(model, x, cora.QuantSpec(4), progress=False, skip="up", tune=None)
    assert type(qmodel.up) is nn.Linear
    cora.save(qmodel, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(cora.load(tmp_path / "m", Model())(x), qmodel(x))


def test_a_model_that_reads_the_weight_keeps_it(tmp_path: Path) -> None:
    model, x = Model(reads=True).eval(), torch.randn(40, 16)
    calibration = Calibration(model, x)
    assert list(calibration.layers) == ["head"] and not calibration.restructured
    qmodel = cora.quantize(model, calibration, cora.QuantSpec(4), progress=False, tune=None)
    assert isinstance(qmodel.up, Conv1D)
    cora.save(qmodel, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(cora.load(tmp_path / "m", Model(reads=True))(x), qmodel(x))


def _under_weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def _under_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer)


def _under_old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def _pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.3)


@pytest.mark.parametrize(
    "made",
    [
        _under_weight_norm,
        _under_spectral_norm,
        _under_old_weight_norm,
        nn.utils.spectral_norm,
        _pruned,
    ],
)
def test_a_weight_made_at_every_call_is_quantized(
    made: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            made(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Flatten(), made(nn.Linear(16 * 36, 5))
        )

    model, x = build().eval(), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    keys = list(model.state_dict())
    qmodel = cora.quantize(model, x, target_bits=6, progress=False)
    assert [la.name for la in qmodel.report.layers] == ["0", "3"]
    assert list(model.state_dict()) == keys  # what was given is not changed
    with torch.no_grad():
        found = qmodel(x)
        torch.testing.assert_close(model(x), expected)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    cora.save(qmodel, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(cora.load(tmp_path / "m", build())(x), found)


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: batch norm, drop and activation in one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Linear(nn.Linear):
    """As in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


BatchNormAct2d.__module__, Linear.__module__ = "timm.layers.norm_act", "timm.layers.linear"


def test_timm_layers_are_quantized_and_folded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), BatchNormAct2d(16), nn.Flatten(), Linear(16 * 36, 5)
        )

    model, x = build(), torch.randn(64, 3, 8, 8)
    for _ in range(3):
        model(x)  # running statistics
    model.eval()
    with torch.no_grad():
        expected = model(x)
    qmodel = cora.quantize(model, x, target_bits=6, progress=False)
    assert [la.name for la in qmodel.report.layers] == ["0", "3"]
    assert isinstance(qmodel[1].norm, FoldedBatchNorm)
    assert type(model[1]) is BatchNormAct2d and type(model[3]) is Linear
    with torch.no_grad():
        found = qmodel(x)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    cora.save(qmodel, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(cora.load(tmp_path / "m", build())(x), found)
