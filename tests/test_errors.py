"""Bad input to the public functions: an error that names argument, expected and got."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, assert_same_state, batches, state, trained_net
from torch import nn

import cora
from cora import QuantSpec, SearchConfig


def nan_weight(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.body[0].weight[0, 0, 0, 0] = float("nan")
    return net


def scaled_net(factor: float) -> nn.Module:
    net = trained_net()
    with torch.no_grad():
        net.stem.weight.mul_(factor)
    return net


def nan_data() -> list[torch.Tensor]:
    data = batches()
    data[1][3, 0, 2, 2] = float("nan")
    return data


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": 3}, TypeError, "weight must be a QuantSpec or a dict of them, got 3"),
        ({"weight": {}}, TypeError, "weight must be a QuantSpec or a dict of them"),
        ({"weight": {"*": 4}}, TypeError, "weight must be a QuantSpec or a dict of them"),
        ({"weight": QuantSpec(3, "per_group", 7)}, ValueError, "stem: group_size must divide"),
        ({"weight": {"none": QuantSpec()}}, ValueError, "no layer that can be quantized matches 'none'"),
        ({"activation_bits": 1}, ValueError, "activation_bits must be None or 2..8, got 1"),
        ({"activation_bits": 8.5}, ValueError, "activation_bits must be None or 2..8, got 8.5"),
        ({"activation_bits": 16}, ValueError, "activation_bits must be None or 2..8, got 16"),
        ({"adapter_bits": 1}, ValueError, "adapter_bits must be one of 2, 3, .* got 1"),
        ({"adapter_bits": 12}, ValueError, "adapter_bits must be one of .* got 12"),
        ({"rank_budget": -0.1}, ValueError, "rank_budget must be a number >= 0, got -0.1"),
        ({"rank_budget": float("nan")}, ValueError, "rank_budget must be a number >= 0, got nan"),
        ({"rank_budget": "5%"}, ValueError, "rank_budget must be a number >= 0, got '5%'"),
        ({"rank_budget": True}, ValueError, "rank_budget must be a number >= 0, got True"),
        ({"weight": QuantSpec(3), "rank_budget": 1e-6}, ValueError, "rank_budget must be 0 or .* got 1e-06"),
        ({"target_bits": 0}, ValueError, "target_bits must be a positive number or None, got 0"),
        ({"target_bits": "3"}, ValueError, "target_bits must be a positive number or None, got '3'"),
        ({"target_bits": True}, ValueError, "target_bits must be a positive number or None, got True"),
        ({"target_bits": float("nan")}, ValueError, "target_bits must be a positive number .* got nan"),
        ({"target_bits": 2.0}, ValueError, r"target_bits must be at least 2\.\d\d .* got 2.0"),
        ({"max_drop": -1}, ValueError, "max_drop must be a positive number or None, got -1"),
        ({"max_drop": float("inf")}, ValueError, "max_drop must be a positive number .* got inf"),
        ({"target_bits": 3, "max_drop": 1}, ValueError, "target_bits and max_drop: give one of them"),
        ({"weight": {"*": QuantSpec()}, "target_bits": 3}, ValueError, "weight must be one QuantSpec .* a dict"),
        ({"weight": {"*": QuantSpec()}, "max_drop": 1}, ValueError, "weight must be one QuantSpec .* a dict"),
        ({"tune": 10}, TypeError, "tune must be a TuneConfig or None, got int"),
        ({"search": "gate"}, TypeError, "search must be a SearchConfig or None, got str"),
        ({"skip": None}, TypeError, "skip must be names or patterns of layers, got None"),
        ({"skip": ["stem", 3]}, TypeError, r"skip must be names or patterns .* got \['stem', 3\]"),
        ({"target_bits": np.float32(2)}, ValueError, r"target_bits must be at least 2\.\d\d .* got 2.0"),
        ({"model": scaled_net(1e20)}, ValueError, "model: the inputs of layer 'depthwise' are too large"),
        ({"skip": ["stemm"]}, ValueError, "skip: no layer is named 'stemm'; did you mean stem"),
        ({"skip": "boddy.0"}, ValueError, "skip: no layer is named 'boddy.0'; did you mean body.0"),
        ({"fit": "best"}, ValueError, "fit must be one of weighted, plain, got 'best'"),
        ({"first_last": 8}, ValueError, "first_last must be one of same, 8bit, float, got 8"),
        ({"activation": "none"}, ValueError, "activation must be one of static, dynamic"),
        ({"activation_bits": 8, "activation_range": "max"}, ValueError, "activation_range must be"),
        ({"calibration": []}, ValueError, "calibration: expected at least one sample, got none"),
        ({"calibration": None}, TypeError, "calibration: expected an iterable .* NoneType"),
        ({"calibration": nan_data()}, ValueError, "calibration: batch 1 must be finite"),
        ({"calibration": [torch.zeros(2, 5, 8, 8)]}, ValueError, "model does not run on"),
        ({"model": nan_weight(trained_net())}, ValueError, "body.0: weight must be finite"),
        ({"model": trained_net().double()}, ValueError, "stem: weight must be .* got float64"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "model: expected at least one layer"),
        ({"model": nn.Embedding(3, 4)}, ValueError, "model: expected at least one layer of Linear"),
        ({"model": lambda x: x}, TypeError, "model must be an nn.Module, got function"),
    ],
)  # fmt: skip
def test_quantize_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error comes before anything is changed."""
    arguments = {
        "model": trained_net(),
        "calibration": batches(),
        "search": None,
        "progress": False,
        **options,
    }
    model = arguments["model"]
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        cora.quantize(**arguments)
    if before is not None:
        torch.nan_to_num_(before["tensors"].get("body.0.weight", torch.zeros(1)))
        after = state(model)
        torch.nan_to_num_(after["tensors"].get("body.0.weight", torch.zeros(1)))
        assert_same_state(before, after)


@pytest.mark.parametrize("failing", ["body", "norm"])
def test_a_model_that_fails_on_the_way_is_not_changed(failing: str) -> None:
    net = trained_net()

    class Fails(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no luck")

    net._modules[failing] = Fails()
    before = state(net)
    with pytest.raises(ValueError, match="the model does not run on a batch .*no luck"):
        cora.quantize(net, batches(), progress=False)
    assert_same_state(before, state(net))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, p: cora.dequantize(Net()), "qmodel: expected a model with packed layers"),
        (lambda q, p: cora.save(Net(), p), "qmodel: expected a model with packed layers"),
        (lambda q, p: cora.compare(Net(), cora.Calibration(Net(), batches(1)), Net()), "report"),
        (lambda q, p: cora.quantize(q, batches(1)), "model: expected a float model"),
    ],
)  # fmt: skip
def test_wrong_kinds_of_model(
    call: Callable[[nn.Module, Path], Any], message: str, tmp_path: Path
) -> None:
    qmodel = cora.quantize(trained_net(), batches(1), search=None, progress=False)
    with pytest.raises(ValueError, match=message):
        call(copy.deepcopy(qmodel), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_calibration_of_another_model() -> None:
    calibration = cora.Calibration(nn.Sequential(nn.Conv2d(3, 4, 3)), batches(1))
    other = cora.Calibration(trained_net(), batches(1))
    with pytest.raises(ValueError, match="calibration.*another model"):
        cora.quantize(trained_net(), calibration, progress=False)
    changed = trained_net()
    nn.init.zeros_(changed.head.weight)
    with pytest.raises(ValueError, match="calibration.*another model"):
        cora.quantize(changed, other, progress=False)


def test_labels_are_not_needed() -> None:
    config = SearchConfig("gate", iterations=3)
    plain = cora.quantize(trained_net(), batches(), rank_budget=0.1, search=config, progress=False)
    labelled = cora.quantize(
        trained_net(), batches(labels=True), rank_budget=0.1, search=config, progress=False
    )
    assert plain.report.search == labelled.report.search


def test_a_model_that_cannot_be_quantized_says_why() -> None:
    x = torch.randn(8, 3, 8, 8)

    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ValueError, match="found none; 1: Own is a subclass"):
        cora.Calibration(nn.Sequential(nn.Flatten(), Own(192, 4)), x)
    with pytest.raises(ValueError, match="holds, pass model.module"):
        cora.Calibration(nn.DataParallel(net), x)
    with pytest.raises(ValueError, match="Python module that the ScriptModule"):
        cora.Calibration(torch.jit.trace(net, x), x)
    packed = cora.quantize(net, x, target_bits=6, progress=False)
    with pytest.raises(ValueError, match="float model, got one that is packed already"):
        cora.quantize(packed, x, progress=False)
