"""The report's numbers against sums and measurements made here."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from models import PLAIN, batches, trained_net
from torch import Tensor, nn

import cora
from cora import QuantSpec, Report, SearchConfig
from cora.lowrank import LayerShape, rank_bits
from cora.modules import QuantLayer
from cora.moments import input_rows
from cora.report import float_state_bits, float_weight_bits

NAMES = ["stem", "depthwise", "pointwise", "body.0", "head"]
LAYER_KEYS = {
    "name", "kind", "weight_shape", "bits", "granularity", "group_size", "clip", "rank",
    "full_rank", "weights",
    "stored_bits", "residual_before", "residual_after", "sqnr_db", "weight_error", "spectrum",
}  # fmt: skip


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return trained_net()


@pytest.fixture(scope="module")
def qnet(net: nn.Module) -> nn.Module:
    config = SearchConfig("gate", iterations=9)
    return cora.quantize(
        net,
        batches(),
        QuantSpec(3, rounding="nearest"),
        8,
        0.1,
        8,
        **PLAIN,
        search=config,
        skip=["pointwise"],
        progress=False,
        fold_bn=False,
    )


def test_totals_are_sums(net: nn.Module, qnet: nn.Module) -> None:
    report, totals = qnet.report, qnet.report.totals
    packed = {name: m for name, m in qnet.named_modules() if isinstance(m, QuantLayer)}
    for part in ("weight", "adapter", "bias", "activation"):
        total = sum(layer.stored_bits()[part] for layer in packed.values())
        assert (
            totals[f"{part}_bits"] == total == sum(row.stored_bits[part] for row in report.layers)
        )
    rest = sum(
        32 * t.numel() if t.is_floating_point() else 64 * t.numel()
        for key, t in net.state_dict().items() if key.split(".")[0] in ("norm", "pointwise")
    )  # fmt: skip
    assert totals["float_bits"] == rest == sum(entry.stored_bits for entry in report.float_entries)
    assert totals["total_bits"] == rest + sum(row.total_bits for row in report.layers)
    assert totals["float_weight_bits"] == float_weight_bits(map(net.get_submodule, packed))
    assert totals["float_total_bits"] == float_state_bits(net)
    weights = sum(net.get_submodule(name).weight.numel() for name in packed)
    assert totals["quantized_weights"] == weights
    assert totals["float_weight_bits"] == 32 * weights
    assert totals["activation_bits"] > 0
    stored = totals["weight_bits"] + totals["adapter_bits"]
    assert totals["bits_per_weight"] == pytest.approx(stored / weights)
    assert totals["compression"] == pytest.approx(totals["float_total_bits"] / totals["total_bits"])
    assert totals["adapter_share"] <= 0.1


def test_layers(net: nn.Module, qnet: nn.Module) -> None:
    assert [row.name for row in qnet.report.layers] == [n for n in NAMES if n != "pointwise"]
    for row in qnet.report.layers:
        layer, packed = net.get_submodule(row.name), qnet.get_submodule(row.name)
        shape = LayerShape.of(layer)
        assert (row.kind, row.weight_shape) == (type(layer).__name__, list(layer.weight.shape))
        assert (row.bits, row.granularity, row.group_size, row.clip) == (
            3,
            "per_channel",
            None,
            "mse",
        )
        assert (row.rank, row.full_rank) == (packed.rank, shape.full_rank)
        assert row.weights == layer.weight.numel()
        assert row.stored_bits["adapter"] == row.rank * rank_bits(shape, 8)
        assert 1 <= len(row.spectrum) <= 64 and row.spectrum[0] == 1
        assert row.spectrum == sorted(row.spectrum, reverse=True)
        plain = type(packed).from_float(layer, QuantSpec(3), rank=0)
        energy = layer.weight.detach().square().sum()
        error = (layer.weight.detach() - plain.weight).square().sum() / energy
        assert row.weight_error == pytest.approx(float(error), rel=1e-3)


def test_energies_at_the_output(net: nn.Module, qnet: nn.Module) -> None:
    inputs: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda _m, a, name=name: inputs[name].append(a[0].clone())
        )
        for name in NAMES
    ]
    with torch.no_grad():
        for x in batches():
            net(x)
    for handle in handles:
        handle.remove()
    for row in qnet.report.layers:
        layer, packed = net.get_submodule(row.name), qnet.get_submodule(row.name)
        plain = type(packed).from_float(layer, QuantSpec(3), rank=0)
        rows = torch.cat([input_rows(layer, x) for x in inputs[row.name]], 1).double()

        def energy(weight: Tensor, rows: Tensor = rows) -> float:
            matrix = weight.detach().flatten(1).double().reshape(len(rows), -1, rows.shape[2])
            return float((rows @ matrix.mT).square().sum())

        signal = energy(layer.weight)
        before, after = (energy(layer.weight - m.weight) / signal for m in (plain, packed))
        assert row.residual_before == pytest.approx(before, rel=0.05)
        assert row.residual_after == pytest.approx(after, rel=0.05)
        assert row.sqnr_db == pytest.approx(-10 * math.log10(after), abs=0.3)
        assert row.residual_after <= row.residual_before * (1 + 1e-3)


def test_float_entries(qnet: nn.Module) -> None:
    entries = {entry.name: (entry.kind, entry.reason) for entry in qnet.report.float_entries}
    assert entries["pointwise"] == ("Conv2d", "named in skip")
    assert entries["norm"][0] == "BatchNorm2d" and "not a weight matrix" in entries["norm"][1]
    assert list(entries) == ["norm", "pointwise"]


def test_to_dict_and_back(qnet: nn.Module) -> None:
    values = qnet.report.to_dict()
    text = json.dumps(values, allow_nan=False)
    again = Report.from_dict(json.loads(text))
    assert again == qnet.report and again.to_dict() == values
    names = {"layers", "by_rows", "float_entries", "totals", "settings", "search", "comparison"}
    assert set(values) == names
    assert all(set(layer) == LAYER_KEYS for layer in values["layers"])
    settings = values["settings"]
    assert (
        settings["weight"]["bits"] == 3
        and settings["activation_bits"] == 8
        and settings["skip"] == ["pointwise"]
    )
    assert settings["rank_budget"] == 0.1 and settings["search"]["iterations"] == 9
    assert (
        settings["calibration_samples"] == 48 and settings["versions"]["torch"] == torch.__version__
    )
    values["layers"].clear()
    assert qnet.report.layers


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_exact_layers_have_finite_numbers(value: float) -> None:
    net = trained_net()
    nn.init.constant_(net.pointwise.weight, value)
    qmodel = cora.quantize(net, batches(), search=None, progress=False, **PLAIN)
    assert torch.equal(qmodel.pointwise.weight, net.pointwise.weight)
    report = qmodel.report
    json.dumps(report.to_dict(), allow_nan=False)
    row = next(row for row in report.layers if row.name == "pointwise")
    assert row.weight_error == 0 and row.sqnr_db > 100 and row.residual_before < 1e-10


def test_text(qnet: nn.Module) -> None:
    lines = str(qnet.report).splitlines()
    for row in qnet.report.layers:
        (line,) = [line for line in lines if line.startswith(f"{row.name} ")]
        assert f"{row.rank}/{row.full_rank}" in line and f"{row.sqnr_db:.1f} dB" in line
    assert any("named in skip" in line for line in lines)
    assert f"{qnet.report.totals['compression']:.2f}x" in lines[-1]


def test_settings_do_not_depend_on_the_container_of_skip() -> None:
    names: list[Any] = [
        ["stem", "head"],
        ("head", "stem"),
        {"stem", "head"},
        iter(["head", "stem"]),
    ]
    found = []
    for skip in names:
        qmodel = cora.quantize(
            trained_net(),
            batches(1),
            rank_budget=0,
            search=None,
            **PLAIN,
            skip=skip,
            progress=False,
        )
        found.append(sorted(qmodel.report.settings["skip"]))
        assert len(qmodel.report.layers) == 3
    assert found == [["head", "stem"]] * 4
    one = cora.quantize(
        trained_net(), batches(1), rank_budget=0, search=None, **PLAIN, skip="head", progress=False
    )
    assert one.report.settings["skip"] == ["head"]


def test_answers_too_few_for_the_drop_are_said(qnet: nn.Module) -> None:
    def text(answers: int) -> str:
        report = Report.from_dict(qnet.report.to_dict())
        report.search |= {"changed": 0.0, "answers": answers}
        report.settings["max_drop"] = 0.5
        return str(report)

    assert "with 64 held-out answers that allows none to change" in text(64)
    assert "allows none" not in text(200)


def test_what_tuning_did_is_said(qnet: nn.Module) -> None:
    def text(**tuning: Any) -> str:
        report = Report.from_dict(qnet.report.to_dict())
        report.search["tuning"] = tuning
        return str(report)

    losses = {"before": 0.00123, "after": 0.00045, "train": 0.0004}
    assert "tuned 10 steps: loss on held-out samples 0.00123 -> 0.00045" in text(step=10, **losses)
    assert "try a lower learning rate" in text(step=10, alarm=True, **losses)
    assert "nothing of it was kept" in text(step=0, alarm=True)
    assert "tuning" not in text(step=0, alarm=False)
