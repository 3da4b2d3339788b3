"""What layers see in a model whose earlier layers are quantized already, beside what they see in the float one.

All forward passes run in lockstep: each is held before a layer until that layer's new weight is in place. So
quantizing the layers in their order costs a pass or a few, and not one a layer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from .batches import Batch, float_tensors, in_parts
from .calibration import Calibration
from .moments import input_rows

__all__ = ["Drift", "Inputs", "Lockstep"]

_SAMPLES = (256, 1024)  # run at least and at most, where the memory suffices
_FEWEST = 16  # run even if it does not
_WORK = 1e12  # multiply-adds of a pass


class Lockstep:
    """Forward passes of a model, each held before a layer that is not released yet.

    A pass is a coroutine on a stack of its own, so nothing is asked of the model but that it runs
    its layers as modules.

    Args:
        model: the model.
        batches: one pass each.
        names: layers that hold a pass when it first comes to them.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], names: Iterable[str]) -> None:
        self._closed = set(names)
        self._passes = [greenlet(lambda batch=batch: batch.run(model)) for batch in batches]
        self._held: list[tuple[str, Tensor] | None] = [None] * len(batches)
        self._autocast = [False] * len(batches)
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, kwargs, name=name: self._hold(name, (*args, *kwargs.values())[0]),
                with_kwargs=True,
            )
            for name in self._closed
        ]

    def _hold(self, name: str, x: Tensor) -> None:
        current = greenlet.getcurrent()
        if name in self._closed and current in self._passes:
            current.parent.switch((name, x))

    def at(self, index: int, name: str) -> Tensor | None:
        """What a layer is about to see in a pass; None if the pass does not come to it next."""
        run = self._passes[index]
        while not run.dead and (not run or self._held[index][0] not in self._closed):  # type: ignore[index]
            self._resume(index)
        held = self._held[index]
        return held[1] if held is not None and held[0] == name else None

    def _resume(self, index: int) -> None:
        """Run a pass up to where it is held next."""
        run, self._held[index] = self._passes[index], None
        with _own_modes():
            torch.set_autocast_enabled("cpu", self._autocast[index])
            found = run.switch()
            self._autocast[index] = torch.is_autocast_enabled("cpu")
        self._held[index] = None if run.dead else found

    def release(self, name: str) -> None:
        """Let the passes that a layer holds go on, when they are next asked for."""
        self._closed.discard(name)

    def close(self) -> None:
        """End all passes where they are."""
        for handle in self._handles:
            handle.remove()
        for run in self._passes:
            if run and not run.dead:
                with _own_modes():
                    run.throw(GreenletExit)
        self._held = [None] * len(self._passes)


@contextmanager
def _own_modes() -> Iterator[None]:
    """A pass may be held within its own contexts, whose modes are the thread's: ours stay ours."""
    autocast = torch.is_autocast_enabled("cpu")
    try:
        # A compiled model runs as it was written: a held pass cannot be traced.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_autocast_enabled("cpu", autocast)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A layer's inputs x in the float model and y in the other one, at the same positions.

    Args:
        moments: mean of y y^T over one half of the samples and over the other, float32 [2, groups, K, K].
        crosses: mean of x y^T likewise.
        mean_float: of x over all samples, [groups, K].
        mean_other: of y, [groups, K].
    """

    moments: Tensor
    crosses: Tensor
    mean_float: Tensor
    mean_other: Tensor


class Drift:
    """The inputs of layers in two models of one structure, layer by layer while the other one changes.

    Args:
        calibration: the float model and its batches.
        model: the other one, whose layers are changed in the order in which they run: each after it was
            asked for and before it is released.
        names: the layers, in that order.

    Example:
        >>> with contextlib.closing(Drift(calibration, model, names)) as drift:
        ...     for name in names:
        ...         inputs = drift.of(name)
        ...         ...  # change the layer in model
        ...         drift.release(name)
    """

    def __init__(self, calibration: Calibration, model: nn.Module, names: Sequence[str]) -> None:
        self._calibration, self._model = calibration, model
        self._left = list(names)
        self._samples = self._counts(names)
        self._parts: Sequence[Batch] = []
        self._runs: tuple[Lockstep, ...] = ()
        self._count = 0

    def of(self, name: str) -> Inputs | None:
        """What a layer sees when it first runs, at drawn positions; None if it does not run."""
        if self._samples[name] != self._count:
            self._start(self._samples[name])
        wanted = self._calibration.positions(name)
        layer = self._calibration.layers[name]
        sums: list[tuple[Tensor, ...]] = [(), ()]
        counts = [0, 0]
        for index, part in enumerate(self._parts):
            inputs = [run.at(index, name) for run in self._runs]
            if any(x is None for x in inputs):
                continue
            limit = max(wanted * len(part) // self._count, 1)
            own, other = (self._rows(layer, x, limit, index) for x in inputs)
            half = index % 2
            counts[half] += own.shape[1]
            found = other.mT @ other, own.mT @ other, own.sum(1), other.sum(1)
            add = zip(sums[half], found, strict=True)
            sums[half] = tuple(a.add_(b) for a, b in add) if sums[half] else found
        if not any(counts):
            return None
        halves = [i if counts[i] else 1 - i for i in range(2)]  # one may stand for both
        pairs = zip(*(sums[i] for i in halves), strict=True)
        moments, crosses, own, other = (torch.stack(pair) for pair in pairs)
        positions = moments.new_tensor([counts[i] for i in halves])
        each, total = positions[:, None, None, None], positions.sum()
        return Inputs(moments / each, crosses / each, own.sum(0) / total, other.sum(0) / total)

    def _rows(self, layer: Any, x: Tensor | None, limit: int, index: int) -> Tensor:
        """The same positions in both models: their draws have one seed."""
        assert x is not None
        generator = torch.Generator().manual_seed(self._calibration.seed + index)
        return input_rows(layer, x, limit, generator)

    def release(self, name: str) -> None:
        """Go on behind a layer: it is as it will be."""
        self._left.remove(name)
        for run in self._runs:
            run.release(name)

    def _start(self, samples: int) -> None:
        self.close()
        self._parts, self._count = in_parts(self._calibration.first(samples)), samples
        self._runs = tuple(
            Lockstep(model, self._parts, self._left)
            for model in (self._calibration.model, self._model)
        )

    def close(self) -> None:
        """End all passes."""
        for run in self._runs:
            run.close()
        self._runs = ()

    def _counts(self, names: Sequence[str]) -> dict[str, int]:
        """Samples for each layer. Neighbours share a number where they can: where it changes, passes
        begin anew, with more samples once what they hold is small."""
        calibration = self._calibration
        held = _held_bytes(calibration.model, names, calibration.batches[0][:1])
        least, most = (
            calibration.affordable(min(count, calibration.samples), _WORK, _FEWEST)
            for count in _SAMPLES
        )
        counts: dict[str, int] = {}
        now = 0
        for name in names:
            needed = math.ceil(calibration.positions(name) / max(calibration.seen(name), 1.0))
            fits = max(calibration.memory_limit // max(2 * held.get(name, 1), 1), _FEWEST)
            count = min(max(needed, least), most, fits)
            if now > fits:
                # Of memory that shrinks from layer to layer, a half leaves room for the next ones.
                now = max(count // 2, min(_FEWEST, count))
            elif count >= 2 * now:
                now = count
            counts[name] = now
        return counts


def _held_bytes(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, int]:
    """Bytes of intermediate results that are alive when a layer first runs, as far as modules see them."""
    alive: list[weakref.ref[Tensor]] = []
    found: dict[str, int] = {}

    def note(value: Any) -> None:
        alive.extend(weakref.ref(tensor) for tensor in float_tensors(value))

    def before(name: str) -> Callable[..., None]:
        def see(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            note([*args, *kwargs.values()])
            tensors = [tensor for ref in alive if (tensor := ref()) is not None]
            # A sample is a view of its batch: the size is the tensor's, not its storage's.
            sizes = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
            found.setdefault(name, sum(sizes.values()))

        return see

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [m.register_forward_hook(lambda _m, args, y: note([*args, y])) for m in leaves]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True)
        for name in names
    ]
    try:
        with _own_modes():
            batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
