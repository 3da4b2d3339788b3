"""cora.quantize on small models: what it makes, what it says, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PLAIN, Net, TwoInputs, assert_same_state, batches, quantize, state, trained_net
from torch import Tensor, nn

import cora
from cora import Calibration, QuantSpec, SearchConfig, TuneConfig
from cora.batches import divergence
from cora.calibration import quantizable_layers
from cora.fitting import FittedLayers, _towards
from cora.fold import FoldedBatchNorm
from cora.modules import QuantLayer

NAMES = ["stem", "depthwise", "pointwise", "body.0", "head"]
UNIFORM = SearchConfig(method="uniform")


def packed_layers(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def reasons(qmodel: nn.Module) -> dict[str, str]:
    return {entry.name: entry.reason for entry in qmodel.report.float_entries}


@torch.no_grad()
def close(a: nn.Module, b: nn.Module, *x: Tensor, atol: float = 1e-3) -> None:
    torch.testing.assert_close(a(*x), b(*x), atol=atol, rtol=1e-3)


# --- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_bits": 8, "fold_bn": False}, {"search": SearchConfig("gate", iterations=6)}],
    ids=["plain", "activations-bn", "gate"],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_users_model_is_untouched(training: bool, options: dict[str, Any]) -> None:
    net, data = trained_net().train(training), batches(labels=True)
    net.head.weight.requires_grad_(False)
    net.register_forward_hook(lambda *_: None)
    before, inputs = state(net), copy.deepcopy(data)
    qmodel = quantize(net, data, **options)
    assert_same_state(before, state(net))
    assert all(
        torch.equal(x, y)
        for a, b in zip(data, inputs, strict=True)
        for x, y in zip(a, b, strict=True)
    )
    assert not any(module.training for module in qmodel.modules())
    assert not list(net.stem.named_buffers()) and list(packed_layers(qmodel)) == NAMES
    shared = {id(t) for t in net.state_dict(keep_vars=True).values()}
    assert not shared & {id(t) for t in qmodel.state_dict(keep_vars=True).values()}
    for tensor in qmodel.state_dict().values():
        tensor.zero_()
    assert_same_state(before, state(net))


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("adapter_bits", [4, 8, 16])
def test_packed_is_the_dequantized_model(adapter_bits: int, activation_bits: int | None) -> None:
    qmodel = quantize(trained_net(), adapter_bits=adapter_bits, activation_bits=activation_bits)
    plain = cora.dequantize(qmodel)
    assert not packed_layers(plain) and packed_layers(qmodel)
    x = batches()[0]
    if (
        activation_bits
    ):  # dequantize leaves activations float: put the same quantizers before its layers
        for name, layer in packed_layers(qmodel).items():

            def hook(_m: nn.Module, args: tuple[Tensor, ...], layer: QuantLayer = layer) -> Tensor:
                codes = (args[0] / layer.x_scale).round() + layer.x_zero_point
                return (codes.clamp(0, 2**8 - 1) - layer.x_zero_point) * layer.x_scale

            plain.get_submodule(name).register_forward_pre_hook(hook)
    close(qmodel, plain, x, atol=2e-2 if activation_bits else 1e-3)  # a code may fall either way


def test_rank_budget_0_is_plain_quantization() -> None:
    net = trained_net()
    for search in (None, UNIFORM, SearchConfig()):
        spec = QuantSpec(3, rounding="nearest")
        qmodel = quantize(net, spec=spec, rank_budget=0, search=search, fold_bn=False, **PLAIN)
        for name, layer in packed_layers(qmodel).items():
            assert layer.rank == 0 and layer.adapter_a is None
            kind = type(layer)
            expected = kind.from_float(net.get_submodule(name), spec, rank=0)
            assert torch.equal(layer.codes, expected.codes) and torch.equal(
                layer.weight, expected.weight
            )
        assert qmodel.report.totals["adapter_bits"] == 0


@pytest.mark.parametrize("fit", ["weighted", "plain"])
def test_a_large_budget_is_the_float_model(fit: str) -> None:
    net, x = trained_net(), batches()[0]
    qmodel = quantize(
        net, spec=QuantSpec(2), rank_budget=50, adapter_bits=32, search=SearchConfig(), fit=fit
    )
    for layer in qmodel.report.layers:
        assert layer.rank == layer.full_rank
    close(qmodel, net, x, atol=5e-3)


def test_more_budget_is_closer() -> None:
    net, x = trained_net(), batches()[0]
    with torch.no_grad():
        errors = [
            float(
                (quantize(net, spec=QuantSpec(2), rank_budget=budget)(x) - net(x)).square().mean()
            )
            for budget in (0, 0.1, 0.3, 0.8)
        ]
    assert errors == sorted(errors, reverse=True)


# --- Which layers, with what ---------------------------------------------------------------------


def test_weight_patterns() -> None:
    specs = {"body.*": QuantSpec(8), "*ea*": QuantSpec(2, "per_tensor"), "stem": QuantSpec(5)}
    qmodel = quantize(trained_net(), spec=specs)
    bits = {name: layer.bits for name, layer in packed_layers(qmodel).items()}
    assert bits == {"stem": 5, "body.0": 8, "head": 2}
    assert reasons(qmodel)["pointwise"] == "no pattern in weight matches"
    first = quantize(trained_net(), spec={"*": QuantSpec(4), "head": QuantSpec(8)})
    assert {layer.bits for layer in packed_layers(first).values()} == {4}


@pytest.mark.parametrize(("skip", "left"), [
    (["head"], NAMES[:-1]), (("body.*", "stem"), ["depthwise", "pointwise", "head"]),
    ({"*wise"}, ["stem", "body.0", "head"]), ([], NAMES), (["norm"], NAMES),
])  # fmt: skip
def test_skip(skip: Any, left: list[str]) -> None:
    qmodel = quantize(trained_net(), skip=skip)
    assert list(packed_layers(qmodel)) == left
    for name in set(NAMES) - set(left):
        assert reasons(qmodel)[name] == "named in skip"
        assert torch.equal(
            qmodel.get_submodule(name).weight, trained_net().get_submodule(name).weight
        )


@pytest.mark.parametrize(
    ("policy", "first", "last"), [("same", 3, 3), ("8bit", 8, 8), ("float", None, None)]
)
def test_first_last(policy: str, first: int | None, last: int | None) -> None:
    qmodel = quantize(trained_net(), first_last=policy)
    bits = [getattr(qmodel.get_submodule(name), "bits", None) for name in NAMES]
    assert bits == [first, 3, 3, 3, last]
    if policy == "float":
        assert "first or last layer" in reasons(qmodel)["stem"]


def test_first_last_of_a_plan_whose_base_has_8_bits() -> None:
    """They have their 8 bits whatever the budget is, and a scale a channel."""
    qmodel = quantize(trained_net(), spec=QuantSpec(8), first_last="8bit", target_bits=5.0)
    rows = {row.name: row for row in qmodel.report.layers}
    for name in ("stem", "head"):
        assert (rows[name].bits, rows[name].group_size, rows[name].rank) == (8, None, 0)
    assert min(row.bits for row in rows.values()) < 8


def test_an_adapter_that_costs_more_than_it_wins_is_left_out() -> None:
    """Two bits are too few for factors of white noise: their own rounding is worse than none."""
    torch.manual_seed(3)
    layer, x = nn.Linear(48, 48), torch.randn(256, 48)
    for propagate in (False, True):
        options = {"rank_budget": 0.06, "propagate": propagate, "tune": None}
        coarse = quantize(layer, x, QuantSpec(4), adapter_bits=2, **options)
        fine = quantize(layer, x, QuantSpec(4), adapter_bits=8, **options)
        assert coarse.report.layers[0].rank == 0 == coarse.report.totals["adapter_bits"]
        assert fine.report.layers[0].rank > 0
        assert coarse.report.search["ranks"] == {"": 0}
        assert fine.report.search["adapter_bits"] == {"": 8}


# --- Strange models ------------------------------------------------------------------------------


def test_shared_modules_and_tied_weights() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b = self.a
            self.list = nn.ModuleList([self.a, nn.ReLU()])
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.list[0](F.relu(self.b(F.relu(self.a(x)))))))

    model, x = Shared(), torch.randn(16, 6)
    for search in (UNIFORM, SearchConfig("gate", iterations=6)):
        qmodel = quantize(model, x, rank_budget=0.4, search=search)
        assert qmodel.a is qmodel.b and qmodel.a is qmodel.list[0]
        assert [layer.name for layer in qmodel.report.layers] == ["a", "c"]
        close(qmodel, cora.dequantize(qmodel), x)
    full = quantize(model, x, rank_budget=9, adapter_bits=32)
    close(full, model, x)


def test_an_embedding_tied_to_a_layer_keeps_its_own_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.middle = nn.Linear(6, 6)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.middle(self.embedding(tokens)))

    model, tokens = Tied(), torch.randint(0, 9, (40, 3))
    calibration = Calibration(model, tokens)
    qmodel = quantize(
        model,
        calibration,
        QuantSpec(2),
        search=SearchConfig("gate", iterations=0, holdout=20),
        bias_correction=False,
        embedding_bits=None,
        **PLAIN,
    )
    assert torch.equal(qmodel.embedding.weight, model.embedding.weight)
    assert set(packed_layers(qmodel)) == {"head", "middle"}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20]
    held = tokens[order.sort().values]
    loss = min(qmodel.report.search["candidates"].values())
    with torch.no_grad():
        found = float(divergence(qmodel(held), model(held)))
    assert found == pytest.approx(loss, rel=1e-3)


def test_modules_that_stay_float() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 3)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            x = self.attention(x, x, x)[0]
            return self.scale * self.head(self.norm(self.lstm(x)[0])).mean(1)

    model, tokens = Mixed().eval(), torch.randint(0, 11, (12, 7))
    qmodel = quantize(model, tokens, rank_budget=0.2, search=SearchConfig("gate", iterations=6))
    projections = [f"attention.{name}_proj" for name in ("q", "k", "v", "out")]
    assert list(packed_layers(qmodel)) == [*projections, "head"]
    why = reasons(qmodel)
    assert why["lstm"] == "biases"
    assert set(why) == {"", "lstm", "norm"}
    assert sum(entry.stored_bits for entry in qmodel.report.float_entries) == 32 * sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(("lstm.bias", "norm", "scale"))
    )
    close(qmodel, cora.dequantize(qmodel), tokens)


@pytest.mark.parametrize(
    "search", [UNIFORM, SearchConfig("gate", iterations=6)], ids=["uniform", "gate"]
)
@pytest.mark.parametrize("budget", [0, 0.3, 9.0])
def test_the_model_may_be_a_layer(budget: float, search: SearchConfig) -> None:
    layer, x = nn.Linear(12, 9), torch.randn(32, 12)
    qmodel = quantize(layer, x, rank_budget=budget, search=search)
    assert isinstance(qmodel, cora.QuantLinear) and isinstance(layer, nn.Linear)
    assert qmodel.report.layers[0].name == ""
    close(qmodel, cora.dequantize(qmodel), x)


@pytest.mark.parametrize(
    "kind", ["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
)
def test_every_kind_in_a_model(kind: str) -> None:
    dims = int(kind[-2])
    cls = getattr(nn, kind)
    model = nn.Sequential(cls(4, 8, 3, groups=2), nn.ReLU(inplace=True), cls(8, 4, 2))
    x = torch.randn(8, 4, *(6,) * dims)
    for search in (UNIFORM, SearchConfig("gate", iterations=4)):
        qmodel = quantize(model, x, search=search, activation_bits=8, activation="dynamic")
        assert qmodel(x).shape == model(x).shape
    full = quantize(model, x, rank_budget=9, adapter_bits=32)
    close(full, model, x)


def test_two_inputs_dicts_and_generators() -> None:
    model = TwoInputs()
    a, b = torch.randn(20, 4), torch.randn(20, 3)
    for data in (
        [(a, b)],
        ({"second": b, "first": a} for _ in range(1)),
        [((a, b), torch.zeros(20).long())],
    ):
        qmodel = quantize(model, data, rank_budget=0.5, search=SearchConfig("gate", iterations=4))
        close(qmodel, cora.dequantize(qmodel), a, b)


def test_a_layer_that_never_runs() -> None:
    net = trained_net()
    net.unused = nn.Linear(8, 8)
    for search in (UNIFORM, SearchConfig("gate", iterations=4)):
        qmodel = quantize(net, search=search, activation_bits=8)
        assert torch.isfinite(qmodel.unused(torch.randn(2, 8))).all()


def test_constant_and_zero_layers() -> None:
    net, x = trained_net(), batches()[0]
    nn.init.zeros_(net.pointwise.weight)
    nn.init.constant_(net.body[0].weight, 0.1)
    calibration = Calibration(net, batches())
    for search in (UNIFORM, SearchConfig("gate", iterations=6)):
        plain = quantize(net, search=search, adapter_bits=8, **PLAIN)
        assert torch.equal(plain.body[0].weight, net.body[0].weight)
        assert torch.equal(plain.pointwise.weight, net.pointwise.weight)
        for layer in plain.report.layers:
            assert 0 <= layer.residual_after <= layer.residual_before * 1.01 + 1e-9
        more = {"adapter_bits": 8, "tune": TuneConfig(iterations=12)}
        fitted = quantize(net, calibration, search=search, **more)
        assert torch.equal(fitted.pointwise.weight, net.pointwise.weight)
        assert torch.isfinite(plain(x)).all() and torch.isfinite(fitted(x)).all()
        # The zero layer hides all that comes before it: what is left is the rounding of float32.
        assert calibration.divergence(fitted) <= calibration.divergence(plain) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_another_precision(dtype: torch.dtype) -> None:
    """Half-precision models are quantized like others; float64 ones are refused with the reason."""
    net = trained_net().to(dtype)
    data = [x.to(dtype) for x in batches()]
    for search in (UNIFORM, SearchConfig("gate", iterations=4)):
        if dtype == torch.float64:
            with pytest.raises((TypeError, ValueError), match="float64"):
                quantize(net, data, search=search)
        else:
            qmodel = quantize(net, data, search=search)
            y = qmodel(data[0])
            assert y.dtype == dtype and torch.isfinite(y).all()
            error = (y.float() - net(data[0]).float()).square().mean() / net(
                data[0]
            ).float().square().mean()
            assert error < 0.5


# --- Calibration and batch norm ------------------------------------------------------------------


def test_one_calibration_for_several_quantizations() -> None:
    net = trained_net()
    calibration = Calibration(net, batches())
    for bits in (4, 2):
        for search in (UNIFORM, SearchConfig("gate", iterations=4)):
            shared = quantize(net, calibration, QuantSpec(bits), search=search)
            alone = quantize(net, batches(), QuantSpec(bits), search=search)
            for key, value in alone.state_dict().items():
                assert torch.equal(value, shared.state_dict()[key]), key


def test_batch_norms_are_folded_before_quantization() -> None:
    net, x = trained_net(), batches()[0]
    qmodel = quantize(net, spec=QuantSpec(8), rank_budget=0, bias_correction=False)
    assert isinstance(qmodel.norm, FoldedBatchNorm)
    assert qmodel.report.settings["folded"] == {"stem": "norm"}
    factor = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    torch.testing.assert_close(
        qmodel.stem.bias, net.norm.bias - factor * net.norm.running_mean, atol=1e-6, rtol=1e-5
    )
    weight = net.stem.weight * factor[:, None, None, None]
    assert (qmodel.stem.weight - weight).abs().max() < weight.abs().max() / 2**7
    close(qmodel, net, x, atol=0.5)
    kept = quantize(net, fold_bn=False, bias_correction=False)
    assert torch.equal(kept.norm.running_mean, net.norm.running_mean)
    assert kept.stem.bias is None and kept.report.settings["folded"] == {}
    skipped = quantize(net, skip=["stem"])  # a layer that stays float stays as it is
    assert type(skipped.norm) is nn.BatchNorm2d and skipped.report.settings["folded"] == {}


def test_a_calibration_is_of_the_unfolded_model() -> None:
    net = trained_net()
    calibration = Calibration(net, batches())
    calibration.check(net)
    changed = copy.deepcopy(net)
    changed.norm.running_mean.add_(
        1
    )  # moves nothing but the folded bias; its scale moves the weight
    changed.norm.running_var.mul_(2)
    with pytest.raises(ValueError, match="layer 'stem' differs"):
        quantize(changed, calibration)
    with pytest.raises(ValueError, match="another model"):
        quantize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), calibration)


def test_bias_correction() -> None:
    """Channel means are the float model's, layer by layer; kept only where the outputs come closer."""
    net, data = trained_net(), batches()
    calibration = Calibration(net, data)
    options: dict[str, Any] = {"spec": QuantSpec(3), "rank_budget": 0}
    alone = {**options, "propagate": False}
    plain = quantize(net, calibration, **alone, bias_correction=False)
    corrected = quantize(net, calibration, **alone)
    assert corrected.report.settings["biases_corrected"]
    assert calibration.divergence(corrected) < calibration.divergence(plain)
    plain = quantize(net, calibration, **options, bias_correction=False)
    corrected = quantize(net, calibration, **options)
    assert corrected.report.settings["biases_corrected"]
    x = torch.cat(data)
    with torch.no_grad():
        before, after = ((m(x) - net(x)).mean(0).abs().max() for m in (plain, corrected))
    assert after < 0.2 * before
    assert not any(m._forward_hooks for m in corrected.modules())
    exact = quantize(net, calibration, spec=QuantSpec(8), rank_budget=9, adapter_bits=32)
    if not exact.report.settings["biases_corrected"]:  # nothing to win: nothing is changed
        untouched = quantize(
            net, calibration, QuantSpec(8), rank_budget=9, adapter_bits=32, bias_correction=False
        )
        for key, value in untouched.state_dict().items():
            assert torch.equal(value, exact.state_dict()[key]), key


def test_activation_options() -> None:
    net, x = trained_net(), batches()[0]
    dynamic = quantize(net, activation_bits=4, activation="dynamic")
    assert all(layer.x_scale is None for layer in packed_layers(dynamic).values())
    scales = {}
    for method in ("minmax", "percentile", "mse"):
        static = quantize(net, activation_bits=4, activation_range=method)
        scales[method] = [float(layer.x_scale) for layer in packed_layers(static).values()]
        assert torch.isfinite(static(x)).all()
    assert all(a >= b for a, b in zip(scales["minmax"], scales["mse"], strict=True))
    assert scales["minmax"] != scales["percentile"]


# --- Dequantize ----------------------------------------------------------------------------------


def test_dequantize_leaves_the_packed_model() -> None:
    qmodel = quantize(trained_net(), fold_bn=False, bias_correction=False)
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    plain = cora.dequantize(qmodel)
    assert {type(m) for m in plain.modules()} == {type(m) for m in Net().modules()}
    assert plain.state_dict().keys() == Net().state_dict().keys()
    nn.init.zeros_(plain.norm.weight)
    assert all(torch.equal(value, qmodel.state_dict()[key]) for key, value in before.items())
    assert qmodel.report.layers and not hasattr(plain, "report")
    assert list(quantizable_layers(plain)[0]) == NAMES
    again = quantize(plain, spec=QuantSpec(8), rank_budget=0)
    close(again, plain, batches()[0], atol=0.3)
    with pytest.raises(ValueError, match="qmodel: expected a model with packed layers"):
        cora.dequantize(Net())


def test_quantized_models_copy() -> None:
    qmodel, x = quantize(trained_net()), batches()[0]
    twin = copy.deepcopy(qmodel)
    assert torch.equal(twin(x), qmodel(x)) and twin.report.to_dict() == qmodel.report.to_dict()


# --- Bits chosen, and layers in their order ------------------------------------------------------


class Wide(nn.Module):
    """A classifier of some thousand weights, of layers that differ in how much they matter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.blocks = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.stem(x))))
        for factor, block in zip((0.02, 0.2, 1.0, 3.0), self.blocks, strict=True):
            x = x + factor * F.relu(block(x))
        return 8 * self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def wide() -> Calibration:
    torch.manual_seed(5)
    return Calibration(Wide(), batches())


def chosen(calibration: Calibration, target: float, **options: Any) -> nn.Module:
    quick = {"tune": TuneConfig(iterations=4), "progress": False}
    return cora.quantize(calibration.model, calibration, target_bits=target, **{**quick, **options})


@pytest.mark.parametrize("target", [2.3, 2.8, 3.5, 4.7, 6.0])
def test_chosen_bits_meet_the_target(wide: Calibration, target: float) -> None:
    qmodel = chosen(wide, target, **PLAIN)
    stored = qmodel.report.totals["bits_per_weight"]
    assert 0.97 * target < stored <= target
    search = qmodel.report.search
    assert search["method"] == "joint"
    assert qmodel.report.settings["target_bits"] == pytest.approx(target)
    front = search["front"]
    assert [p["predicted"] for p in front] == sorted((p["predicted"] for p in front), reverse=True)
    assert search["ranks"] == {row.name: row.rank for row in qmodel.report.layers}


def test_more_bits_are_closer(wide: Calibration) -> None:
    losses = [wide.divergence(chosen(wide, target, **PLAIN)) for target in (2.4, 3.0, 4.0, 6.0)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.05 * losses[0]


def test_chosen_bits_beat_the_same_everywhere(wide: Calibration) -> None:
    plain = quantize(wide.model, wide, QuantSpec(3), rank_budget=0, **PLAIN)
    mixed = chosen(wide, plain.report.totals["bits_per_weight"], **PLAIN)
    assert len({row.bits for row in mixed.report.layers}) > 1
    assert wide.divergence(mixed) < 0.9 * wide.divergence(plain)


def test_what_chosen_bits_share(wide: Calibration) -> None:
    spec = QuantSpec(8, symmetric=True, clip="minmax", rounding="nearest")
    qmodel = chosen(wide, 4.0, weight=spec, rank_budget=0, first_last="float")
    assert list(packed_layers(qmodel)) == ["depthwise", *(f"blocks.{i}" for i in range(4))]
    for row in qmodel.report.layers:
        assert row.clip == "minmax" and row.rank == 0
    assert all(layer.symmetric for layer in packed_layers(qmodel).values())
    fixed = chosen(wide, 4.5, first_last="8bit")
    bits = [row.bits for row in fixed.report.layers]
    assert bits[0] == bits[-1] == 8 and min(bits[1:-1]) < 6
    assert fixed.report.totals["bits_per_weight"] <= 4.5
    ranged = chosen(wide, 4.5, activation_bits=8, rank_budget=0)
    assert ranged.report.totals["bits_per_weight"] <= 4.5


def test_without_arguments_it_is_three_and_a_half_bits(wide: Calibration) -> None:
    qmodel = cora.quantize(wide.model, wide, tune=None, propagate=False, progress=False)
    assert 3.4 < qmodel.report.totals["bits_per_weight"] <= 3.5
    tiny = nn.Linear(6, 4)  # 2-bit codes and a scale a row take more
    qmodel = cora.quantize(tiny, torch.randn(40, 6), progress=False, tune=None)
    assert qmodel.report.totals["bits_per_weight"] > 3.5
    assert qmodel.report.layers[0].bits == 2


def test_the_fewest_bits_for_a_drop() -> None:
    """Of a classifier that is sure of nothing."""
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
    calibration = Calibration(model, torch.randn(400, 24))
    stored = []
    for drop in (5, 30):
        qmodel = cora.quantize(model, calibration, max_drop=drop, progress=False, **PLAIN)
        stored.append(qmodel.report.totals["bits_per_weight"])
        assert qmodel.report.settings["max_drop"] == drop
    assert stored[0] > stored[1]
    with pytest.raises(
        ValueError, match=r"max_drop must be at least \d+\.\d\d points, what 8 bits"
    ):
        cora.quantize(model, calibration, max_drop=1e-9, progress=False)


def test_a_chosen_model_comes_back_from_its_file(wide: Calibration, tmp_path: Path) -> None:
    x = batches()[0]
    for options in ({}, {"activation_bits": 6}):
        qmodel = chosen(wide, 3.3, **options)
        cora.save(qmodel, tmp_path / "m.safetensors")
        again = cora.load(tmp_path / "m.safetensors", Wide())
        assert torch.equal(again(x), qmodel(x))
        for key, value in qmodel.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
        if not options:
            close(qmodel, cora.dequantize(qmodel), x)
        twin = chosen(wide, 3.3, **options)
        for key, value in qmodel.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key]), key


@pytest.mark.parametrize("budget", [0, 0.1])
def test_layers_fitted_in_order_are_closer(budget: float) -> None:
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(24, 24), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(24, 5))
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(2.5)
        model[-1].weight.mul_(4)
    mix = torch.randn(24, 24) * torch.logspace(0, -1.5, 24)[:, None]
    calibration = Calibration(model, torch.randn(512, 24) @ mix)
    unseen = torch.randn(512, 24) @ mix
    found = {}
    for propagate in (False, True):
        qmodel = quantize(
            model, calibration, QuantSpec(2), rank_budget=budget, tune=None, propagate=propagate
        )
        assert qmodel.report.settings["propagated"] == propagate
        with torch.no_grad():
            found[propagate] = float(divergence(qmodel(unseen), model(unseen)))
        assert not any(m._forward_hooks for m in calibration.model.modules())
    assert found[True] < 0.9 * found[False]


@pytest.mark.parametrize(("worse", "kept"), [(0.05, True), (0.5, False), (-0.5, True)])
def test_layers_by_themselves_must_be_measurably_closer(
    worse: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample in eight loses a whole nat more or less either way: 0.05 of a mean is nothing beside it."""

    def losses(self: FittedLayers, evaluator: object) -> Tensor:
        noise = torch.tensor([1.0, 0, 0, 0, -1.0, 0, 0, 0]).repeat(4)
        return 2 + noise + worse if self.in_order else torch.full((32,), 2.0)

    monkeypatch.setattr(FittedLayers, "losses", losses)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    qmodel = quantize(
        model, torch.randn(64, 12), QuantSpec(2), rank_budget=0, tune=None, propagate=True
    )
    assert qmodel.report.settings["propagated"] == kept


def test_some_rows_of_a_large_layer_choose_its_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are then moved by it."""
    own = torch.randn(2, 1, 60, 12)
    other = own + 0.5 * torch.randn(own.shape)
    matrix, inputs = torch.randn(40, 12), (other.mT @ other / 60, own.mT @ other / 60)
    solve, seen = torch.cholesky_solve, []
    monkeypatch.setattr(
        torch, "cholesky_solve", lambda b, u: seen.append(b.shape[-1]) or solve(b, u)
    )
    want = _towards(matrix, *inputs)
    assert set(seen) == {40}
    seen.clear()
    monkeypatch.setattr("cora.fitting._RIDGE_WORK", 12 * 12 * 20)
    assert torch.equal(_towards(matrix, *inputs), want)
    assert seen[-1] == 40
    assert set(seen[:-1]) == {20}


def test_inputs_that_did_not_drift_move_nothing() -> None:
    """The first layer sees what the float one sees: its aim is its weight, to the bit."""
    rows = torch.randn(2, 1, 40, 12)  # of two halves of the samples
    moment = rows.mT @ rows
    matrix = torch.randn(6, 12)
    assert torch.equal(_towards(matrix, moment, moment.clone()), matrix)
    assert torch.equal(_towards(matrix, 0 * moment, 0 * moment), matrix)
    # Inputs that came out half as large ask for twice the weight, up to the ridge.
    aim = _towards(matrix, moment / 4, moment / 2)
    assert float((aim - 2 * matrix).norm() / matrix.norm()) < 0.35
    layer = nn.Linear(12, 9)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(0, 4, (9, 12)) * 0.25)
        layer.weight[:, 0], layer.weight[:, 1] = 0, 0.75
    qmodel = quantize(layer, torch.randn(64, 12), QuantSpec(2), rank_budget=0, tune=None)
    assert torch.equal(qmodel.weight, layer.weight)
