"""Passes in lockstep, and what layers see in a changed model beside the float one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import pytest
import torch
from models import Net, batches, trained_net
from torch import Tensor, nn

import cora.drift
from cora import Calibration
from cora.batches import Batch
from cora.drift import Drift, Inputs, Lockstep
from cora.moments import input_rows

ORDER = ["stem", "depthwise", "pointwise", "body.0", "head"]


class Chain(nn.Module):
    """Runs a, b, a again; what it does on the way is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.notes: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.notes.append("start")
        x = self.b(self.a(x))
        self.notes.append("after b")
        return self.a(x)


def hooks(*models: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for model in models
        for m in model.modules()
    )


# --- Passes --------------------------------------------------------------------------------------


def test_passes_are_held_before_each_layer_and_see_what_was_changed() -> None:
    model = Chain()
    xs = torch.randn(2, 3, 4)
    with torch.no_grad():
        runs = Lockstep(model, [Batch(x) for x in xs], ["a", "b"])
        assert model.notes == []  # nothing runs before it is asked for
        for i, x in enumerate(xs):
            assert torch.equal(runs.at(i, "a"), x)
        assert model.notes == ["start"] * 2
        model.a.weight.mul_(2)
        runs.release("a")
        for i, x in enumerate(xs):
            assert torch.equal(runs.at(i, "b"), model.a(x))
            assert torch.equal(runs.at(i, "b"), model.a(x))  # it stays there
        assert runs.at(0, "unused") is None
        runs.release("b")
        assert runs.at(0, "b") is None and model.notes[2:] == ["after b"]  # past it, and ended
        runs.close()
    assert hooks(model) == 0


def test_a_pass_that_skips_a_layer_waits_at_the_next() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if x.sum() > 0 else x)

    runs = Lockstep(Sometimes(), [Batch(torch.ones(1, 2)), Batch(-torch.ones(1, 2))], ["a", "b"])
    assert runs.at(0, "a") is not None and runs.at(1, "a") is None
    runs.release("a")
    assert all(runs.at(i, "b") is not None for i in range(2))
    runs.close()


def test_an_error_in_a_pass_and_an_early_end_leave_nothing_behind() -> None:
    class Fails(Chain):
        def forward(self, x: Tensor) -> Tensor:
            try:
                self.a(x)
                raise ArithmeticError("in the model")
            finally:
                self.notes.append("cleaned up")

    model = Fails()
    runs = Lockstep(model, [Batch(torch.ones(1, 4))] * 3, ["a"])
    assert runs.at(0, "a") is not None and runs.at(1, "a") is not None
    runs.release("a")
    with pytest.raises(ArithmeticError, match="in the model"):
        runs.at(0, "b")
    runs.close()
    assert model.notes == ["cleaned up"] * 2  # the third never began
    assert hooks(model) == 0


def test_the_contexts_of_a_pass_are_its_own() -> None:
    class Contexts(Chain):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
                x = self.b(self.a(x))
            assert not torch.is_autocast_enabled("cpu")
            return self.a(x.float())

    model = Contexts()
    runs = Lockstep(model, [Batch(torch.ones(1, 4))] * 2, ["a", "b"])
    with torch.no_grad():
        for name in ("a", "b"):
            for i in range(2):
                x = runs.at(i, name)
                assert x is not None and x.dtype == (
                    torch.bfloat16 if name == "b" else torch.float32
                )
                assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            runs.release(name)
        assert runs.at(0, "end") is None and runs.at(1, "end") is None
        ended = Lockstep(model, [Batch(torch.ones(1, 4))], ["b"])
        assert ended.at(0, "b") is not None
    ended.close()
    runs.close()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_compiled_model_is_held_like_any_other() -> None:
    model = Chain()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4)
    with torch.no_grad():
        compiled(x)
        runs = Lockstep(compiled, [Batch(x)], ["_orig_mod.a", "_orig_mod.b"])
        assert torch.equal(runs.at(0, "_orig_mod.a"), x)
        model.a.weight.mul_(2)
        runs.release("_orig_mod.a")
        assert torch.equal(runs.at(0, "_orig_mod.b"), model.a(x))
        runs.close()


# --- Drift ---------------------------------------------------------------------------------------


def inputs_of(
    calibration: Calibration, model: nn.Module, names: Sequence[str]
) -> dict[str, Inputs]:
    found = {}
    with closing(Drift(calibration, model, names)) as drift:
        for name in names:
            inputs = drift.of(name)
            if inputs is not None:
                found[name] = inputs
            drift.release(name)
    assert hooks(calibration.model, model) == 0
    return found


def test_no_drift_in_an_unchanged_model() -> None:
    """Every position is drawn from these few samples: the sums are the moment without its ridge."""
    calibration = Calibration(trained_net(), batches())
    for name, found in inputs_of(calibration, calibration.model, ORDER).items():
        assert torch.equal(found.moments, found.crosses)
        assert torch.equal(found.mean_float, found.mean_other)
        moment = calibration.moment(name).clone()
        moment.diagonal(dim1=1, dim2=2).sub_(calibration._ridges[name][:, None])
        moment /= calibration.seen(name)  # a position
        mean = (2 * found.moments[0] + found.moments[1]) / 3  # two of the three batches, and one
        torch.testing.assert_close(mean, moment, rtol=1e-3, atol=2e-5)


def test_drift_of_drawn_positions() -> None:
    """Where only a share of the positions is drawn, the moment is met up to a factor and some noise."""
    model = nn.Conv2d(2, 4, 3)
    calibration = Calibration(model, torch.randn(160, 2, 40, 40) + 0.3)
    moment = calibration.moment("")
    found = inputs_of(calibration, calibration.model, [""])[""]
    assert torch.equal(found.moments, found.crosses)
    moment.diagonal(dim1=1, dim2=2).sub_(calibration._ridges[""][:, None])
    seen = found.moments.mean(0)
    there, moment = (m / m.diagonal(dim1=1, dim2=2).sum() for m in (seen, moment))
    assert 0 < float((there - moment).norm() / moment.norm()) < 0.1


def direct(net: Net, other: Net, name: str, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of a layer's inputs in both models, by hooks."""
    rows = []
    for model in (net, other):
        seen: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0].clone())
        )
        with torch.no_grad():
            for x in data:
                model(x)
        handle.remove()
        layer = net.get_submodule(name)
        rows.append(torch.cat([input_rows(layer, x).double() for x in seen], dim=1))
    return rows[0], rows[1]


@pytest.mark.parametrize("memory_limit", [2 << 30, 200_000])  # bytes; the second makes passes anew
def test_drift_of_a_model_that_changes_on_the_way(
    monkeypatch: pytest.MonkeyPatch, memory_limit: int
) -> None:
    """Against what hooks see in whole passes, each layer changed once it was looked at."""
    monkeypatch.setattr(cora.drift, "_FEWEST", 48)
    net, data = trained_net(), batches()
    calibration = Calibration(net, data, fold_bn=False, memory_limit=memory_limit)
    other = trained_net()
    with closing(Drift(calibration, other, ORDER)) as drift:
        for name in ORDER:
            found = drift.of(name)
            assert found is not None
            near = {"rtol": 1e-4, "atol": 3e-6}
            for half in range(2):
                x, y = direct(net, other, name, data[half::2])
                count = x.shape[1]
                torch.testing.assert_close(found.moments[half].double(), y.mT @ y / count, **near)
                torch.testing.assert_close(found.crosses[half].double(), x.mT @ y / count, **near)
            x, y = direct(net, other, name, data)
            torch.testing.assert_close(found.mean_float.double(), x.mean(1), **near)
            torch.testing.assert_close(found.mean_other.double(), y.mean(1), **near)
            assert torch.equal(found.moments, found.crosses) == (name == "stem")
            with torch.no_grad():
                other.get_submodule(name).weight.add_(0.1)
            drift.release(name)


def test_layers_that_never_run() -> None:
    model = Chain()
    calibration = Calibration(model, [torch.randn(8, 4)] * 2)
    assert set(inputs_of(calibration, model, ["a", "b", "unused"])) == {"a", "b"}


def test_one_pass_for_all_layers_and_more_samples_where_less_is_held() -> None:
    """Passes begin anew where the memory that they hold allows twice the samples, and not before."""

    class Funnel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(1, 16, 3, padding=1)
            self.second = nn.Conv2d(16, 2, 3, padding=1)
            self.narrow = nn.Conv2d(2, 2, 3, stride=4)
            self.last = nn.Conv2d(2, 2, 3)
            self.runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.last(self.narrow(self.second(self.wide(x))))

    names = ["wide", "second", "narrow", "last"]
    data = torch.randn(96, 1, 32, 32)
    for limit, second in ((2 << 30, [96]), (6_000_000, range(16, 48))):
        model = Funnel()
        calibration = Calibration(model, data, memory_limit=limit)
        calibration.moment("wide")  # and what else is computed once
        drift = Drift(calibration, model, names)
        found = list(drift._samples.values())
        assert [found[0], *found[2:]] == [96] * 3 and found[1] in second
        calibration.model.runs = 0
        inputs_of(calibration, model, names)
        restarts = 1 + sum(a != b for a, b in zip(found, found[1:], strict=False))
        # In two parts, and once more to see what is held.
        assert calibration.model.runs == 2 * restarts + 1
