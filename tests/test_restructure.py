"""transformers' Conv1D, which this library knows by its name, becomes a Linear; packed and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cora
from cora import Calibration
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
