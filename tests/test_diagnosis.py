"""What a quantizer would lose: the estimate against what is measured, the advice on layers built for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, assert_same_state, batches, make_layer, state, trained_net
from torch import Tensor, nn

import cora
from cora import Calibration
from cora.diagnosis import Diagnosis, LayerDiagnosis
from cora.lowrank import LayerShape, factors, rank_bits
from cora.quantizer import weight_bits
from cora.rounding import quantize_matrix

# What is built here is known of rounding to nearest; one test is about error feedback.
QuantSpec = partial(cora.QuantSpec, rounding="nearest")


def diagnose(model: nn.Module, data: Any, spec: Any = None, **options: Any) -> Diagnosis:
    return cora.diagnose(model, data, spec or QuantSpec(3), progress=False, **options)


def white(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def two_layers(weight: Tensor) -> tuple[nn.Module, Tensor]:
    """A network whose first layer has the given weight, and white inputs for it."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]), nn.Linear(len(weight), 10))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model, white(256, weight.shape[1])


# --- The estimate --------------------------------------------------------------------------------


class Positions(nn.Module):
    """Logits that are the mean over positions of a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(48, 40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((2, 3))


def _small(model: nn.Module) -> nn.Module:
    """Nearly uniform classes: there the Fisher information is its diagonal but for the mean logit."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(48, 40), white(512, 48)),
        (Positions, white(512, 48, 3, 3)),
        (lambda: nn.Linear(48, 40), white(512, 7, 48)),
    ],
    ids=["classes", "positions", "frames"],
)
def test_predicted_loss_is_the_measured_one(make: Callable[[], nn.Module], x: Tensor) -> None:
    """One layer, white inputs: everything that the estimate takes for granted holds."""
    found = diagnose(_small(make()), x, QuantSpec(3))  # made here, where the test's seed is set
    assert found.loss == "KL, nats" and len(found.layers) == 1
    assert found.predicted_loss == pytest.approx(found.measured_loss, rel=0.15)


def test_predicted_loss_of_a_regression() -> None:
    """The loss is quadratic, so the estimate is off by its random projections only."""
    model, x = nn.Linear(32, 6), torch.randn(256, 32) + 0.5
    calibration = Calibration(model, x, logits=lambda _: None)
    found = diagnose(model, calibration, QuantSpec(2))
    assert found.loss == "relative squared error"
    assert found.predicted_loss == pytest.approx(found.measured_loss, rel=0.25)


def test_prediction_and_shares_add_up() -> None:
    found = diagnose(trained_net(), batches())
    assert [layer.name for layer in found.layers] == [
        *("stem", "depthwise", "pointwise", "body.0", "head"),
    ]
    assert found.predicted_loss == pytest.approx(sum(la.predicted_loss for la in found.layers))
    assert sum(layer.loss_share for layer in found.layers) == pytest.approx(1)
    assert found.measured_loss > 0
    for layer in found.layers:
        assert layer.predicted_loss > 0 and layer.loss_at_8_bits < layer.predicted_loss / 100


def test_an_option_leaves_what_its_quantizer_loses() -> None:
    model, x = two_layers(white(64, 64))
    calibration = Calibration(model, x)
    layer = diagnose(model, calibration).layers[0]
    for option, spec in (
        (layer.option("more bits"), QuantSpec(4)),
        (layer.option("finer groups", "groups of 32"), QuantSpec(3, "per_group", 32)),
    ):
        other = diagnose(model, calibration, spec).layers[0]
        assert option is not None
        # In proportion to the error at the layer's output, where the other quantizer's own is measured.
        share = other.output_error / layer.output_error
        assert layer.left(option) == pytest.approx(share, rel=1e-6)
        assert option.predicted_loss == pytest.approx(other.predicted_loss, rel=0.5)
        assert option.extra_bits == other.stored_bits - layer.stored_bits
    assert layer.option("finer groups", "groups of 64") is None  # a row is one already
    qparams = quantize_matrix(model[0].weight.detach(), QuantSpec(3)).qparams
    assert layer.stored_bits == weight_bits(64, 64, qparams)
    per_tensor = diagnose(model, calibration, QuantSpec(3, "per_tensor")).layers[0]
    rows = per_tensor.option("finer groups", "a scale a channel")
    assert rows is not None and rows.predicted_loss == pytest.approx(layer.predicted_loss, rel=0.3)
    assert diagnose(model, calibration, QuantSpec(8)).layers[0].option("more bits") is None


# --- The residual --------------------------------------------------------------------------------


def oracle(model: nn.Module, x: Tensor, spec: cora.QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, clipped weights and second moment of the first layer, in float64."""
    weight = model[0].weight.detach()
    rounded = quantize_matrix(weight, spec)
    qparams, residual = rounded.qparams, weight - rounded.dequantized
    scale, zero = qparams.scale.double(), qparams.zero_point.double()
    code = (weight.double() / scale).round() + zero
    clipped = (code < 0) | (code >= 2**spec.bits)
    return residual.double(), clipped, cora.Calibration(model, x).moment("0")[0].double()


def test_rounding_and_clipping() -> None:
    model, x = two_layers(white(24, 64))
    x = x * torch.linspace(0.2, 2, 64)
    spec = QuantSpec(4, clip="ksigma", k=1.5)
    layer = diagnose(model, x, spec).layers[0]
    residual, clipped, moment = oracle(model, x, spec)
    assert layer.clipped_weights == pytest.approx(float(clipped.double().mean()))
    assert 0.05 < layer.clipped_weights < 0.3
    energy = residual.square().sum()
    assert layer.clipping == pytest.approx(float(residual[clipped].square().sum() / energy))
    assert layer.clipping > 0.5 and layer.rounding + layer.clipping == pytest.approx(1)
    # At the output the two meet in a cross term, half of it with each.
    parts = residual * clipped, residual * ~clipped
    own, rest = (float(((p @ moment) * p).sum()) for p in parts)
    cross = 2 * float(((parts[0] @ moment) * parts[1]).sum())
    expected = (own + cross / 2) / (own + rest + cross)
    assert layer.weighted_clipping == pytest.approx(expected, rel=1e-2)
    wide = diagnose(model, x, QuantSpec(4, clip="minmax")).layers[0]
    assert wide.clipping < 0.05 and wide.rounding + wide.clipping == pytest.approx(1)


def test_spectra_and_stable_ranks() -> None:
    model, x = two_layers(white(24, 64))
    x = x * torch.linspace(0.2, 2, 64)
    layer = diagnose(model, x).layers[0]
    residual, _, moment = oracle(model, x, QuantSpec(3))
    values = torch.linalg.svdvals(residual)
    assert layer.spectrum == pytest.approx((values / values[0]).tolist(), abs=1e-3)
    stable = float(values.square().sum() / values[0] ** 2)
    assert layer.stable_rank == pytest.approx(stable, rel=1e-3)
    seen = torch.linalg.eigvalsh(residual @ moment @ residual.T).flip(0)
    assert layer.weighted_spectrum == pytest.approx((seen / seen[0]).sqrt().tolist(), abs=1e-2)
    assert layer.weighted_stable_rank == pytest.approx(float(seen.sum() / seen[0]), rel=1e-2)
    assert layer.weighted_stable_rank < layer.stable_rank  # unequal inputs make it uneven
    assert layer.weight_error == pytest.approx(
        float(residual.square().sum() / model[0].weight.detach().double().square().sum())
    )


def test_recovery_of_exact_adapters_is_the_spectrum_s() -> None:
    """At 32 bits an adapter's own rounding is nothing."""
    model, x = two_layers(white(128, 256))
    layer = diagnose(model, x, adapter_bits=32).layers[0]
    cost = rank_bits(LayerShape(128, 256, 1), 32)
    assert [r.rank for r in layer.recovery] == [int(s * 128 * 256 * 32 / cost) for s in SHARES]
    residual, _, moment = oracle(model, x, QuantSpec(3))
    plain = torch.linalg.svdvals(residual).square()
    seen = torch.linalg.eigvalsh(residual @ moment @ residual.T).flip(0)
    for recovery in layer.recovery:
        assert recovery.stored_bits == cost * recovery.rank <= recovery.share * 128 * 256 * 32
        first = slice(recovery.rank)
        assert recovery.plain == pytest.approx(float(plain[first].sum() / plain.sum()), abs=1e-3)
        assert recovery.weighted == pytest.approx(float(seen[first].sum() / seen.sum()), abs=1e-3)


SHARES = (0.01, 0.02, 0.05, 0.10)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_recovery_grows_with_the_share(bits: int) -> None:
    model, x = two_layers(white(128, 256))
    for layer in diagnose(model, x, adapter_bits=bits).layers:
        assert [recovery.share for recovery in layer.recovery] == list(SHARES)
        for part in ("rank", "plain", "weighted"):
            values = [getattr(recovery, part) for recovery in layer.recovery]
            assert values == sorted(values) and values[-1] > values[0] and values[-1] <= 128
        assert all(0 <= recovery.weighted <= 1 for recovery in layer.recovery)
    first = diagnose(model, x, adapter_bits=bits).layers[0]
    exact = factors(oracle(model, x, QuantSpec(3))[0].float())[2].square().squeeze(0)
    for recovery in first.recovery:  # rounding an adapter cannot win energy
        most = float(exact[: recovery.rank].sum() / exact.sum())
        assert recovery.plain <= most + 1e-4


# --- The advice ----------------------------------------------------------------------------------


def low_rank_outliers() -> Tensor:
    """Few loud rows and columns meet in weights that mean -+ k sigma clips: a residual of rank 1."""
    weight = 0.05 * white(128, 256)
    weight[::4, ::8] += 1.0
    return weight


def blocks_of_unequal_scale() -> Tensor:
    """Runs of 32 weights of a row share a magnitude."""
    scales = torch.tensor([1.0, *[0.25] * 7])
    blocks = torch.stack([scales.roll(row) for row in range(128)])
    return (torch.rand(128, 256) * 2 - 1) * blocks.repeat_interleave(32, 1)


BUILT = {
    "adapter": (low_rank_outliers, QuantSpec(4, clip="ksigma", k=2.0)),
    "more bits": (lambda: torch.rand(128, 256) * 2 - 1, QuantSpec(3, clip="minmax")),
    "finer groups": (blocks_of_unequal_scale, QuantSpec(3, clip="minmax")),
}


@pytest.mark.parametrize("advice", BUILT)
def test_advice_for_a_layer_built_for_it(advice: str) -> None:
    build, spec = BUILT[advice]
    model, x = two_layers(build())
    layer = diagnose(model, x, spec).layers[0]
    assert layer.advice == advice, layer
    assert layer.loss_share > 0.05
    best = min(
        layer.options, key=lambda o: (o.predicted_loss - layer.predicted_loss) / o.extra_bits
    )
    assert best.advice == advice and layer.reason.startswith(best.detail)
    if advice == "adapter":
        assert layer.clipping > 0.8 and layer.stable_rank < 1.5


def test_an_exact_weight_is_fine() -> None:
    """Codes -4..3 times a power of two: nothing is lost, and nothing is to be won."""
    weight = torch.randint(-4, 4, (24, 64)) / 8.0
    weight[:, 0], weight[:, 1] = -0.5, 0.375
    model, x = two_layers(weight)
    exact, other = diagnose(model, x, QuantSpec(3, clip="minmax")).layers
    assert exact.advice == "fine as it is" and exact.reason == "0.0% of the network's loss"
    assert exact.predicted_loss == exact.weight_error == exact.stable_rank == 0
    assert exact.spectrum == () and exact.rounding == exact.clipping == 0
    assert all(recovery.plain == recovery.weighted == 0 for recovery in exact.recovery)
    assert other.advice != "fine as it is" and other.loss_share == 1


def test_a_tiny_layer_is_left_float() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny, self.large = nn.Linear(4, 4), nn.Linear(512, 512)
            self.head = nn.Linear(516, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([20 * self.tiny(x[:, :4]), self.large(x)], 1))

    tiny, large, _ = diagnose(Scaled(), white(64, 512)).layers
    assert tiny.advice == "leave float" and tiny.reason.startswith("tiny")
    assert large.advice != "leave float"


def test_a_layer_that_8_bits_hurt_is_left_float() -> None:
    """Weights so far from the others, in every group, that all codes are lost to them."""
    weight = white(64, 128)
    weight[:, ::16] = 3000.0
    model, x = two_layers(weight)
    x[:, ::16] = 0.0  # the far weights do nothing, only their range does
    layer = diagnose(model, x, QuantSpec(3, clip="minmax"), adapter_bits=32).layers[0]
    assert layer.advice == "leave float" and "8 bits" in layer.reason


def test_a_good_quantizer_is_fine_everywhere() -> None:
    found = diagnose(trained_net(), batches(), QuantSpec(8))
    assert found.predicted_loss < 1e-3
    assert {layer.advice for layer in found.layers} == {"fine as it is"}


# --- Layers of every kind, and the result ---------------------------------------------------------


KINDS = ("linear-sequence", "conv1d-plain", "conv2d-grouped", "conv2d-depthwise", "conv3d-plain")


@pytest.mark.parametrize(
    "kind", [*KINDS, "convtranspose2d-grouped", "convtranspose1d-strided", "conv2d-same_uneven"]
)
def test_layers_of_every_kind(kind: str) -> None:
    layer, x = make_layer(kind)
    model = nn.Sequential(layer, nn.Flatten())
    (found,) = diagnose(model, x, QuantSpec(2)).layers
    shape = LayerShape.of(layer)
    assert found.kind == LAYERS[kind][0].__name__
    assert (found.full_rank, found.weights) == (shape.full_rank, shape.rows * shape.columns)
    assert found.predicted_loss > 0 and 0 < found.weight_error < 1 and found.output_error > 0
    assert 1 <= found.stable_rank <= shape.full_rank * shape.groups + 1e-3
    assert found.spectrum[0] == 1 and list(found.spectrum) == sorted(found.spectrum, reverse=True)


def test_odd_layers() -> None:
    """All zero, one weight, never run: no division by nothing, and nothing to do."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero, self.one, self.idle = nn.Linear(4, 4), nn.Linear(1, 1), nn.Linear(2, 2)
            self.head = nn.Linear(5, 3)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.zero(x), self.one(x[:, :1])], 1))

    found = diagnose(Odd(), white(16, 4), QuantSpec(2))
    losses = {layer.name: layer.predicted_loss for layer in found.layers}
    assert losses["zero"] == losses["one"] == losses["idle"] == 0 < losses["head"]
    assert [layer.advice for layer in found.layers[:3]] == ["fine as it is"] * 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_model_is_untouched_and_the_result_repeats() -> None:
    model = trained_net()
    before = state(model)
    first = diagnose(model, batches())
    assert_same_state(before, state(model))
    assert diagnose(model, batches()) == first
    calibration = Calibration(model, batches())
    assert diagnose(model, calibration) == first == diagnose(model, calibration)


def test_dict_and_table() -> None:
    found = diagnose(trained_net(), batches())
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values == found.to_dict()
    assert values["layers"][0]["recovery"][2]["share"] == 0.05
    assert values["settings"]["weight"]["bits"] == 3 and values["settings"]["adapter_bits"] == 4
    text = str(found)
    lines = text.splitlines()
    assert len(lines) == 2 + len(found.layers) + 3
    for line, layer in zip(lines[2:], found.layers, strict=False):
        assert line.startswith(layer.name) and line.endswith(layer.reason)
        assert re.search(rf"  {re.escape(layer.advice)}  ", line)
    assert f"measured {found.measured_loss:.3g}" in lines[-1]


def test_bad_arguments() -> None:
    model, x = two_layers(white(24, 64))
    with pytest.raises(TypeError, match="weight must be a QuantSpec"):
        cora.diagnose(model, x, {"0": QuantSpec(3)}, progress=False)
    with pytest.raises(ValueError, match="adapter_bits must be one of"):
        diagnose(model, x, adapter_bits=9)
    with pytest.raises(ValueError, match="group_size must divide"):
        diagnose(model, x, QuantSpec(3, "per_group", 24))
    with pytest.raises(ValueError, match="another model"):
        diagnose(nn.Linear(64, 3), Calibration(model, x))


# --- The page ------------------------------------------------------------------------------------


def test_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from test_html import check

    found = diagnose(trained_net(), batches())
    for name in ("a.html", "b.html"):
        found.to_html(tmp_path / name)
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert check(page) == 3  # losses, energies, spectra
    for layer in found.layers:
        assert f"<td>{layer.name}</td>" in page and layer.advice in page


def test_page_of_many_and_of_exact_layers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    from test_html import check

    found = diagnose(trained_net(), batches())
    nasty = replace(found.layers[0], name="<b>&\"'", reason="<i>")
    exact: LayerDiagnosis = replace(
        found.layers[1], spectrum=(), weighted_spectrum=(), options=(), predicted_loss=0.0
    )
    replace(found, layers=(nasty, *[exact] * 70)).to_html(tmp_path / "many.html")
    page = (tmp_path / "many.html").read_text()
    assert check(page) == 3 and "<b>" not in page and "<i>" not in page
    replace(found, layers=(exact,)).to_html(tmp_path / "exact.html")
    assert check((tmp_path / "exact.html").read_text()) == 2  # there is no spectrum


def test_error_feedback_leaves_less() -> None:
    """On inputs whose channels go together, with the default rounding."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    x = white(512, 8) @ white(8, 64) + 0.1 * white(512, 64)
    nearest = diagnose(model, x, QuantSpec(3)).layers[0]
    feedback = diagnose(model, x, cora.QuantSpec(3)).layers[0]
    assert feedback.predicted_loss < 0.5 * nearest.predicted_loss
    assert feedback.stored_bits == nearest.stored_bits
