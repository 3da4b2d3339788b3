"""What the calibration data tell, against direct computations; the model itself stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    LAYERS,
    Net,
    TwoInputs,
    assert_same_state,
    batches,
    make_layer,
    state,
    trained_net,
)
from torch import Tensor, nn

from cora import Calibration
from cora.activation_ranges import activation_qparams
from cora.batches import Batch, divergence, output_logits
from cora.calibration import (
    input_rows,
    quantizable_layers,
)
from cora.curvature import curvature, sensitivity
from cora.lowrank import LayerShape, unfold
from cora.moments import likeliest_ridge

# --- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        (lambda x, y: x, False),
        (lambda x, y: (x,), False),
        (lambda x, y: [x], False),
        (lambda x, y: (x, y), True),
        (lambda x, y: [x, y], True),
        (lambda x, y: ((x,), y), True),
        (lambda x, y: {"x": x}, False),
        (lambda x, y: {"x": x, "labels": y}, True),
        (lambda x, y: {"target": y, "x": x}, True),
        (lambda x, y: ({"x": x}, y), True),
    ],
)
def test_batch_forms(form: Callable[..., Any], labels: bool) -> None:
    net, (x, y) = trained_net(), batches(1, labels=True)[0]
    batch = Batch(form(x, y))
    assert len(batch) == 16
    assert torch.equal(batch.run(net), net(x))
    assert (batch.labels is not None) == labels
    for part, expected in ((batch[:3], slice(3)), (batch[torch.tensor([5, 2])], [5, 2])):
        assert torch.equal(part.run(net), net(x[expected]))
        if labels:
            assert torch.equal(part.labels, y[expected])
    calibration = Calibration(net, [form(x, y)] if not isinstance(form(x, y), Tensor) else x)
    assert calibration.samples == 16


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        (lambda a, b, y: (a, b), False),
        (lambda a, b, y: (a, b, y), True),
        (lambda a, b, y: ((a, b), y), True),
        (lambda a, b, y: ({"first": a, "second": b}, y), True),
        (lambda a, b, y: {"second": b, "first": a, "label": y}, True),
    ],
)
def test_batches_of_two_inputs(form: Callable[..., Any], labels: bool) -> None:
    model = TwoInputs()
    a, b, y = torch.randn(5, 4), torch.randn(5, 3), torch.arange(5)
    calibration = Calibration(model, [form(a, b, y)] * 2, samples=8)
    assert calibration.samples == 8
    assert torch.equal(calibration.teacher()[0], model(a, b))
    assert torch.equal(calibration.teacher()[1], model(a[:3], b[:3]))
    assert (calibration.batches[1].labels is not None) == labels


def test_samples_are_trimmed_and_no_more_is_read() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(len(read))
            yield torch.randn(10, 3, 8, 8)

    calibration = Calibration(trained_net(), endless(), samples=25)
    assert [len(batch) for batch in calibration.batches] == [10, 10, 5]
    assert read == [0, 1, 2] and calibration.samples == 25


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "calibration: expected at least one sample, got none"),
        ([torch.zeros(0, 3, 8, 8)], ValueError, "calibration: expected at least one sample"),
        (iter(()), ValueError, "calibration: expected at least one sample"),
        ([torch.full((2, 3, 8, 8), float("nan"))], ValueError, "batch 0 must be finite"),
        (
            [torch.ones(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.inf)],
            ValueError,
            "batch 1 must be finite",
        ),
        (3, TypeError, "calibration: expected an iterable of batches, got int"),
        ("data", TypeError, "calibration: expected an iterable of batches, got str"),
        (["data"], TypeError, "a batch must hold tensors .* got str"),
        ([torch.zeros(1).numpy()], TypeError, "a batch must hold tensors .* got ndarray"),
        ([{"labels": torch.zeros(3)}], TypeError, "a batch must hold tensors"),
        ([()], TypeError, "a batch must hold tensors"),
        ([None], TypeError, "a batch must hold tensors .* got NoneType"),
        ([(torch.ones(2, 3, 8, 8),) * 3], ValueError, "a batch of 3 items must .* requires 1"),
    ],
)
def test_bad_batches(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Calibration(trained_net(), data)


def test_data_that_do_not_fit_the_model() -> None:
    for x, seen in (
        (torch.zeros(2, 4, 8, 8), r"float32 \[2, 4, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8).double(), "float64"),
        (torch.zeros(1, 3, 8, 8).byte(), "uint8"),
    ):
        for use in (
            Calibration.teacher,
            sensitivity,
            lambda c: c.moment("head"),
            lambda c: c.activation_qparams(8),
        ):
            with pytest.raises(
                ValueError, match=f"calibration: the model does not run on a batch of {seen}"
            ):
                use(Calibration(trained_net(), x))


def test_quantizable_layers() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2)
    model.lstm, model.cell = nn.LSTM(8, 4), nn.GRUCell(8, 4)
    model.scaled, model.plain = Scaled(8, 8), nn.Linear(8, 8)
    model.again, model.embedding = model.plain, nn.Embedding(5, 8)
    model.convs = nn.ModuleList([nn.Conv1d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)])
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    layers, kept = quantizable_layers(model)
    assert list(layers) == ["plain", "convs.0", "convs.1"]
    for name, reason in {
        "attention": "MultiheadAttention", "lstm": "LSTM: recurrent", "cell": "GRUCell: recurrent",
        "scaled": "Scaled is a subclass", "embedding": "Embedding", "normed": "subclass",
    }.items():  # fmt: skip
        assert reason in kept[name]


# --- Logits and divergence -----------------------------------------------------------------------


def test_output_logits() -> None:
    flat, frames, maps = torch.randn(4, 7), torch.randn(4, 9, 7), torch.randn(2, 7, 3, 5)
    assert output_logits(flat) is flat and output_logits(frames) is frames
    assert torch.equal(output_logits(maps), maps.permute(0, 2, 3, 1))
    assert output_logits(SimpleNamespace(logits=flat)) is flat
    assert output_logits({"logits": flat, "hidden": frames}) is flat
    for other in (
        torch.randn(4, 1),
        torch.randn(4),
        torch.ones(4, 3, dtype=torch.long),
        [flat],
        None,
    ):
        assert output_logits(other) is None


def test_divergence() -> None:
    p, q = torch.randn(6, 5), torch.randn(6, 5)
    expected = sum(
        float(a * (a.log() - b.log()))
        for x, y in zip(p.softmax(1), q.softmax(1), strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert float(divergence(q, p)) == pytest.approx(expected / 6, rel=1e-5)
    assert float(divergence(p, p)) == 0
    assert torch.isfinite(divergence(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])))
    masked_p, masked_q = (
        F.pad(x, (0, 1), value=float("-inf")) for x in (p, q.requires_grad_(True))
    )
    masked = divergence(masked_q, masked_p)
    assert float(masked.detach()) == pytest.approx(expected / 6, rel=1e-5)
    assert torch.isfinite(torch.autograd.grad(masked, q)[0]).all()
    t, s = torch.randn(4, 1), torch.randn(4, 1)
    error = float((t - s).square().sum() / t.square().sum())
    assert float(divergence(s, t)) == pytest.approx(error, rel=1e-5)
    assert float(divergence({"a": s, "b": [t]}, {"a": t, "b": [t]})) == pytest.approx(
        error / 2, rel=1e-5
    )
    assert torch.isfinite(divergence(s, torch.zeros(4, 1)))
    with pytest.raises(TypeError, match="output must hold float tensors, got str"):
        divergence("a", "b")


# --- Rows and moments ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_input_rows_times_weight_is_the_output(name: str) -> None:
    layer, x = make_layer(name)
    shape, transposed = LayerShape.of(layer), getattr(layer, "transposed", False)
    matrix = unfold(layer.weight.detach(), transposed, shape.groups).reshape(
        shape.groups, -1, shape.columns
    )
    dims = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    for item in (x, x[0]):
        rows = input_rows(layer, item)
        output = (rows @ matrix.transpose(1, 2)).permute(1, 0, 2).reshape(-1, shape.rows)
        if layer.bias is not None:
            output = output + layer.bias
        expected = layer(item)
        if dims:
            expected = expected.movedim(-1 - dims, -1)
        torch.testing.assert_close(output, expected.reshape(-1, shape.rows), atol=1e-4, rtol=1e-4)
    some = input_rows(layer, x, 3, torch.Generator().manual_seed(0))
    everything = input_rows(layer, x)
    assert some.shape[1] <= max(3, everything.shape[1]) and some.shape[::2] == everything.shape[::2]
    for p in range(some.shape[1]):
        assert (everything == some[:, p : p + 1]).all(-1).all(0).any()


def direct_moment(net: Net, name: str, data: list[Tensor]) -> Tensor:
    """Sum over all positions of the outer products, a sample, in float64."""
    inputs: list[Tensor] = []
    layer = net.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].clone()))
    for x in data:
        net(x)
    handle.remove()
    rows = torch.cat([input_rows(layer, x).double() for x in inputs], dim=1)
    return rows.transpose(1, 2) @ rows / sum(len(x) for x in data)


def without_ridge(calibration: Calibration, name: str) -> Tensor:
    """A moment without what makes it hold for other samples, which is the same on all its diagonal."""
    moment = calibration.moment(name).double()
    ridge = calibration._ridges[name].double()
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)
    assert ((ridge / (mean - ridge) * 1.001 >= 1e-3) & (ridge / (mean - ridge) < 3.01)).all()
    return moment - ridge[:, None, None] * torch.eye(moment.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("inplace", [False, True])
def test_moments(inplace: bool) -> None:
    net, data = trained_net(inplace), batches()
    calibration = Calibration(net, data)
    for name in ("stem", "depthwise", "pointwise", "body.0", "head"):
        found, expected = without_ridge(calibration, name), direct_moment(net, name, data)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (torch.linalg.eigvalsh(calibration.moment(name).double()) > 0).all()


@pytest.mark.parametrize("layer", [nn.Linear(301, 3), nn.Conv2d(30, 3, 3, padding=1)], ids=str)
def test_moments_made_by_blocks(layer: nn.Module) -> None:
    size = (5, 301) if isinstance(layer, nn.Linear) else (2, 30, 4, 5)
    data = [torch.randn(size) for _ in range(3)]
    rows = torch.cat([input_rows(layer, x)[0] for x in data]).double()
    want = rows.T @ rows / sum(len(x) for x in data)
    calibration = Calibration(nn.Sequential(layer), data)
    moment = calibration.moment("0")[0]
    assert torch.equal(moment, moment.T)
    torch.testing.assert_close(without_ridge(calibration, "0")[0], want, rtol=1e-4, atol=1e-5)


def test_fewer_samples_take_more_ridge() -> None:
    """And it is the right one: of all ridges about the likeliest for inputs that were not seen."""
    root = torch.randn(48, 48) * torch.linspace(0.1, 1, 48)
    unseen = torch.randn(20_000, 48) @ root
    truth = unseen.T @ unseen / len(unseen)
    found = []
    for count in (16, 64, 256, 16_384):
        first, second = (torch.randn(count // 2, 48) @ root for _ in range(2))
        halves = [half.T @ half / len(half) for half in (first, second)]
        found.append(likeliest_ridge(halves[0][None], halves[1][None]))

        def surprise(ridge: float, moment: Tensor = halves[0]) -> float:
            ridged = moment + ridge * moment.diagonal().mean() * torch.eye(48)
            solved = torch.linalg.solve(ridged.double(), truth.double())
            return float(solved.trace() + torch.logdet(ridged.double()))

        best = min(map(surprise, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)))
        assert surprise(found[-1]) < best + 6  # nats of 48 numbers
    assert found == sorted(found, reverse=True) and found[0] >= 0.1 and found[-1] <= 0.003
    assert likeliest_ridge(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)) > 0


@pytest.mark.parametrize("count", [64, 400, 3000])
def test_the_ridge_of_many_columns(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimated trace finds what the sum does."""
    root = torch.randn(1100, 1100) * torch.logspace(0, -2, 1100)
    halves = [
        (half.T @ half / count)[None]
        for half in (torch.randn(count, 1100) @ root for _ in range(2))
    ]
    estimated = likeliest_ridge(*halves)
    monkeypatch.setattr("cora.moments._EXACT", 1100)
    assert likeliest_ridge(*halves) == estimated


def test_a_single_batch_is_tried_on_its_halves() -> None:
    layer, x = nn.Linear(64, 3), torch.randn(32, 64)
    one = Calibration(layer, x)
    assert one.samples == 32 and len(one.batches) == 1
    two = Calibration(layer, [x[:16], x[16:]])
    assert torch.equal(one.moment(""), two.moment(""))
    assert float(one._ridges[""]) > 0.1  # 16 samples of 64 numbers say little


class Recording(Calibration):
    """Keeps the names of the layers whose moments were made together."""

    passes: list[list[str]]

    def _collect_moments(self, names: list[str]) -> None:
        self.__dict__.setdefault("passes", []).append(names)
        super()._collect_moments(names)


def test_moments_in_bounded_memory_are_the_same() -> None:
    net, data = (
        trained_net(),
        [torch.randn(20, 3, 48, 48) for _ in range(2)],
    )  # more positions than are kept
    whole = Calibration(net, data)
    once = {name: whole.moment(name).clone() for name in whole.layers}
    for limit in (1, 100_000):
        split = Recording(net, data, memory_limit=limit)
        for name in reversed(list(split.layers)):
            assert torch.equal(split.moment(name), once[name]), name
        for names in split.passes:
            assert len(names) == 1 or sum(map(split._moment_bytes, names)) <= limit
    exact = direct_moment(net, "stem", data)
    error = (once["stem"].double() - exact).norm() / exact.norm()
    assert error < 0.05


def test_moments_of_uneven_batches_and_keyword_calls() -> None:
    """Maps of several sizes, a layer that runs twice: the sum over all of them, a sample."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=self.conv(x))

    model, data = Twice(), [torch.randn(6, 4, 20), torch.randn(2, 4, 9)]
    total = torch.zeros(1, 12, 12)
    for x in data:
        for seen in (x, model.conv(x).detach()):
            rows = input_rows(model.conv, seen)
            total += rows.transpose(1, 2) @ rows / 8
    total.diagonal(dim1=1, dim2=2).add_(1e-3 * total.diagonal(dim1=1, dim2=2).mean())
    torch.testing.assert_close(Calibration(model, data).moment("conv"), total, atol=1e-4, rtol=1e-4)


def test_unused_layer_and_zero_input() -> None:
    net = trained_net()
    net.unused = nn.Linear(4, 3)
    calibration = Calibration(net, [torch.zeros(4, 3, 8, 8)])
    assert torch.equal(calibration.moment("unused"), torch.eye(4)[None])
    assert torch.equal(calibration.moment("stem"), torch.eye(27)[None])
    assert sensitivity(calibration)["unused"] == 0
    scale, zero = calibration.activation_qparams(8)["unused"]
    assert scale.item() == 1 and zero.item() == 0


# --- Sensitivity ---------------------------------------------------------------------------------


def test_sensitivity() -> None:
    plain = sensitivity(Calibration(trained_net(inplace=False), batches()))
    assert all(0 < value < float("inf") for value in plain.values())
    inplace = sensitivity(Calibration(trained_net(inplace=True), batches()))
    labelled = sensitivity(Calibration(trained_net(), batches(labels=True)))
    assert inplace == labelled == pytest.approx(plain, rel=1e-4)
    assert sensitivity(Calibration(trained_net(), batches())) == inplace


def test_sensitivity_is_the_fisher_information() -> None:
    """Of one linear layer it is the mean over inputs of tr(diag(p) - p p^T) / classes."""
    layer, x = nn.Linear(6, 4).requires_grad_(False), torch.randn(256, 6)
    p = layer(x).softmax(1)
    expected = float((p - p.square()).sum(1).mean() / 4)
    assert sensitivity(Calibration(layer, x))[""] == pytest.approx(expected, rel=0.1)


def test_sensitivity_of_a_regression() -> None:
    layer, x = nn.Linear(6, 1).requires_grad_(False), torch.randn(32, 6)
    expected = 1 / float(layer(x).square().mean())
    assert sensitivity(Calibration(layer, x))[""] == pytest.approx(expected, rel=1e-4)


# --- Activation ranges ---------------------------------------------------------------------------


def reach(scale: Tensor, zero: Tensor, bits: int) -> tuple[float, float]:
    return float(-scale * zero), float(scale * (2**bits - 1 - zero))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_qparams(bits: int) -> None:
    sample = torch.cat([torch.randn(20000), torch.tensor([40.0, -3.0])])
    low, high = float(sample.min()), float(sample.max())

    def error(scale: Tensor, zero: Tensor) -> float:
        codes = ((sample / scale).round() + zero).clamp(0, 2**bits - 1)
        return float(((codes - zero) * scale - sample).square().sum())

    found = {}
    for method in ("minmax", "percentile", "mse"):
        scale, zero = activation_qparams(sample, low, high, bits, method)
        assert scale.dtype == torch.float32 and zero.dtype == torch.int32 and scale.numel() == 1
        assert 0 <= int(zero) < 2**bits
        found[method] = scale, zero
    a, b = reach(*found["minmax"], bits)
    step = float(found["minmax"][0])
    assert (
        a <= low + step / 2 + 1e-4
        and b >= high - step / 2 - 1e-4
        and b - a == pytest.approx(high - low)
    )
    ends = torch.quantile(sample, torch.tensor([0.0001, 0.9999]))
    c, d = reach(*found["percentile"], bits)
    assert d - c == pytest.approx(float(ends[1] - ends[0]), rel=1e-3)
    assert error(*found["mse"]) <= min(error(*found["minmax"]), 1.0001 * error(*found["minmax"]))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_activation_ranges_hold_zero(method: str) -> None:
    for sample in (
        torch.rand(1000) + 5,
        -torch.rand(1000) - 5,
        torch.zeros(10),
        torch.full((3,), 2.5),
    ):
        scale, zero = activation_qparams(
            sample, float(sample.min()), float(sample.max()), 8, method
        )
        low, high = reach(scale, zero, 8)
        assert low <= 0 <= high and scale > 0
        if method == "minmax":
            assert low <= sample.min() + scale and high >= sample.max() - scale
    with pytest.raises(
        ValueError, match="activation_range must be one of minmax, percentile, mse, got 'best'"
    ):
        activation_qparams(torch.zeros(1), 0, 0, 8, "best")


def test_activation_ranges_of_a_model() -> None:
    net, data = trained_net(), batches()
    ranges = Calibration(net, data).activation_qparams(8, "minmax")
    seen: dict[str, list[Tensor]] = {name: [] for name in ranges}
    for name in ranges:
        net.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0].detach().clone())
        )
    for x in data:
        net(x)
    assert list(ranges) == ["stem", "depthwise", "pointwise", "body.0", "head"]
    for name, (scale, zero) in ranges.items():
        values = torch.cat([x.reshape(-1) for x in seen[name]])
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        assert float(scale) == pytest.approx((high - low) / 255, rel=1e-5)
        assert int(zero) == round(-low / float(scale))


# --- The model stays as it was -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_model_is_not_changed(training: bool) -> None:
    net = trained_net().train(training)
    net.stem.register_forward_hook(lambda *_: None)
    net.head.weight.requires_grad_(False)
    data = batches()
    before, inputs = state(net), [x.clone() for x in data]
    calibration = Calibration(net, data)
    copied = state(calibration.model)
    calibration.teacher()
    sensitivity(calibration)
    calibration.activation_qparams(4)
    calibration.moment("head")
    assert_same_state(before, state(net))
    assert_same_state(copied, state(calibration.model))
    assert not any(m.training for m in calibration.model.modules())
    assert all(torch.equal(x, y) for x, y in zip(data, inputs, strict=True))


# --- Order and curvature -------------------------------------------------------------------------


def test_order_is_that_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(6, 6)
            self.last, self.middle, self.first = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(self.middle(self.first(x)))))

    calibration = Calibration(Backwards(), torch.randn(5, 6))
    assert list(calibration.layers) == ["unused", "last", "middle", "first"]
    assert calibration.order == ["first", "middle", "last", "unused"]
    assert not any(m._forward_hooks for m in calibration.model.modules())


@pytest.mark.parametrize("kind", ["softmax", "frames", "regression", "uneven regression"])
def test_curvature_is_the_divergence_of_small_errors(kind: str) -> None:
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 1 if "regression" in kind else 6))
    x = torch.randn(1500, 5, 10) if kind == "frames" else torch.randn(1500, 10)
    if kind == "uneven regression":
        x *= torch.logspace(-2, 0, 1500)[torch.randperm(1500)][:, None]
    with torch.no_grad():
        model[1].weight.mul_(3)
    calibration = Calibration(model, x)
    errors = {
        name: [0.01 * torch.randn_like(layer.weight) for _ in range(4)]
        for name, layer in calibration.layers.items()
    }
    predicted = curvature(calibration, errors, samples=1500)
    for name, layer in calibration.layers.items():
        measured = []
        for error in errors[name]:
            before = layer.weight.data
            layer.weight.data = before + error
            measured.append(calibration.divergence(calibration.model))
            layer.weight.data = before
        assert sum(predicted[name]) == pytest.approx(sum(measured), rel=0.15)
        for one, other in zip(predicted[name], measured, strict=True):
            assert one == pytest.approx(other, rel=0.35)


def test_curvature_leaves_the_model_and_needs_no_gradients_on() -> None:
    calibration = Calibration(trained_net(), batches())
    errors = {n: [torch.ones_like(m.weight)] for n, m in calibration.layers.items()}
    before = state(calibration.model)
    found = curvature(calibration, errors)
    assert_same_state(before, state(calibration.model))
    with torch.no_grad():
        assert curvature(calibration, errors) == found
        assert sensitivity(Calibration(trained_net(), batches())) == sensitivity(calibration)
    assert all(value[0] > 0 for value in found.values())


def test_output_size() -> None:
    for name in ("linear", "conv2d-grouped", "convtranspose2d-strided"):
        layer, x = make_layer(name)
        calibration = Calibration(layer, x)
        with torch.no_grad():
            output = layer(x)
            if layer.bias is not None:
                output = output - layer.bias.reshape(-1, *[1] * (output.dim() - 2))
        expected = float(output.square().mean().sqrt())
        assert calibration.output_size("") == pytest.approx(expected, rel=1e-2)
