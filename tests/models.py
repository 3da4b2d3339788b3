"""Small models and layers that several test modules share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cora
from cora import QuantSpec, SearchConfig, TuneConfig

# name: layer type, arguments, input shape without the batch
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "linear": (nn.Linear, {"in_features": 13, "out_features": 9}, (13,)),
    "linear-sequence": (nn.Linear, {"in_features": 13, "out_features": 9, "bias": False}, (5, 13)),
}


def _add(kind: str, dims: int, **variants: dict[str, Any]) -> None:
    size = (9, 8, 7)[:dims]
    for name, options in variants.items():
        cls = getattr(nn, f"{kind}{dims}d")
        inputs, outputs = options.pop("channels", (6, 8))
        fields = {"in_channels": inputs, "out_channels": outputs, "kernel_size": 3, **options}
        LAYERS[f"{kind.lower()}{dims}d-{name}"] = (cls, fields, (inputs, *size))


for _dims in (1, 2, 3):
    _add(
        "Conv",
        _dims,
        plain={"padding": 1},
        strided={"stride": 2, "padding": 1, "bias": False},
        dilated={"dilation": 2, "padding": 2},
        grouped={"groups": 2},
        depthwise={"groups": 6, "channels": (6, 6), "padding": 1},
        multiplier={"groups": 6, "channels": (6, 12), "bias": False},
        pointwise={"kernel_size": 1},
        reflect={"padding": 2, "padding_mode": "reflect"},
        replicate={"padding": 2, "padding_mode": "replicate", "stride": 2},
        circular={"padding": 1, "padding_mode": "circular", "groups": 2},
        same={"padding": "same", "dilation": 2},
        same_even={"padding": "same", "kernel_size": 4},
        same_reflect={"padding": "same", "kernel_size": 2, "padding_mode": "reflect"},
        valid={"padding": "valid"},
    )
    _add(
        "ConvTranspose",
        _dims,
        plain={},
        strided={"stride": 2, "padding": 1, "output_padding": 1, "bias": False},
        dilated={"dilation": 2, "padding": 1},
        grouped={"groups": 2, "stride": 2},
        depthwise={"groups": 6, "channels": (6, 6)},
        wide={"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 2},
    )
_add(
    "Conv",
    2,
    uneven={"kernel_size": (1, 4), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    same_uneven={"kernel_size": (2, 5), "padding": "same", "padding_mode": "circular"},
)
_add(
    "ConvTranspose",
    2,
    uneven={"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "output_padding": (0, 1)},
)


def make_layer(name: str) -> tuple[nn.Module, Tensor]:
    """A layer of `LAYERS` and a batch of two inputs."""
    cls, options, size = LAYERS[name]
    return cls(**options).eval(), torch.randn(2, *size)


class Net(nn.Module):
    """A small classifier with what breaks careless quantizers: batch norm, in-place parts."""

    def __init__(self, inplace: bool = True, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=inplace)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 16, 1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=inplace))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.pointwise(self.depthwise(x)))
        x = self.body(x) + x
        return self.head(x.mean((2, 3)))


def trained_net(inplace: bool = True) -> Net:
    """A Net with statistics and confident outputs, as after training."""
    torch.manual_seed(7)
    net = Net(inplace)
    for _ in range(10):
        net(torch.randn(32, 3, 8, 8) * 2 + 0.5)
    with torch.no_grad():
        net.head.weight.mul_(8)
        net.norm.weight.uniform_(0.5, 2)
        net.norm.bias.uniform_(-0.5, 0.5)
    return net.eval()


# The search or the quantizer alone: without the steps that come after ranks are chosen.
PLAIN: dict[str, Any] = {"tune": None, "propagate": False}


def batches(count: int = 3, size: int = 16, labels: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    xs = [torch.randn(size, 3, 8, 8, generator=generator) * 2 + 0.5 for _ in range(count)]
    if not labels:
        return xs
    return [(x, torch.randint(0, 5, (size,), generator=generator)) for x in xs]


def quantize(model: nn.Module, data: Any = None, spec: Any = None, **options: Any) -> nn.Module:
    """cora.quantize with quick defaults: 3 bits, closed-form ranks, a few steps of tuning, no bars."""
    quick = {
        "search": SearchConfig(method="uniform"),
        "tune": TuneConfig(iterations=4),
        "progress": False,
        "rank_budget": 0.1,
    }
    data = batches() if data is None else data
    return cora.quantize(model, data, spec or QuantSpec(3), **{**quick, **options})


class TwoInputs(nn.Module):
    """A model of two inputs, one of them optional in its keyword form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.out(F.relu(self.a(first) + self.b(second)))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything quantization must leave alone: tensors, modes, hooks, gradients' flags."""
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before["tensors"]:
        assert torch.equal(before["tensors"][key], after["tensors"][key]), key
    for part in ("training", "hooks", "requires_grad", "gradients", "attributes"):
        assert before[part] == after[part], part
