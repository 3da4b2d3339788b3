"""Ordinary code that is easily got wrong: a right result, or words that say what is wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cora

QUICK: dict[str, Any] = {"tune": None, "progress": False}


def rows(count: int = 2) -> list[Tensor]:
    return [torch.randn(32, 16) for _ in range(count)]


def images() -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) for _ in range(2)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def quantized(model: nn.Module, batches: Any, **options: Any) -> Any:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cora.quantize(model, batches, **{"target_bits": 7, **QUICK, **options})


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)


class InAList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.relu(layer(x))
        return self.c(x)


class AsksForTypes(Body):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
            if isinstance(layer, nn.Linear) and layer is not self.c:
                x = torch.relu(x)
        return x


class AsksForParameters(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x.to(next(self.parameters()).device)))


def test_layers_that_are_not_found_by_name() -> None:
    with pytest.warns(UserWarning, match="a, b ran in the float model, but not in the packed one"):
        cora.quantize(InAList(), rows(), target_bits=7, **QUICK)


def test_code_that_asks_for_a_layer_s_type() -> None:
    with pytest.warns(UserWarning, match="its code may ask for a layer's type"):
        cora.quantize(AsksForTypes(), rows(), target_bits=7, **QUICK)


def test_code_that_asks_for_parameters() -> None:
    with pytest.raises(ValueError, match="does not run with packed layers.*no float parameters"):
        cora.quantize(AsksForParameters(), rows(), target_bits=7, **QUICK)


@pytest.mark.parametrize("activation_bits", [None, 2, 8])
def test_no_warning_without_reason(activation_bits: int | None) -> None:
    for bits in (3.5, 7):
        quantized(mlp(), rows(), target_bits=bits, activation_bits=activation_bits)


def test_something_else_is_named_report() -> None:
    model = mlp()
    model.report = nn.Identity()
    with pytest.raises(ValueError, match="something named `report`"):
        cora.quantize(model, rows(), target_bits=7, **QUICK)


@pytest.mark.parametrize("before", [False, True])
def test_layers_with_hooks_stay_float(before: bool) -> None:
    model, x = mlp(), rows()
    if before:
        model[0].register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
    else:
        model[0].register_forward_hook(lambda _m, _args, output: output * 2)
    qmodel = quantized(model, x)
    assert distance(qmodel(x[0]), model(x[0])) < 0.05
    assert any("forward hook" in entry.reason for entry in qmodel.report.float_entries)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_compute(norm: Any) -> None:
    model, x = mlp(), rows()
    norm(model[0])
    qmodel = cora.quantize(model.eval(), x, target_bits=7, **QUICK)
    assert distance(qmodel(x[0]), model(x[0])) < 0.05
    assert [layer.name for layer in qmodel.report.layers] == ["0", "2"]


class Keeps(nn.Module):
    """Keeps what it computed, and its `train` gives nothing back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net[0](x)
        return self.net[1:](self.last)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(False)


@pytest.mark.parametrize("options", [{}, {"weight": cora.QuantSpec(3), "target_bits": None}])
def test_models_that_keep_activations(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = Keeps(), rows()
    model(x[0])
    qmodel = quantized(model, x, **options)
    cora.save(qmodel, tmp_path / "m.safetensors")
    loaded = cora.load(tmp_path / "m.safetensors", model)
    assert torch.equal(loaded(x[0]), qmodel(x[0]))


@dataclass
class Out:
    logits: Tensor
    features: Tensor


class GivesADataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.weight.data.uniform_(0.3, 3)

    def forward(self, x: Tensor) -> Out:
        features = self.conv(x)
        return Out(self.head(torch.relu(self.norm(features)).mean((2, 3))), features)


def test_a_dataclass_of_outputs() -> None:
    """The features are read before the batch norm, which so is not folded."""
    model, x = GivesADataclass().eval(), images()
    found, expected = quantized(model, x)(x[0]), model(x[0])
    assert distance(found.features, expected.features) < 0.05
    assert distance(found.logits, expected.logits) < 0.1


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5).div_(0.25))


def test_inputs_that_are_changed_in_place() -> None:
    model, x = ChangesItsInput(), [torch.rand(32, 16) for _ in range(2)]
    kept = [t.clone() for t in x]
    qmodel = quantized(model, x)
    assert all(torch.equal(a, b) for a, b in zip(x, kept, strict=True))
    assert distance(qmodel(kept[0].clone()), model(kept[0].clone())) < 0.05


class TimeFirst(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_samples_must_come_first() -> None:
    x = [torch.randn(6, 8, 16)]
    with pytest.warns(UserWarning, match="first dimension of every input"):
        cora.Calibration(TimeFirst(False).eval(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cora.Calibration(TimeFirst(True).eval(), x)


def test_a_calibration_of_other_biases() -> None:
    model, x = mlp(), rows()
    calibration = cora.Calibration(model, x)
    model[0].bias.data.add_(5)
    with pytest.raises(ValueError, match="layer '0' differs"):
        cora.quantize(model, calibration, target_bits=7, **QUICK)


class GivesStates(nn.Module):
    """An output that is not samples first beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(16, 12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        y, states = self.body(x)
        return self.head(y), states


def test_outputs_beside_the_first() -> None:
    model, x = GivesStates().eval(), [torch.randn(8, 6, 16) for _ in range(2)]
    assert distance(quantized(model, x)(x[0])[0], model(x[0])[0]) < 0.05


def test_errors_of_the_model_name_the_batch() -> None:
    ids = [torch.full((4, 3), 99)]
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(ValueError, match=r"does not run on a batch of int64 \[2, 3\]"):
        cora.quantize(model, ids, target_bits=7, **QUICK)


class ChangesAView(nn.Module):
    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part = part
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.part:
            y[:, :4].mul_(2)
        else:
            y.flatten(2).add_(1)
        return self.b(torch.relu(y)).mean((2, 3))


@pytest.mark.parametrize("part", [False, True])
def test_fusing_keeps_what_changes_a_view(part: bool) -> None:
    model, x = ChangesAView(part).eval(), images()
    qmodel = quantized(model, x, activation_bits=8)
    assert distance(cora.fuse(qmodel, x[0])(x[0]), qmodel(x[0])) < 0.02


def test_only_packed_models_are_saved(tmp_path: Path) -> None:
    model, x = mlp(), rows()
    qmodel = quantized(model, x, activation_bits=8)
    with pytest.raises(ValueError, match="got a fused one"):
        cora.save(cora.fuse(qmodel, x[0]), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_metrics_of_any_number_type(tmp_path: Path) -> None:
    model, x = mlp(), rows()
    calibration = cora.Calibration(model, x)
    qmodel = quantized(model, calibration, rank_budget=0)
    found = cora.compare(model, calibration, qmodel, lambda _: {"x": torch.tensor(0.5)}, False)
    assert all(row["x"] == 0.5 for row in found)
    cora.save(qmodel, tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="evaluate must return a dict of metrics, got float"):
        cora.compare(model, calibration, qmodel, lambda _: 0.5, False)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "bad", [torch.tensor([[-1]]), torch.tensor([[10]]), torch.tensor([[True]])]
)
def test_ids_are_refused_as_by_torch(bad: Tensor) -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(8, 3))
    qmodel = quantized(model, [torch.randint(0, 10, (16, 1))])
    for candidate in (model, qmodel):
        with pytest.raises((IndexError, RuntimeError)):
            candidate(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_layers_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = GivesStates().eval().to(dtype), [torch.randn(8, 6, 16).to(dtype) for _ in range(2)]
    qmodel = quantized(model, x)
    cora.save(qmodel, tmp_path / "m.safetensors")
    loaded = cora.load(tmp_path / "m.safetensors", GivesStates())
    assert torch.equal(loaded(x[0])[0], qmodel(x[0])[0])


class WithoutGradients(Body):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)))


@pytest.mark.parametrize("search", ["sensitivity", "gate"])
def test_models_without_gradients(search: Any) -> None:
    config = cora.SearchConfig(search, iterations=4)
    quantized(WithoutGradients(), rows(), weight=cora.QuantSpec(3), target_bits=None, search=config)


@pytest.mark.parametrize(
    "options", [{}, {"activation_bits": 8}, {"max_drop": 50.0, "target_bits": None}], ids=str
)
def test_another_default_dtype(tmp_path: Path, options: dict[str, Any]) -> None:
    """Whoever computes in float64 elsewhere gets the same quantized model."""
    model, data = mlp(), rows()
    expected = quantized(model, data, **options)(data[0])
    torch.set_default_dtype(torch.float64)
    try:
        qmodel = quantized(model, data, **options)
        cora.save(qmodel, tmp_path / "model.safetensors")
        loaded: Any = cora.load(tmp_path / "model.safetensors", mlp())
        for found in (qmodel(data[0]), loaded(data[0])):
            assert found.dtype == torch.float32 and distance(found, expected) < 0.02
    finally:
        torch.set_default_dtype(torch.float32)
