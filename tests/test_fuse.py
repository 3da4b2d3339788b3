"""Fused models: what is fused, that it computes what the packed model does, and where it runs."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Net, quantize, trained_net
from models import batches as net_batches
from torch import Tensor, nn

import cora
from cora.batches import divergence
from cora.fused import FusedLayer, FusedModel, MaxPoolCodes, MeanOfCodes
from cora.modules import QuantLayer

fuse = partial(cora.fuse, merge=False)  # what merging changes: test_recode.py


def conv_bn(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, padding=kernel // 2, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A residual block as ResNet's: in-place ReLU and addition."""

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            parts = [conv_bn(inputs, 8, 1), conv_bn(8, 8, 3, stride=stride), conv_bn(8, outputs, 1)]
        else:
            parts = [conv_bn(inputs, outputs, 3, stride=stride), conv_bn(outputs, outputs, 3)]
        self.parts, self.relu = nn.ModuleList(parts), nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else conv_bn(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for part in self.parts[:-1]:
            out = self.relu(part(out))
        out = self.parts[-1](out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, bottleneck: bool = False) -> None:
        super().__init__()
        self.stem, self.relu = conv_bn(3, 16, 5), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(
            Block(16, 16, 1, bottleneck), Block(16, 24, 2, bottleneck), Block(24, 24, 1, bottleneck)
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.relu(self.stem(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Mobile(nn.Module):
    """Depthwise separable with ReLU6, then an inverted residual without activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 12, 3, stride=2), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(conv_bn(12, 12, 3, groups=12), nn.ReLU6(inplace=True))
        self.project, self.expand = conv_bn(12, 12, 1), conv_bn(12, 24, 1)
        self.head, self.dropout = nn.Linear(24, 5), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(x))
        x = F.hardtanh(self.expand(x), 0.0, 4.0)
        return self.head(self.dropout(x.mean([2, 3])))


class Concat(nn.Module):
    """Branches that meet in a concatenation, padded by different amounts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.c = nn.Conv2d(16, 8, (1, 5), padding=(0, 2))
        self.d, self.e = nn.Conv2d(16, 8, 3, padding="same"), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.a(x)), torch.relu(self.b(x))], dim=1)
        y = F.relu(self.c(both) + self.d(both))
        return self.e(F.max_pool2d(y, 2).flatten(1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers, nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Same(nn.Module):
    """Padded as TensorFlow does: uneven amounts that depend on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.c, self.d, self.norm = nn.Conv2d(8, 8, 5), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.pad, self.head = nn.ZeroPad2d(1), nn.Linear(8, 5)

    def same(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            reversed(x.shape[2:]), reversed(conv.kernel_size), reversed(conv.stride), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return conv(F.pad(x, pads) if any(pads) else x)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.same(x, self.a)))
        x = F.relu6(self.same(x, self.b))
        x = F.relu(self.same(x, self.c))
        x = self.d(self.pad(x))
        return self.head(x.reshape(x.size(0), 8, -1).mean(2))


NETS: dict[str, Any] = {
    "same": Same,
    "net": Net,
    "basic": ResNet,
    "bottleneck": lambda: ResNet(bottleneck=True),
    "mobile": Mobile,
    "concat": Concat,
    "mlp": Mlp,
}


def trained(name: str) -> nn.Module:
    """A network with statistics, its outputs spread as after training."""
    torch.manual_seed(3)
    net = NETS[name]()
    for _ in range(4):
        net(torch.randn(32, 3, 8, 8) * 2 + 0.5)
    with torch.no_grad():
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.mul_(3 / net.eval()(torch.randn(64, 3, 8, 8) * 2 + 0.5).std())
    return net


def packed(name: str, **options: Any) -> nn.Module:
    return quantize(trained(name), **{"spec": cora.QuantSpec(4), "activation_bits": 8, **options})


def steps(fused: FusedModel) -> dict[str, str]:
    return {name: f"{does} {gives}" for name, does, gives in fused.rows}


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 + 0.5


# --- What is fused -------------------------------------------------------------------------------


def test_a_residual_network() -> None:
    fused = fuse(packed("basic"), X)
    codes = "-> 8-bit codes"
    assert steps(fused) == {
        "stem.0": f"quantize + Conv2d + relu {codes}",
        "pool": f"MaxPoolCodes {codes}, halo 1",
        "blocks.0.parts.0.0": f"Conv2d + relu {codes}, halo 1",
        "blocks.0.parts.1.0": f"Conv2d + add codes + relu {codes}, halo 1",
        "blocks.1.parts.0.0": f"Conv2d + relu {codes}, halo 1",
        "blocks.1.parts.1.0": f"Conv2d {codes}",  # in its own output's range
        "blocks.1.downsample.0": f"Conv2d + add codes + relu {codes}, halo 1",
        "blocks.2.parts.0.0": f"Conv2d + relu {codes}, halo 1",
        "blocks.2.parts.1.0": "Conv2d + add codes + relu -> float",
        "avgpool": "Mean -> float",  # and flattened
        "fc": "quantize + Linear -> float",
    }
    assert all(name in str(fused) for name in steps(fused))


def test_a_mobile_network() -> None:
    assert list(steps(fuse(packed("mobile"), X)).values()) == [
        "quantize + Conv2d + clamp(0, 6) -> 8-bit codes, halo 1",
        "Conv2d + clamp(0, 6) -> 8-bit codes",
        "Conv2d + add codes -> 8-bit codes",
        "Conv2d + clamp(0, 4) -> float",
        "Mean -> float",
        "quantize + Linear -> float",
    ]


def test_a_concatenation() -> None:
    assert list(steps(fuse(packed("concat"), X)).values()) == [
        "quantize + Conv2d + relu -> 8-bit codes, halo 2",
        "quantize + Conv2d + relu -> 8-bit codes, halo 2",
        "cat -> 8-bit codes, halo 2",
        "Conv2d -> 8-bit codes",
        "Conv2d + add codes + relu -> 8-bit codes",
        "MaxPoolCodes -> 8-bit codes",
        "flatten -> 8-bit codes",
        "Linear -> float",
    ]


def test_padding_before_a_layer() -> None:
    """It becomes the layer's own, uneven padding by a wider kernel, and the border of the layer before."""
    fused = fuse(packed("same"), X)
    assert list(steps(fused).values()) == [
        "quantize + Conv2d + clamp(0, 6) -> 8-bit codes, halo 1",
        "Conv2d + clamp(0, 6) -> 8-bit codes, halo 2",
        "Conv2d + relu -> 8-bit codes, halo 1",
        "Conv2d -> float",
        "reshape -> float",
        "mean -> float",
        "quantize + Linear -> float",
    ]


def test_a_model_that_branches_on_sizes() -> None:
    """Fused for the example's sizes and any batch; other sizes run unfused, and the summary says so."""
    qmodel = packed("same")
    fused = fuse(qmodel, X)
    assert "for inputs of batchx3x8x8; others run unfused" in str(fused)
    compare(qmodel, fused, X[:1])
    x = torch.randn(2, 3, 11, 9)
    with torch.no_grad():
        assert torch.equal(fused(x), qmodel(x))
        twin = pickle.loads(pickle.dumps(fused))
        assert torch.equal(twin(X), fused(X)) and torch.equal(twin(x), qmodel(x))


def test_linear_layers() -> None:
    rows = list(steps(fuse(packed("mlp"), X)).values())
    assert rows[1:] == [
        "quantize + Linear + relu -> 8-bit codes",
        "Linear + relu -> 8-bit codes",
        "Linear -> float",
    ]


@pytest.mark.parametrize("options", [{"activation_bits": None}, {"activation": "dynamic"}])
def test_without_static_ranges_only_epilogues_are_fused(options: dict[str, Any]) -> None:
    rows = steps(fuse(packed("basic", **options), X))
    assert not any("codes" in row for row in rows.values())
    assert rows["blocks.0.parts.1.0"] == "Conv2d + add + relu -> float"


class Readers(nn.Module):
    """A value with readers that want it float, or in different ranges."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        if self.kind == "returned":
            return self.b(y), y
        if self.kind == "float op":
            return self.b(y) * torch.sigmoid(y.mean((2, 3), keepdim=True)) + torch.sin(y)
        if self.kind == "two concatenations":
            return self.b(torch.cat([y, x], 1)[:, :3]) + self.c(y)
        if self.kind == "mean":
            return self.b(y) + self.c(y) * y.mean((2, 3), keepdim=True)
        if self.kind == "sliced":
            return self.b(y)[:, :, ::2, ::2] + self.c(y[:, :, ::2, ::2])
        return self.b(y) - self.c(y)


@pytest.mark.parametrize(
    ("kind", "is_codes"),
    [
        ("returned", False), ("float op", False), ("two concatenations", False), ("sliced", False),
        ("mean", True), ("plain", True),
    ],
)  # fmt: skip
def test_codes_only_where_every_reader_takes_them(kind: str, is_codes: bool) -> None:
    qmodel = quantize(Readers(kind), spec=cora.QuantSpec(4), activation_bits=8)
    fused = fuse(qmodel, X)
    assert ("codes" in steps(fused)["a"]) == is_codes
    assert any(isinstance(m, MeanOfCodes) for m in fused.modules()) == (kind == "mean")
    compare(qmodel, fused, X)


def test_layers_that_run_twice_and_odd_paddings() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.even = nn.Conv2d(3, 3, 2, padding="same")
            self.reflect = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
            self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)
            self.line = nn.Conv1d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(F.relu(self.a(x)) + x))
            x = self.up(self.reflect(self.even(x)))
            return self.line(x.flatten(2))

    qmodel = quantize(Twice(), spec=cora.QuantSpec(4), activation_bits=8)
    fused = fuse(qmodel, X)
    assert sum(isinstance(m, FusedLayer) for m in fused.modules()) == 3
    compare(qmodel, fused, X)


def test_in_place_operations_on_a_value_that_is_read_again() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x)
            self.relu(x)  # what follows reads the rectified x
            z = F.hardtanh_(self.a(x), -1.0, 2.0)
            y += x
            y *= 2
            return y + z.add_(1)

    qmodel = quantize(InPlace(), spec=cora.QuantSpec(8), activation_bits=8, tune=None)
    before = X.clone()
    compare(qmodel, fuse(qmodel, X), X)
    assert torch.equal(X, before)


# --- Numerics ------------------------------------------------------------------------------------


@torch.no_grad()
def compare(qmodel: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Equal up to what a few codes and the 8 bits of a residual branch are worth."""
    for expected, got in zip(as_list(qmodel(x)), as_list(fused(x)), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert (got - expected).abs().max() < 0.05 * expected.abs().max() + 1e-6


def as_list(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("activation_bits", [8, 5])
@pytest.mark.parametrize("name", NETS)
def test_the_output_is_the_packed_models(name: str, activation_bits: int) -> None:
    """The distance to the float model does not grow: fusing costs nothing in accuracy."""
    qmodel = packed(name, activation_bits=activation_bits)
    fused, x = fuse(qmodel, X), torch.cat(net_batches(4, 64))
    net = trained(name)
    with torch.no_grad():
        expected, got, float_output = qmodel(x), fused(x), net(x)
    loss, fused_loss = (float(divergence(y, float_output)) for y in (expected, got))
    agreement = float((expected.argmax(1) == got.argmax(1)).float().mean())
    limit, least = (1e-3, 0.97) if activation_bits == 8 else (2e-2, 0.9)
    assert float(divergence(got, expected)) < limit and agreement > least
    assert fused_loss < 1.1 * loss + limit


@pytest.mark.parametrize("name", ["net", "mlp"])
def test_without_additions_only_ties_differ(name: str) -> None:
    """Codes are rounded from the same numbers: without a residual branch nothing else changes."""
    net = trained(name)
    if name == "net":
        net.body.register_module("relu", nn.Identity())
        net.forward = None  # type: ignore[assignment]
        net = nn.Sequential(
            net.stem, net.norm, net.relu, net.depthwise, net.pointwise, nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head,
        )  # fmt: skip
    qmodel = quantize(net.eval(), spec=cora.QuantSpec(4), activation_bits=8)
    fused, x = fuse(qmodel, X), torch.cat(net_batches(4, 64))
    with torch.no_grad():
        error = (fused(x) - qmodel(x)).abs() / qmodel(x).abs().max()
    assert float(error.median()) < 1e-5 and float(error.max()) < 0.02


def test_fewer_bits_stay_in_range() -> None:
    """4-bit codes end at 15, whatever the kernel's own limit."""
    qmodel = packed("basic", activation_bits=4)
    fused, largest = fuse(qmodel, X), []
    for module in fused.modules():
        if isinstance(module, FusedLayer | MaxPoolCodes):
            module.register_forward_hook(
                lambda _m, _a, y: largest.append(int(y.max())) if y.dtype == torch.uint8 else None
            )
    with torch.no_grad():
        fused(X * 20)
    assert len(largest) > 5 and max(largest) == 15


# --- Where it runs -------------------------------------------------------------------------------


def test_other_sizes() -> None:
    for name in ("basic", "bottleneck", "mobile"):
        qmodel = packed(name)
        fused = fuse(qmodel, X)
        for shape in ((1, 3, 8, 8), (2, 3, 19, 13), (0, 3, 8, 8)):
            x = torch.randn(shape)
            if shape[0]:
                compare(qmodel, fused, x)
            else:
                assert fused(x).shape == (0, 5)


def test_inference_mode_memory_formats_and_threads(threads: Any) -> None:
    fused = fuse(packed("basic"), X)
    with torch.inference_mode():
        y = fused(X)
        assert torch.equal(fused(X.contiguous(memory_format=torch.channels_last)), y)
        for count in (1, 2):
            threads(count)
            assert torch.equal(fused(X), y)


def test_copies() -> None:
    qmodel = packed("bottleneck")
    fused = fuse(qmodel, X)
    with torch.no_grad():
        y, unfused = fused(X), qmodel(X)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(twin(X), y) and str(twin) == str(fused)
        assert torch.equal(qmodel(X), unfused)  # the packed model is as it was
    assert not any(isinstance(m, FusedLayer) for m in qmodel.modules())
    shared = {id(m) for m in qmodel.modules() if isinstance(m, QuantLayer)}
    assert shared == {id(m) for m in fused.modules() if isinstance(m, QuantLayer)}


def test_a_loaded_file(tmp_path: Any) -> None:
    qmodel = packed("basic")
    cora.save(qmodel, tmp_path / "m.safetensors")
    loaded = cora.load(tmp_path / "m.safetensors", ResNet())
    with torch.no_grad():
        assert torch.equal(fuse(loaded, X)(X), fuse(qmodel, X)(X))


@pytest.mark.parametrize("name", ["basic", "concat"])
def test_compile_and_export(name: str) -> None:
    fused = fuse(packed(name), X)
    with torch.no_grad():
        expected, part = fused(X), fused(X[:3])
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
        assert torch.equal(compiled(X), expected)
        assert torch.equal(compiled(X[:3]), part)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(
            fused.graph_module, (X,), dynamic_shapes=({0: batch},)
        ).module()
        assert torch.equal(exported(X), expected)
        assert torch.equal(exported(X[:3]), part)


def test_keyword_and_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.b(F.relu(self.a(first) + second))

    batch = {"second": torch.randn(20, 6), "first": torch.randn(20, 4)}
    qmodel = quantize(Two(), [batch], activation_bits=8, rank_budget=0.5)
    for example in (batch, (batch["first"], batch["second"])):
        fused = fuse(qmodel, example)
        assert "add" in steps(fused)["a"]
        with torch.no_grad():
            torch.testing.assert_close(fused(**batch), qmodel(**batch), atol=0.05, rtol=0.05)


def test_a_table_cut_to_the_length_of_the_input() -> None:
    """As position embeddings are: a tensor of the trace that no input went into."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.places = nn.Embedding(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x) + self.places.weight[: x.shape[1]]))

    x = torch.randn(20, 5, 4)
    qmodel = quantize(Places(), [x], activation_bits=8, rank_budget=0.5)
    before = set(vars(qmodel))
    fused = fuse(qmodel, x)
    assert "for inputs of batchx5x4; others run unfused" in str(fused)
    assert set(vars(qmodel)) == before
    with torch.no_grad():
        for part in (x, x[:3], x[:, :2]):
            torch.testing.assert_close(fused(part), qmodel(part), atol=0.05, rtol=0.05)


def test_options_that_the_example_leaves_out() -> None:
    """Code branches on them: the graph is one without them, and with them the packed model runs."""

    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(
            self,
            x: Tensor,
            mask: Tensor | None = None,
            scale: float = 1.0,
            head: str = "b",
            *,
            twice: bool = False,
        ) -> Tensor:
            h = F.relu(self.a(x))
            if mask is not None:
                return self.c(h) * mask  # runs as well with a symbol for None
            if twice:
                h = F.relu(h + h)
            return (self.b if head == "b" else self.c)(h) * scale

    x = torch.randn(20, 4)
    qmodel = quantize(Options(), [x], activation_bits=8, rank_budget=0.5)
    fused = fuse(qmodel, x)
    mask = torch.rand(20, 3)
    with torch.no_grad():
        for kwargs in ({}, {"scale": 2.0}, {"mask": None, "head": "b"}, {"twice": False}):
            torch.testing.assert_close(
                fused(x, **kwargs), qmodel(x, **kwargs), atol=0.05, rtol=0.05
            )
        assert "for calls with mask = None, head = 'b', twice = False; others run unfused" in str(
            fused
        )
        torch.testing.assert_close(fused(x, None, 3.0), qmodel(x, None, 3.0), atol=0.05, rtol=0.05)
        for args, kwargs in (((x, mask), {}), ((x,), {"head": "c"}), ((x,), {"twice": True})):
            assert torch.equal(fused(*args, **kwargs), qmodel(*args, **kwargs))
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), fused(x))
        twin = pickle.loads(pickle.dumps(fused.graph_module))
        assert torch.equal(twin(x), fused(x))
    for args, kwargs in (((x, None, 1.0, "b", True), {}), ((x,), {"x": x}), ((x,), {"y": x})):
        with pytest.raises(TypeError):
            fused(*args, **kwargs)
    masked = fuse(qmodel, {"x": x, "mask": mask})
    with torch.no_grad():
        torch.testing.assert_close(masked(x, mask), qmodel(x, mask), atol=0.05, rtol=0.05)
        assert torch.equal(masked(x), qmodel(x))
    assert "mask given" in str(masked)
    options = {"x": x, "mask": None, "head": "c", "twice": True}
    other = fuse(qmodel, options)
    with torch.no_grad():
        torch.testing.assert_close(other(**options), qmodel(**options), atol=0.05, rtol=0.05)
        assert torch.equal(other(x), qmodel(x))
    assert [fused.options[name].held for name in ("mask", "head", "twice")] == [None, "b", False]


def test_a_layer_alone() -> None:
    qmodel = quantize(nn.Linear(4, 6), torch.randn(20, 4), activation_bits=8, rank_budget=0.5)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(fuse(qmodel, x)(x), qmodel(x))


def test_half_precision_stays_float_between_layers() -> None:
    qmodel = packed("basic").bfloat16()
    x = X.bfloat16()
    fused = fuse(qmodel, x)
    assert not any("codes" in row for row in steps(fused).values())
    with torch.no_grad():
        assert fused(x).dtype == torch.bfloat16


def test_errors() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    qmodel = quantize(Flow(), torch.ones(20, 4), rank_budget=0.5)
    with pytest.raises(ValueError, match="qmodel: torch.fx cannot trace Flow"):
        fuse(qmodel, torch.ones(2, 4))
    with pytest.raises(ValueError, match="example: a batch of 3 items must say which are inputs"):
        fuse(packed("mlp"), (X, X, X))
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        fuse(packed("mlp").train(), X)
    with pytest.raises(ValueError, match="expected a model with packed layers, found none"):
        fuse(trained_net(), X)
