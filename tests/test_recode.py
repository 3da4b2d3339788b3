"""Layers by other codes: which ones when a model is fused, and the same numbers but for what is said."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import quantize
from torch import Tensor, nn

import cora
from cora.fused import FusedModel
from cora.modules import QUANT_LAYERS, QuantLayer, QuantLinear
from cora.quantizer import QuantSpec
from cora.recode import evenly_padded, is_worth_merging, merged

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1)) + 0.3


def layer(kind: Any, bits: int = 4, rank: int = 2, **options: Any) -> QuantLayer:
    spec = QuantSpec(bits=bits, **options)
    torch.manual_seed(7)
    kind.reset_parameters()
    return QUANT_LAYERS[type(kind)].from_float(kind, spec, rank, activation_bits=8)


class Net(nn.Module):
    """A layer that runs twice, one that adds, a last one on few positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.twice = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(x) + x)
        x = torch.relu(self.twice(x))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


def packed(**options: Any) -> nn.Module:
    return quantize(
        Net().eval(),
        X,
        **{"spec": QuantSpec(3), "rank_budget": 0.1, "activation_bits": 8, **options},
    )


def merged_layers(fused: FusedModel) -> list[str]:
    return [name for name, does, _ in fused.rows if "(merged, 8-bit)" in does]


@pytest.mark.parametrize(
    "kind",
    [
        nn.Linear(24, 40),
        nn.Conv2d(8, 20, 3, stride=2, padding=(1, 0), dilation=(2, 1)),
        nn.Conv2d(8, 12, (1, 3), groups=4, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv1d(6, 10, 5),
        nn.ConvTranspose2d(6, 8, 2, groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_a_layer(kind: nn.Module, bits: int) -> None:
    """Its weight is the sum within half a step of 8 bits, or what other taps left; the rest is the layer's."""
    adapted = layer(kind, bits, 1)
    adapted.set_activation_range(torch.tensor(0.02), torch.tensor(100))
    adapted.set_output_range(torch.tensor(0.03), torch.tensor(90))
    before = {name: buffer.clone() for name, buffer in adapted.state_dict().items()}
    plain = merged(adapted)
    assert type(plain) is type(adapted) and (plain.rank, plain.bits) == (0, 8)
    assert plain.scale.shape == (adapted.shape.rows, 1)
    error = (plain.matrix() - adapted.matrix()) / plain.scale
    taps = math.prod(getattr(kind, "kernel_size", ()))
    assert float(error.abs().max()) <= (0.501 if taps == 1 else 1.5)
    if (
        error.numel() > 100 * taps > 100
    ):  # neighbouring pixels are alike: errors of a channel cancel
        per_channel = error.reshape(-1, taps).sum(1).square().mean()
        assert float(per_channel) < 0.7 * taps / 12
    for name in ("bias", "x_scale", "x_zero_point", "y_scale", "y_zero_point"):
        ours, theirs = getattr(plain, name), getattr(adapted, name)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert (plain.activation_bits, plain.float_bias) == (8, adapted.float_bias)
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapted.state_dict().items())
    x = torch.randn({nn.Linear: (5, 24), nn.Conv1d: (2, 6, 11)}.get(type(kind), (2, 8, 9, 9)))
    x = x[:, :6] if isinstance(kind, nn.ConvTranspose2d) else x
    with torch.no_grad():
        expected, found = adapted(x), plain(x)
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_which_layers() -> None:
    conv, shape = nn.Conv2d(16, 32, 3), (1, 32, 6, 6)
    assert is_worth_merging(layer(conv), shape)
    assert is_worth_merging(layer(conv, rank=0, granularity="per_group", group_size=48), shape)
    assert not is_worth_merging(layer(conv, rank=0), shape)  # nothing to merge
    assert not is_worth_merging(layer(conv, bits=6), shape)  # its rounding would be felt
    assert not is_worth_merging(layer(conv), (1, 32, 4, 4))  # reads its weight too seldom
    assert is_worth_merging(layer(conv), (2, 32, 4, 4))
    assert not is_worth_merging(layer(nn.Linear(1024, 1024)), (64, 1024))  # too large
    floats = QuantLinear.from_float(nn.Linear(8, 8), rank=1)
    assert not is_worth_merging(floats, (64, 8))


def test_a_network() -> None:
    qmodel = packed()
    apart, together = cora.fuse(qmodel, X, merge=False), cora.fuse(qmodel, X, merge=True)
    assert merged_layers(apart) == [] and merged_layers(together) == [
        "stem",
        "twice",
        "twice",
        "wide",
    ]
    own = {id(m) for m in together.modules() if isinstance(m, QuantLayer)}
    theirs = {id(m) for m in qmodel.modules() if isinstance(m, QuantLayer)}
    assert len(own) == 4 and len(own & theirs) == 1  # one for both calls; the head is shared
    with torch.no_grad():
        unfused, expected, found = qmodel(X), apart(X), together(X)
        for twin in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
            assert torch.equal(twin(X), found) and str(twin) == str(together)
        assert torch.equal(qmodel(X), unfused)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.02


def test_merged_layers_run_as_one_by_one() -> None:
    """Within the fused graph the kernels compute what the merged layers do by themselves."""
    together = cora.fuse(packed(), X, merge=True)
    with torch.no_grad():
        expected = together(X)
        for module in together.modules():  # with hooks steps run one by one
            module.register_forward_hook(lambda _m, _a, _y: None)
        assert torch.equal(together(X), expected)


def test_the_default_follows_the_cpu() -> None:
    """AVX2 multiplies 8-bit weights at half the speed of narrow ones."""
    level, qmodel = cora.ops.isa()["level"], packed()
    expected = [] if level == "avx2" else ["stem", "twice", "twice", "wide"]
    assert merged_layers(cora.fuse(qmodel, X)) == expected
    if level not in ("scalar", "avx2"):
        try:
            cora.ops.set_isa("avx2")
            assert merged_layers(cora.fuse(qmodel, X)) == []
        finally:
            cora.ops.set_isa(level)
    cora.ops.set_isa("scalar")
    try:
        assert len(merged_layers(cora.fuse(qmodel, X))) == 4
    finally:
        cora.ops.set_isa(level)


def test_groups_of_scales_are_merged_too() -> None:
    spec = QuantSpec(3, granularity="per_group", group_size=8)
    qmodel = packed(spec=spec, rank_budget=0.0, skip=["stem"])
    together = cora.fuse(qmodel, X, merge=True)
    assert merged_layers(together) == ["twice", "twice", "wide"]
    with torch.no_grad():
        expected = cora.fuse(qmodel, X, merge=False)(X)
        assert float((together(X) - expected).norm() / expected.norm()) < 0.02


# --- Uneven padding ------------------------------------------------------------------------------


def with_zero_codes(layer: QuantLayer, zero_point: int = 5) -> QuantLayer:
    layer.zero_point.fill_(zero_point)
    layer.prepare()
    return layer


@pytest.mark.parametrize(
    "sides", [[(0, 1), (0, 1)], [(2, 1), (1, 1)], [(0, 0), (3, 0)], [(1, 1), (2, 2)]]
)
@pytest.mark.parametrize(
    "kind",
    [
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(8, 8, (5, 3), stride=(2, 1), groups=8, bias=False),
        nn.Conv2d(4, 6, 2, groups=2),
    ],
    ids=str,
)
def test_even_padding(kind: nn.Conv2d, sides: list[tuple[int, int]]) -> None:
    """The layer on an input padded by hand, on what it pads itself, to the last bit."""
    uneven = with_zero_codes(layer(kind, 4, 1))
    uneven.set_activation_range(torch.tensor(0.02), torch.tensor(100))
    even = evenly_padded(uneven, sides)
    assert even is not None and even.padding == tuple(max(side) for side in sides)
    assert (even.bits, even.rank, even.activation_bits) == (4, 1, 8)
    (top, bottom), (left, right) = sides
    x = torch.randn(2, kind.in_channels, 11, 10)
    with torch.no_grad():
        expected = uneven(F.pad(x, (left, right, top, bottom)))
        found = even(x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_what_cannot_be_padded_evenly() -> None:
    conv, sides = nn.Conv2d(3, 8, 3), [(0, 1), (0, 1)]
    assert evenly_padded(with_zero_codes(layer(conv), -1), sides) is None  # no code is a zero
    assert evenly_padded(with_zero_codes(layer(conv), 16), sides) is None
    assert evenly_padded(with_zero_codes(layer(conv), 15), sides) is not None
    grouped = layer(conv, granularity="per_group", group_size=9)
    assert evenly_padded(with_zero_codes(grouped), sides) is None
    dilated = with_zero_codes(layer(nn.Conv2d(3, 8, 3, dilation=(1, 2))))
    assert evenly_padded(dilated, [(0, 1), (0, 0)]) is not None
    assert evenly_padded(dilated, [(0, 1), (0, 1)]) is None


@pytest.mark.parametrize("merge", [False, True])
def test_a_network_that_pads_unevenly(merge: bool) -> None:
    """Pads leave the graph, where a layer's codes have no zero too if it may be merged."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a, self.b = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 5, stride=2, groups=8)
            self.c, self.twice = nn.Conv2d(8, 8, 2, padding="same"), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(F.pad(x, (0, 1, 0, 1))))
            x = torch.relu(self.b(F.pad(x, (1, 2, 2, 1))))
            x = torch.relu(self.c(x))
            x = torch.relu(self.twice(F.pad(x, (0, 2, 1, 1))))
            x = torch.relu(self.twice(F.pad(x, (2, 0, 1, 1))))
            return self.head(x.mean((2, 3)))

    x = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(2)) + 0.3
    qmodel = quantize(Uneven().eval(), x, spec=QuantSpec(4), activation_bits=8)
    for name in ("a", "b", "c"):
        with_zero_codes(qmodel.get_submodule(name), -2 if name == "b" else 6)
    fused = cora.fuse(qmodel, x, merge=merge)
    pads = [name for name, does, _ in fused.rows if does == "pad"]
    assert len(pads) == (2 if merge else 3)  # those of the layer that runs twice, and of b
    with torch.no_grad():
        expected, found = qmodel(x), fused(x)
    assert float((found - expected).norm() / expected.norm()) < 0.03
