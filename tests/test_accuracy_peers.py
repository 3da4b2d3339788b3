"""benchmarks/accuracy_*.py: quantizers put beside cora's are what they say, and stored bits are counted alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, make_layer
from torch import Tensor, nn

import cora
from cora.calibration import quantizable_layers
from cora.moments import input_rows
from cora.quantizer import choose_qparams
from cora.report import report_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import accuracy_baselines as baselines
import accuracy_peers
from accuracy_baselines import Peer

OWN = {peer.name: peer for peer in baselines.BASELINES}
NEAREST = OWN["round to nearest, least squared error"]
ADAROUND = OWN["AdaRound, own"]
PLAIN = {"rank_budget": 0, "bias_correction": False, "progress": False}


class Small(nn.Module):
    """What a peer must get right: a residual, grouped layers, an activation in place, a layer whose own
    attributes the model reads, a channel of equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)
        self.depthwise.weight.data[0] = 0.25

    def forward(self, x: Tensor) -> Tensor:
        around = [size // 2 for size in self.stem.kernel_size for _ in range(2)]
        x = self.relu(self.stem(torch.nn.functional.pad(x, around)))
        x = x + self.grouped(torch.nn.functional.relu6(self.depthwise(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture
def model() -> nn.Module:
    return Small().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 3, 8, 8), torch.zeros(16)) for _ in range(2)]


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: baselines.matrix_of(layer) for name, layer in quantizable_layers(model)[0].items()
    }


# --- What is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_counted(bits: int) -> None:
    codes = torch.arange(2**bits).repeat(3, 2).float()
    scale = torch.tensor([[0.5], [1e-3], [7.0]])
    matrix = (codes - 1) * scale
    assert baselines.distinct_levels_ok(matrix, 1, bits)
    assert baselines.distinct_levels_ok(matrix * (1 + 1e-7), 1, bits)
    matrix[1, 0] += 0.5e-3
    assert not baselines.distinct_levels_ok(matrix, 1, bits)
    assert baselines.distinct_levels_ok(matrix, 2**bits, bits)  # two weights a scale


def test_affine_counts_as_cora_does(model: nn.Module, batches: Any) -> None:
    calibration = cora.Calibration(model, batches, 32, 0)
    for bits, group in ((2, None), (3, None), (4, 4)):
        granularity = "per_channel" if group is None else "per_group"
        result = NEAREST.run(model, batches, bits, 0, group_size=group)
        spec = {
            name: cora.QuantSpec(
                bits=bits,
                granularity=granularity,
                group_size=group and baselines.group_of(matrix.shape[1], group),
            )
            for name, matrix in matrices(model).items()
        }
        # The weights as they are: what layers are fitted to in order may need zero-points of 16 bits.
        plain = {**PLAIN, "propagate": False}
        totals = report_of(cora.quantize(model, calibration, spec, **plain)).totals
        # cora's ranges need not hold 0, so that its zero-points may take 8 bits where these take `bits`.
        scales = sum(m.shape[0] * (m.shape[1] // (s.group_size or m.shape[1]))
                     for m, s in zip(matrices(model).values(), spec.values(), strict=True))  # fmt: skip
        wider = totals["total_bits"] - result.total_bits
        assert 0 <= wider <= (8 - bits) * scales
        assert result.bits_per_weight * totals["quantized_weights"] == pytest.approx(
            result.weight_bits
        )


def test_stored_bits_by_hand() -> None:
    codes, scale = torch.tensor([[0, 3, 1], [2, 2, 0]]), torch.tensor([[0.5], [2.0]])
    zero = torch.tensor([[1.0], [3.0]])
    assert baselines.affine(codes, scale, zero, 2).stored_bits == 2 * 8 + 2 * 16 + 8
    half = torch.full((2, 1), 2.0)
    symmetric = baselines.affine(codes, scale, half, 2, symmetric=True)
    assert symmetric.stored_bits == 2 * 8 + 2 * 16
    assert torch.equal(symmetric.matrix, (codes - 2) * scale)
    offset = baselines.affine(codes, scale, zero + 0.25, 2)  # no whole zero-point: a float16 each
    assert offset.stored_bits == 2 * 8 + 2 * 16 + 2 * 16
    assert torch.equal(offset.matrix, (codes - zero - 0.25) * scale)


def test_refuses_what_is_not_on_its_grid() -> None:
    codes, scale, zero = torch.tensor([[0, 3, 1]]), torch.tensor([[0.5]]), torch.tensor([[1.0]])
    matrix = (codes - zero) * scale
    assert torch.equal(baselines.read_affine(matrix, scale, zero, 2).matrix, matrix)
    with pytest.raises(ValueError, match="multiples of its scale"):
        baselines.read_affine(matrix + 0.1, scale, zero, 2)
    with pytest.raises(ValueError, match=r"codes: expected 0\.\.3, got 0\.\.4"):
        baselines.affine(codes + (codes == 3), scale, zero, 2)
    with pytest.raises(ValueError, match="zero_point"):
        baselines.affine(codes, scale, zero, 2, symmetric=True)


def test_a_layer_left_float_is_counted_float(model: nn.Module) -> None:
    weights = baselines.round_to_nearest(model, [], bits=4)
    whole = baselines.finish(model, weights)
    del weights["stem"]
    part = baselines.finish(model, weights)
    assert part.float_layers == ("stem",)
    assert torch.equal(part.model.stem.weight, model.stem.weight)
    stem = baselines.round_to_nearest(model, [], bits=4)["stem"].stored_bits
    assert part.weight_bits - whole.weight_bits == 32 * model.stem.weight.numel() - stem


def test_a_float_weight_does_not_pass_for_quantized(model: nn.Module) -> None:
    cheat = Peer(
        "none", (3,), ("per_channel",), lambda m, *_, **__: {
            name: baselines.Stored(matrix, 1, 3, 0) for name, matrix in matrices(m).items()
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match="stem: more than 8 values share a scale"):
        cheat.run(model, [torch.randn(1, 3, 8, 8)], 3, 0)


# --- The quantizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("name", OWN)
def test_runs_and_leaves_the_model_alone(
    name: str, group: int | None, model: nn.Module, batches: Any
) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    peer = OWN[name]
    steps = peer.iterations and 3
    results = [peer.run(model, batches, 3, 0, group_size=group, iterations=steps) for _ in range(2)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    first, second = (matrices(result.model) for result in results)
    for key, matrix in matrices(model).items():
        assert torch.equal(first[key], second[key])
        assert not torch.equal(first[key], matrix)
        if not results[0].adapter_bits:
            groups = matrix.shape[1] // baselines.group_of(matrix.shape[1], group)
            assert baselines.distinct_levels_ok(first[key], groups, 3)
    assert results[0].float_layers == ()
    with torch.no_grad():
        y, expected = (m(batches[0][0]) for m in (results[0].model, model))
    assert float((y - expected).square().mean() / expected.var()) < 0.5


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str) -> None:
    layer, x = make_layer(name)
    model = nn.Sequential(layer)
    result = ADAROUND.run(model, [x], 8, 0, iterations=2)
    assert result.float_layers == ()
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=0.05)


def test_nearest_is_as_good_as_cora(model: nn.Module) -> None:
    for bits in (2, 3, 4):
        for matrix in matrices(model).values():
            scale, zero = baselines.choose_grid(matrix, bits, matrix.shape[1])
            own = baselines._nearest(matrix, scale, zero, bits).matrix
            wide = baselines.choose_grid(matrix, bits, matrix.shape[1], "minmax")
            widest = baselines._nearest(matrix, *wide, bits).matrix
            error, bound = ((w - matrix).square().sum() for w in (own, widest))
            assert error <= bound * (1 + 1e-6)
            q = choose_qparams(matrix, cora.QuantSpec(bits=bits))
            codes = ((matrix / q.scale).round() + q.zero_point).clamp(0, 2**bits - 1)
            decoded = (codes - q.zero_point) * q.scale
            assert error < 2.5 * (decoded - matrix).square().sum()  # its ranges need not hold 0


def test_adaround_beats_nearest_at_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    x = torch.randn(512, 6) @ torch.randn(6, 24)  # inputs that depend on each other
    errors = {}
    for peer in (NEAREST, ADAROUND):
        result = peer.run(model, [x], 2, 0, iterations=400)
        errors[peer.name] = float((result.model(x) - model(x)).square().mean())
    assert errors[ADAROUND.name] < 0.5 * errors[NEAREST.name]


def test_adaround_rounds_to_a_neighbour(model: nn.Module, batches: Any) -> None:
    result = ADAROUND.run(model, batches, 4, 0, iterations=50)
    for name, matrix in matrices(model).items():
        scale, zero = baselines.choose_grid(matrix, 4, matrix.shape[1])
        low, high = (0 - zero) * scale, (15 - zero) * scale
        away = (matrices(result.model)[name] - matrix.clamp(low, high)).abs() / scale
        assert float(away.max()) <= 1 + 1e-4


def test_loftq_brings_the_weight_nearer(model: nn.Module) -> None:
    plain = baselines.round_to_nearest(model, [], bits=2)
    wide = baselines.loftq(model, [], bits=2, share=0.5)
    for name, matrix in matrices(model).items():
        stored = wide[name]
        error = (stored.matrix + stored.adapter - matrix).square().sum()
        assert error <= (plain[name].matrix - matrix).square().sum() * (1 + 1e-6)
        assert stored.adapter_bits <= 0.5 * 32 * matrix.numel()
    assert baselines.finish(model, wide).adapter_bits > 0


def test_low_rank_first_is_of_the_weight(model: nn.Module) -> None:
    """The adapter is the weight's own, and only what it leaves is rounded."""
    found = baselines.low_rank_first(model, [], bits=8, share=0.5)
    for name, matrix in matrices(model).items():
        stored, rest = found[name], matrix - found[name].adapter
        assert (stored.matrix - rest).norm() <= 0.02 * rest.norm()
        assert (rest.norm() < matrix.norm()) == (stored.adapter_bits > 0)
        assert stored.adapter_bits <= 0.5 * 32 * matrix.numel()
    assert baselines.finish(model, found).adapter_bits > 0


def test_activations_are_quantized_on_request(model: nn.Module, batches: Any) -> None:
    x = batches[0][0]
    fine, coarse = (
        NEAREST.run(model, batches, 8, 0, activation_bits=bits) for bits in (8, 2)
    )  # fmt: skip
    weights_only = NEAREST.run(model, batches, 8, 0)
    assert fine.total_bits - weights_only.total_bits == 64 * len(matrices(model))
    near, far = (
        float((r.model(x) - weights_only.model(x)).abs().max()) for r in (fine, coarse)
    )  # fmt: skip
    assert 0 < near < 0.1 * far


# --- Looking into a model ------------------------------------------------------------------------


def test_trace(model: nn.Module, batches: Any) -> None:
    batch = baselines.calibration_batches(model, batches)[0]
    order, activations = baselines.trace_layers(model, batch)
    assert order == {"stem": 1, "depthwise": 1, "grouped": 1, "head": 1}
    assert list(order) == ["stem", "depthwise", "grouped", "head"]
    found = {name: function.__name__ for name, function in activations.items()}
    assert found == {"stem": "relu", "depthwise": "relu6"}


def test_rows_reproduce_a_layer(model: nn.Module, batches: Any) -> None:
    batch = baselines.calibration_batches(model, batches)[0]
    (x,) = baselines.layer_inputs(model, model.grouped, batch, 1)
    rows = input_rows(model.grouped, x)
    weight, bias = baselines._by_groups(model.grouped, baselines.matrix_of(model.grouped))
    y = rows @ weight.transpose(1, 2) + bias
    expected = model.grouped(x).movedim(1, -1).reshape(-1, 2, 4).transpose(0, 1)
    torch.testing.assert_close(y, expected)


def test_what_a_peer_cannot_do(model: nn.Module, batches: Any) -> None:
    peer = Peer("some", (4,), ("per_channel",), lambda *_, **__: {}, lambda model: False)
    with pytest.raises(ValueError, match=r"bits must be one of \(4,\), got 3"):
        peer.run(model, batches, 3, 0)
    with pytest.raises(ValueError, match="does not quantize per_group"):
        peer.run(model, batches, 4, 0, group_size=8)
    with pytest.raises(ValueError, match="does not quantize all layers"):
        peer.run(model, batches, 4, 0)


# --- The libraries, where they are ---------------------------------------------------------------


def test_what_is_absent_has_a_reason() -> None:
    available = {peer.name for peer in accuracy_peers.peers()}
    reasons = accuracy_peers.unavailable()
    assert set(OWN) <= available
    assert not available & set(reasons)
    assert {peer.name for peer in accuracy_peers.LIBRARIES} <= available | set(reasons)
    assert all(reasons.values())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("peer", accuracy_peers.LIBRARIES, ids=lambda peer: peer.name)
def test_library(peer: Peer, kind: str, model: nn.Module, batches: Any) -> None:
    reason = accuracy_peers.unavailable().get(peer.name)
    if reason:
        pytest.skip(reason)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        batches = [torch.randn(32, 64) for _ in range(2)]
    if not peer.applies(model):
        pytest.skip(f"{peer.name} quantizes no {kind} layers")
    result = peer.run(model, batches, 4, 0, iterations=peer.iterations and 20)
    assert result.float_layers == ()
    weights = sum(matrix.numel() for matrix in matrices(model).values())
    most = 4.8 if kind == "linear" else 8  # few weights share a scale in the small layers
    assert 4 < result.bits_per_weight - result.adapter_bits / weights < most
    x = batches[0] if kind == "linear" else batches[0][0]
    with torch.no_grad():
        y, expected = (m(x) for m in (result.model, model))
    assert float((y - expected).square().mean() / expected.var()) < 0.1
