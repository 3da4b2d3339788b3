"""Batch norms folded into the layers before them: which, exactly, and when not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cora.fold import FoldedBatchNorm, fold_batch_norms


def normed(*layers: nn.Module) -> nn.Module:
    """A model in eval mode whose batch norms have statistics and gains of their own."""
    model = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model.eval().requires_grad_(False)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 6), lambda: nn.BatchNorm1d(6), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
        lambda: nn.BatchNorm2d(6, eps=0.1),
        (2, 4, 7, 7),
    ),
    "conv2d-grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"),
        lambda: nn.BatchNorm2d(6, affine=False),
        (2, 4, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "transposed-grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_layer(name: str, dtype: torch.dtype) -> None:
    layer, norm, shape = LAYERS[name]
    model, x = normed(layer(), norm(), nn.ReLU()).to(dtype), torch.randn(shape, dtype=dtype)
    expected = model(x)
    assert fold_batch_norms(model, lambda m: m(x)) == ({"0": "1"}, {})
    assert type(model[1]) is FoldedBatchNorm and not model[1].training
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.1}
    torch.testing.assert_close(model(x), expected, **close)


class Model(nn.Module):
    """conv, then norm, wired by a function of (self, x)."""

    def __init__(self, wiring: Callable[[Any, Tensor], Any], **options: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, **options)
        self.other = nn.Conv2d(4, 4, 1)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def tie(model: Model, x: Tensor) -> Tensor:
    model.other.weight = model.conv.weight
    return model.norm(model.conv(x)) + model.other(x)


NOT_FOLDED = {
    "read twice": lambda m, x: (y := m.conv(x), m.norm(y) + y)[1],
    "returned": lambda m, x: (y := m.conv(x), (m.norm(y), y))[1],
    "something between": lambda m, x: m.norm(F.relu(m.conv(x))),
    "layer runs twice": lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1),
    "norm runs twice": lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),
    "norm first": lambda m, x: m.conv(m.norm(x)),
    "a view of it is read": lambda m, x: (y := m.conv(x), m.norm(y) + y[:, :, :1, :1])[1],
    "tied weight": tie,
    "norm of a sum": lambda m, x: m.norm(m.conv(x) + x),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_not_folded(name: str) -> None:
    model, x = normed(Model(NOT_FOLDED[name])), torch.randn(2, 4, 5, 5)
    expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pairs, kept = fold_batch_norms(model, lambda m: m(x))
    assert pairs == {} and list(kept) == ["norm"] and kept["norm"].startswith("BatchNorm2d: ")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_running_statistics() -> None:
    wiring = lambda m, x: m.norm(m.conv(x))  # noqa: E731
    model, x = normed(Model(wiring, track_running_stats=False)), torch.randn(2, 4, 5, 5)
    assert fold_batch_norms(model, lambda m: m(x))[0] == {}


def test_reading_its_size_is_not_reading_it() -> None:
    def wiring(m: Model, x: Tensor) -> Tensor:
        y = m.conv(x)
        return F.interpolate(m.norm(y), size=[2 * n for n in y.shape[2:]])

    model, x = normed(Model(wiring)), torch.randn(2, 4, 5, 5)
    assert fold_batch_norms(model, lambda m: m(x))[0] == {"conv": "norm"}


def test_control_flow_on_data() -> None:
    """What symbolic tracing refuses is seen in a run."""

    def wiring(m: Model, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return y if float(y.sum()) > 1e9 else -y

    model, x = normed(Model(wiring)), torch.randn(2, 4, 5, 5)
    expected = model(x)
    assert fold_batch_norms(model, lambda m: m(x))[0] == {"conv": "norm"}
    torch.testing.assert_close(model(x), expected)


def test_a_fold_that_changes_the_output_is_undone() -> None:
    """A reader that the run cannot see: the output tells, and the model is as it was."""

    def wiring(m: Model, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) * float(m.conv.weight.sum())

    model, x = normed(Model(wiring)), torch.randn(2, 4, 5, 5)
    expected = model(x)
    pairs, kept = fold_batch_norms(model, lambda m: m(x))
    assert pairs == {} and "gave another output" in kept["norm"]
    assert torch.equal(model(x), expected)


def test_a_norm_under_two_names() -> None:
    model = normed(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.alias = nn.ModuleList([model[1]])
    x = torch.randn(1, 3, 4, 4)
    expected = model[1](model[0](x))
    run = lambda m: m[1](m[0](x))  # noqa: E731
    assert fold_batch_norms(model, run)[0] == {"0": "1"}
    assert model.alias[0] is model[1] and isinstance(model[1], FoldedBatchNorm)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
