"""Stretches of a fused model in one call: the same numbers as step by step, and when there is no stretch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import quantize
from test_fuse import NETS, X, conv_bn, packed
from torch import Tensor, nn

import cora
from cora import ops
from cora.fused import FusedLayer, FusedModel, FusedSteps
from cora.ops import steps


def stretches(fused: FusedModel) -> list[FusedSteps]:
    return [m for m in fused.modules() if isinstance(m, FusedSteps)]


@torch.no_grad()
def one_by_one(fused: FusedModel, *args: Tensor) -> Any:
    """The result with every step seen by a hook; all of them must be."""
    seen: list[str] = []
    layers = [m for m in fused.modules() if isinstance(m, FusedLayer)]
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m.name)) for m in layers]
    try:
        result = fused(*args)
    finally:
        for handle in handles:
            handle.remove()
    assert {m.name for m in layers} == set(seen)
    return result


def check(fused: FusedModel, *args: Tensor) -> None:
    """Twice: a call that wrote over what it was given would change the second."""
    want = one_by_one(fused, *args)
    for _ in range(2):
        with torch.no_grad():
            got = fused(*args)
        for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("name", NETS)
def test_the_result_is_that_of_single_steps(isa: str, name: str, threads: Any) -> None:
    for activation_bits in (8, 5):
        fused = cora.fuse(packed(name, activation_bits=activation_bits), X)
        assert stretches(fused)
        for count in (1, 2):
            threads(count)
            check(fused, X)
            check(fused, X[:1].contiguous(memory_format=torch.channels_last))
            if name != "same":  # its own reshape takes no empty batch
                check(fused, X[:0])


def test_what_is_one_stretch() -> None:
    (residual,) = stretches(cora.fuse(packed("basic"), X))
    assert len(residual.steps) == 11  # the mean of the last one's floats, and the head
    (mobile,) = stretches(cora.fuse(packed("mobile"), X))
    assert len(mobile.steps) == 6
    model = nn.Sequential(
        *[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], nn.AdaptiveAvgPool2d(1)
    )
    model.extend([nn.Flatten(), nn.Linear(3, 2)])
    (whole,) = stretches(cora.fuse(quantize(model, X, activation_bits=8), X))
    assert len(whole.steps) == 5  # the mean of codes too


def test_a_mean_that_nobody_reads() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            F.adaptive_avg_pool2d(x, 1)
            return self.b(x)

    check(cora.fuse(quantize(Unread(), X, activation_bits=8), X), X)


class Reused(nn.Module):
    """Sums whose second operand is read again, is the input, or is what the layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv_bn(3 if i == 0 else 8, 8, 3) for i in range(7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(self.layers[0](x))
        b = F.relu(self.layers[1](a) + a)  # reads and adds a, for the first time
        c = F.relu(self.layers[2](b) + a)  # and here for the last
        d = F.relu(self.layers[3](c) + b)  # b dies
        e = F.relu(self.layers[4](d) + d)  # d dies as both
        f = F.relu(self.layers[5](e))
        return self.layers[6](F.relu(f + c)), c.mean((2, 3))


def test_what_is_added_may_be_needed_later(isa: str) -> None:
    torch.manual_seed(1)
    net = Reused()
    for _ in range(3):
        net(X)
    fused = cora.fuse(quantize(net.eval(), X, activation_bits=8), X)
    check(fused, X)
    overwritten = {
        step.name: bool(row[steps.Step._fields.index("add_dies")])
        for stretch in stretches(fused)
        for step, row in zip(stretch.steps, stretch.program.tolist(), strict=True)
        if getattr(step, "adds", False)
    }
    assert overwritten["layers.1.0"] is False and overwritten["layers.3.0"] is True


def test_codes_are_added_in_their_own_memory(isa: str) -> None:
    """Only where nobody reads them any more: the values of a sum in place are those of a new tensor."""
    for channels in (1, 24, 40, 64, 96):
        for side in (1, 5, 9, 17):
            for kernel in (1, 3):
                for groups in {1, channels}:
                    for halo in (0, 1):
                        _in_place(channels, side, kernel, groups, halo)


def _in_place(channels: int, side: int, kernel: int, groups: int, halo: int) -> None:
    generator = torch.Generator().manual_seed(channels + side)

    def random(shape: tuple[int, ...], high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    k = channels // groups * kernel**2
    window = ([kernel, kernel], [1, 1], [kernel // 2] * 2, [1, 1])
    layer = ops.prepare_layer(
        ops.pack_bits(random((channels, k), 16), 4),
        torch.rand(channels, 1, generator=generator) + 0.1,
        torch.full((channels, 1), 7, dtype=torch.int32),
        4, channels, *window, groups, bias=torch.randn(channels, generator=generator),
    )  # fmt: skip
    copy = ops.prepare_layer(  # a layer that hands on what it gets: a value that belongs to the call
        torch.full((channels, 1), 1, dtype=torch.uint8),
        torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), 4, channels, [1, 1], groups=channels,
    )  # fmt: skip
    x, add = (
        ops.quantize_activation(
            torch.rand(2, channels, side, side, generator=generator), 1 / 255, 0, 8, halo
        )
        for _ in range(2)
    )
    own = steps.Step(steps.LAYER, x=1, x_bits=8, x_halo=halo, out_given=True, out_halo=halo)
    sum_ = steps.Step(
        steps.LAYER, x=0, x_bits=8, x_halo=halo, add=2, layer=1, add_halo=halo, out_given=True, out_halo=halo,
        add_zero_point=3, out_zero_point=9,
    )  # fmt: skip
    numbers = steps.Numbers(1 / 255, out_scale=1 / 255)
    after = steps.Numbers(1 / 255, 0.03, 0.0, 60.0, 0.25)
    results = [
        steps.run_steps(
            [x, add],
            [copy, layer],
            *steps.pack_steps([(own, numbers), (sum_._replace(add_dies=dies), after)]),
            [3] if dies else [2, 3],
        )
        for dies in (False, True)
    ]
    assert torch.equal(results[0][0], add)
    assert torch.equal(results[0][1], results[1][0])
    assert results[0][1].unique().numel() > 3 or side == 1


def test_compiled_and_exported_as_single_ops() -> None:
    fused = cora.fuse(packed("basic"), X)
    exported = torch.export.export(fused.graph_module, (X,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert not any("run_steps" in name for name in targets)
    assert sum("run_layer" in name for name in targets) == 9


def test_gradients_are_refused_as_by_single_steps() -> None:
    fused = cora.fuse(packed("mlp", activation_bits=None), X)
    assert stretches(fused)
    with pytest.raises(RuntimeError, match="no gradient"):
        fused(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", 7, "kind must be 0..3, got 7"),
        ("x", 3, "value 3 is not there"),
        ("x", -1, "value -1 is not there"),
        ("add", 1, "value 1 is not there"),
        ("layer", 1, "layer must be 0..0, got 1"),
        ("layer", -1, "layer must be 0..0, got -1"),
        ("x_bits", 9, "run_layer: x_bits must be 0 or 2..8, got 9"),
    ],
)
def test_bad_steps(field: str, value: int, message: str) -> None:
    layer = ops.prepare_layer(
        torch.zeros(4, 2, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), 4, 4
    )  # fmt: skip
    good = steps.Step(steps.LAYER, x_given=False)
    x = torch.randn(2, 4)
    (y,) = steps.run_steps([x], [layer], *steps.pack_steps([(good, steps.Numbers())]), [1])
    assert y.shape == (2, 4)
    tables = steps.pack_steps([(good._replace(**{field: value}), steps.Numbers())])
    with pytest.raises(RuntimeError, match=message):
        steps.run_steps([x], [layer], *tables, [1])


def test_bad_tables() -> None:
    x, (program, numbers) = (
        torch.randn(2, 4),
        steps.pack_steps([(steps.Step(steps.MEAN), steps.Numbers())]),
    )
    for bad, message in (
        ((program.int(), numbers), "program must have dtype int64, got int32"),
        ((program, numbers.float()), "numbers must have dtype float64, got float32"),
        ((program[:, 1:].contiguous(), numbers), r"program must have shape \[steps, 24\]"),
        ((program, numbers[:, :2].contiguous()), r"numbers must have shape \[steps, 5\]"),
        ((program, numbers[:0]), "numbers must have a row for each of the 1 steps, got 0"),
        ((program, numbers), "mean_codes: x must have dtype uint8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            steps.run_steps([x], [], *bad, [1])
    (y,) = steps.run_steps([x], [], program[:0], numbers[:0], [0])
    assert torch.equal(y, x)
    with pytest.raises(RuntimeError, match="value 4 is not there"):
        steps.run_steps([x], [], program[:0], numbers[:0], [4])
