"""The rows that stand beside a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import PLAIN, batches, trained_net
from torch import Tensor, nn

import cora
from cora import Calibration, QuantSpec, SearchConfig, TuneConfig
from cora.batches import divergence
from cora.compare import same_bits_specs
from cora.modules import QuantLayer
from cora.quantizer import SUPPORTED_BITS, choose_qparams, weight_bits
from cora.report import float_state_bits

NAMES = ["stem", "depthwise", "pointwise", "body.0", "head"]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return trained_net()


@pytest.fixture(scope="module")
def calibration(net: nn.Module) -> Calibration:
    return Calibration(net, batches())


def quantize(net: nn.Module, calibration: Calibration, spec: Any, **options: Any) -> nn.Module:
    options = {
        "rank_budget": 0.1,
        "search": SearchConfig("gate", iterations=6),
        "tune": TuneConfig(iterations=4),
        "progress": False,
        **options,
    }
    return cora.quantize(net, calibration, spec, **options)


def stored(report: Any) -> int:
    return sum(row.stored_bits["weight"] + row.stored_bits["adapter"] for row in report.layers)


def bits_of(net: nn.Module, specs: dict[str, QuantSpec]) -> int:
    """Stored bits of the layers' weights under these quantizers."""
    total = 0
    for name, spec in specs.items():
        matrix = net.get_submodule(name).weight.detach().flatten(1)
        total += weight_bits(*matrix.shape, choose_qparams(matrix, spec))
    return total


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(3, clip="minmax"), QuantSpec(2, symmetric=True, clip="minmax"),
        QuantSpec(3, "per_tensor", clip="ksigma"),
        QuantSpec(2, "per_group", 9, clip="minmax"), QuantSpec(8),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("budget", "magnitude"), [(0.0, 1.0), (0.1, 1.0), (0.3, 1e-4)])
def test_same_bits_specs(spec: QuantSpec, budget: float, magnitude: float) -> None:
    """Never above the allowed bits as really stored, and nothing finer of the same bits fits."""
    net = trained_net()
    if spec.group_size:
        net.pointwise, net.head = nn.Conv2d(12, 18, 1), nn.Linear(18, 5)
        net.body = nn.Sequential(nn.Conv2d(18, 18, 3, padding=1), nn.ReLU())
    with torch.no_grad():
        net.body[0].weight.mul_(magnitude)
    skip = ["pointwise"] if spec.group_size else []
    calibration = Calibration(net, batches(1))
    # Without what comes after, which moves zero-points, and with them their stored bits.
    options: dict[str, Any] = {"search": None, **PLAIN}
    qmodel = quantize(net, calibration, spec, rank_budget=budget, skip=skip, **options)
    allowed = stored(qmodel.report)
    found = list(same_bits_specs(calibration, qmodel.report, spec))
    assert (budget == 0 and spec.bits == 8) or found
    seen = []
    for label, specs in found:
        assert list(specs) == [row.name for row in qmodel.report.layers]
        (bits,) = {s.bits for s in specs.values()}
        assert label.startswith(f"{bits}-bit") and bits in SUPPORTED_BITS and bits >= spec.bits
        seen.append(bits)
        taken = bits_of(net, specs)
        made = quantize(net, calibration, specs, rank_budget=0, **options)
        assert taken == stored(made.report) <= allowed
        assert all((s.symmetric, s.clip) == (spec.symmetric, spec.clip) for s in specs.values())
        for group in (512, 32, 12, 8):  # anything finer, by the same recipe, is too large
            channel, finer = spec.replace(bits=bits, granularity="per_channel", group_size=None), {}
            for row in qmodel.report.layers:
                columns = row.weights // row.weight_shape[0]
                size = max(n for n in range(1, group + 1) if columns % n == 0)
                grouped = channel.replace(granularity="per_group", group_size=size)
                finer[row.name] = channel if group >= columns else grouped
            assert not taken < bits_of(net, finer) <= allowed, (label, group)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("policy", ["same", "8bit", "float"])
def test_first_and_last_layers_are_alike(
    net: nn.Module, calibration: Calibration, policy: str
) -> None:
    qmodel = quantize(net, calibration, QuantSpec(3), first_last=policy)
    seen: list[dict[str, int]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append({n: m.bits for n, m in model.named_modules() if isinstance(m, QuantLayer)})
        return {"score": 1.0}

    cora.compare(net, calibration, qmodel, evaluate, progress=False)
    assert seen[0] == {} and all(layers.keys() == seen[1].keys() for layers in seen[1:])
    for layers in seen[1:]:
        assert policy != "8bit" or layers["stem"] == layers["head"] == 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_bits": 8, "activation": "dynamic", "skip": ["head"]},
        {"activation_bits": 6, "activation_range": "percentile", "adapter_bits": 4},
    ],
    ids=str,
)
def test_compare(net: nn.Module, calibration: Calibration, options: dict[str, Any]) -> None:
    qmodel = quantize(net, calibration, QuantSpec(2), **options)
    rows = cora.compare(net, calibration, qmodel, progress=False)
    assert qmodel.report.comparison is rows
    labels = [row["row"] for row in rows]
    assert labels[:3] == ["float", "2-bit, nearest", "2-bit, error feedback"]
    assert labels[3].startswith("same bits, no adapters (")
    assert labels[4:] == [
        "same bits, no adapters (bits chosen)",
        "2-bit + adapters, uniform ranks",
        "2-bit + adapters, searched ranks",
    ]
    exact, nearest, fed, same, mixed, uniform, searched = rows
    assert exact["total_bits"] == float_state_bits(net)
    assert exact["kl"] == pytest.approx(0, abs=1e-6)
    assert nearest["total_bits"] < same["total_bits"] <= searched["total_bits"]
    assert (
        mixed["bits_per_weight"] <= searched["bits_per_weight"] + 0.1
    )  # with what zero-points take
    assert searched["total_bits"] == qmodel.report.totals["total_bits"]
    allowed = 0.1 * qmodel.report.totals["float_weight_bits"]
    assert uniform["total_bits"] <= nearest["total_bits"] + allowed
    assert searched["kl"] < min(nearest["kl"], fed["kl"])
    with torch.no_grad():
        folded = calibration.model
        own = sum(float(divergence(qmodel(x), folded(x))) for x in batches()) / len(batches())
    assert searched["kl"] == pytest.approx(own, rel=1e-4)
    plain: dict[str, Any] = {**options, **PLAIN, "rank_budget": 0}
    for row, rounding in ((nearest, "nearest"), (fed, "gptq")):
        made = quantize(net, calibration, QuantSpec(2, rounding=rounding), **plain)
        assert row["total_bits"] == made.report.totals["total_bits"]
        assert row["kl"] == calibration.divergence(made)


def test_compare_where_bits_were_chosen(net: nn.Module, calibration: Calibration) -> None:
    """Uniform bits are as many as fit and one more; no other row takes more than the result."""
    qmodel = quantize(net, calibration, None, target_bits=4.8)
    rows = cora.compare(net, calibration, qmodel, progress=False)
    labels = [row["row"] for row in rows]
    adapted = ["same bits, no adapters"] * any(row.rank for row in qmodel.report.layers)
    assert labels == [
        "float",
        "4-bit, nearest",
        "4-bit, error feedback",
        "5-bit, nearest",
        "5-bit, error feedback",
        *adapted,
        "cora, bits and ranks chosen",
    ]
    above = [row["row"] for row in rows[1:] if row["bits_per_weight"] > 4.8]
    assert above == labels[3:5]
    assert rows[-1]["bits_per_weight"] == qmodel.report.totals["bits_per_weight"]
    assert rows[-1]["kl"] == calibration.divergence(qmodel) < rows[2]["kl"]


def test_compare_with_a_metric(net: nn.Module, calibration: Calibration) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        outputs: Tensor = model(batches()[0])
        return {"first": float(outputs[0, 0]), "mean": float(outputs.mean())}

    with torch.no_grad():
        qmodel = quantize(net, calibration, QuantSpec(3), search=SearchConfig("energy"))
        rows = cora.compare(net, calibration, qmodel, evaluate, progress=False)
        assert rows[0]["mean"] == float(net(batches()[0]).mean())
        assert rows[-1]["mean"] == float(qmodel(batches()[0]).mean())
    assert rows[-1]["row"] == "3-bit + adapters, energy ranks"
    plain = quantize(net, calibration, QuantSpec(3), rank_budget=0)
    labels = [row["row"] for row in cora.compare(net, calibration, plain, progress=False)]
    assert labels[-1].startswith("same bits")


def test_compare_needs_one_spec(net: nn.Module, calibration: Calibration) -> None:
    qmodel = quantize(net, calibration, {"*": QuantSpec(3)})
    with pytest.raises(ValueError, match="compare needs one QuantSpec for all layers"):
        cora.compare(net, calibration, qmodel)
