"""Whole modules on the CUDA ops: on the emulator in place of the CPU's, and on a GPU where there is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from emulator import emulator
from torch import Tensor, nn

import cora
from cora import ops
from cora.modules import QuantConv2d, QuantLinear

cuda = pytest.mark.cuda
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Net(nn.Module):
    """Every kind of layer that the fused kernels take, and some that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.Conv2d(32, 48, 1, bias=False),
            nn.ReLU(),
        )
        self.head = nn.Linear(48 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def packed(activation_bits: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    for name, module in list(net.named_modules()):
        kind = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}.get(type(module))
        if kind is None:
            continue
        *path, last = name.split(".")
        rank = 1 if getattr(module, "groups", 1) > 1 else 3
        layer = kind.from_float(module, cora.QuantSpec(bits=4), rank, activation_bits)
        setattr(net.get_submodule(".".join(path)), last, layer)
    return net


def model_bound(dtype: torch.dtype, activation_bits: int | None) -> float:
    """The dtype's rounding through four layers; with quantized inputs, some of them a code apart."""
    plain = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    return 3 * plain if activation_bits else plain


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cora.ops on the emulated CUDA ops."""
    monkeypatch.setattr(ops._native, "ops", emulator().ops)
    yield


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_model_on_emulated_ops(
    emulated: None, dtype: torch.dtype, activation_bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 8, 8)
    with monkeypatch.context() as plain:
        plain.setattr(ops._native, "ops", torch.ops.cora)
        reference = packed(activation_bits)
        want = reference(x)
    net = packed(activation_bits)  # prepared anew, in the layout of the CUDA kernels
    got = net.to(dtype)(x.to(dtype)).float()
    assert float((got - want).norm() / want.norm()) <= model_bound(dtype, activation_bits)


# --- On a GPU ------------------------------------------------------------------------------------


@cuda
@needs_cuda
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_model_to_cuda(dtype: torch.dtype, activation_bits: int | None) -> None:
    net, x = packed(activation_bits), torch.randn(2, 3, 8, 8)
    want = net(x)
    there = copy.deepcopy(net).to("cuda", dtype)
    got = there(x.to("cuda", dtype)).float().cpu()
    assert float((got - want).norm() / want.norm()) <= model_bound(dtype, activation_bits)
    assert torch.equal(there.to("cpu", torch.float32)(x), want)


@cuda
@needs_cuda
def test_a_fused_model_to_cuda() -> None:
    x = torch.randn(2, 3, 8, 8)
    fused = cora.fuse(packed(8), x)
    want = fused(x)
    there = copy.deepcopy(fused).to("cuda")
    got = there(x.to("cuda")).cpu()
    assert float((got - want).norm() / want.norm()) <= model_bound(torch.float32, 8)
    assert torch.equal(there.to("cpu")(x), want)


@cuda
@needs_cuda
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_model_compiles_and_exports(activation_bits: int | None) -> None:
    net = packed(activation_bits).to("cuda", torch.float16)
    x = torch.randn(2, 3, 8, 8, device="cuda", dtype=torch.float16)
    want = net(x)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(net, (x,)).module()(x), want)


@cuda
@needs_cuda
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_model_in_a_graph(activation_bits: int | None) -> None:
    """Captured, and replayed on other data: nothing waits for the device, nothing is allocated anew."""
    net = packed(activation_bits).to("cuda", torch.float16)
    x = torch.randn(2, 3, 8, 8, device="cuda", dtype=torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        net(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, net(x))


@cuda
@needs_cuda
def test_current_stream_is_used() -> None:
    net = packed().to("cuda", torch.float16)
    x = torch.randn(64, 3, 8, 8, device="cuda", dtype=torch.float16)
    want = net(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs elsewhere meanwhile would read x too early
        late = torch.empty_like(x).copy_(x)
        got = net(late)
    stream.synchronize()
    assert torch.equal(got, want)


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_devices_by_index() -> None:
    net, x = packed().half(), torch.randn(2, 3, 8, 8).half()
    first, second = (copy.deepcopy(net).to(f"cuda:{i}")(x.to(f"cuda:{i}")) for i in range(2))
    assert second.device.index == 1
    assert torch.equal(first.cpu(), second.cpu())
    with pytest.raises(RuntimeError, match="layer must be on"):
        net.to("cuda:0")(x.to("cuda:1"))
