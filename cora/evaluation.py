"""A network as a function of its quantized weights, against the float one: what every search measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import ops
from .batches import Batch, divergences, take
from .calibration import Calibration
from .modules import fake_quantize_dynamic

__all__ = ["Evaluator", "Loss", "activation_simulator", "is_better"]

Loss = Literal["kl", "labels"]


# Multiply-adds of a forward pass on the samples of a gradient step, and on the held-out ones.
_STEP_WORK = 3e10
_LOOK_WORK = 3e11

_IGNORED = -100  # a label that torch's cross entropy leaves out


class Evaluator:
    """Losses of a float model with other weights, on training and on held-out calibration samples.

    Args:
        calibration: model and samples.
        samples: calibration samples used, at most.
        batch_size: samples a gradient step, at most.
        holdout: samples that take no part in gradients; at most half of all, and fewer of a large model.
        seed: of the split and of the order.
        loss: "kl" (to the float model, no labels; squared error for a regression) or "labels".
        label_loss: function (output, labels) -> loss for loss="labels"; cross-entropy by default.
        simulate: context manager that makes a model quantize its activations.
    """

    def __init__(
        self,
        calibration: Calibration,
        samples: int,
        batch_size: int,
        holdout: int,
        seed: int,
        simulate: Callable[[nn.Module], Any],
        loss: Loss = "kl",
        label_loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.calibration, self.simulate = calibration, simulate
        self.resize(batch_size)
        self.loss, self.label_loss = loss, label_loss
        generator = torch.Generator().manual_seed(seed)
        index = [(i, j) for i, batch in enumerate(calibration.batches) for j in range(len(batch))]
        order = torch.randperm(len(index), generator=generator)[:samples].tolist()
        held = max(1, min(calibration.affordable(holdout, _LOOK_WORK, 8), len(order) // 2))
        self.train = [index[i] for i in (order[held:] or order)]
        held_out: dict[int, list[int]] = {}
        for i in order[:held]:
            held_out.setdefault(index[i][0], []).append(index[i][1])
        self.held_out = [(i, torch.tensor(sorted(rows))) for i, rows in sorted(held_out.items())]
        self.generator = generator
        self._queue: list[tuple[int, list[int]]] = []

    def resize(self, batch_size: int) -> None:
        """Take so many samples a gradient step, at most."""
        # Of a model with large inputs a few samples say as much, and as many would take hours.
        self.batch_size = self.calibration.affordable(batch_size, _STEP_WORK, 1)

    def outputs(
        self, parameters: Mapping[str, Tensor], batch: Batch, model: nn.Module | None = None
    ) -> Any:
        """The output of the model (or of another one of its structure) with some parameters replaced."""
        model = self.calibration.model if model is None else model
        with self.simulate(model):  # untied: a float module that shares a weight keeps its own
            return functional_call(
                model, dict(parameters), batch.args, batch.kwargs, tie_weights=False
            )

    def losses(
        self,
        parameters: Mapping[str, Tensor],
        batch: Batch,
        teacher: Any,
        model: nn.Module | None = None,
    ) -> Tensor:
        """Loss of each sample; a label_loss that gives one number stands for all of them."""
        output = self.outputs(parameters, batch, model)
        if self.loss == "kl":
            return divergences(output, teacher, self.calibration.logits)
        if batch.labels is None:
            raise ValueError("SearchConfig: loss='labels' needs calibration batches with labels")
        if self.label_loss is not None:
            return self.label_loss(output, batch.labels).mean().expand(len(batch))
        logits = self.calibration.logits(output)
        if logits is None:
            raise ValueError("SearchConfig: loss='labels' needs label_loss for this output")
        targets = _targets(batch.labels, logits)
        losses = F.cross_entropy(logits.flatten(0, -2).float(), targets, reduction="none")
        return losses.reshape(len(batch), -1).mean(1)

    def weights(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layers' weights as parameters of the model."""
        layers = self.calibration.layers
        return {
            f"{name}.weight" if name else "weight": w.to(layers[name].weight.dtype)
            for name, w in matrices.items()
        }

    def next_batch(self) -> tuple[Batch, Any]:
        """Samples of one calibration batch (inputs of different batches may differ in shape)."""
        if not self._queue:
            by_batch: dict[int, list[int]] = {}
            for i, j in self.train:
                by_batch.setdefault(i, []).append(j)
            chunks = []
            for i, rows in sorted(by_batch.items()):
                order = torch.randperm(len(rows), generator=self.generator).tolist()
                size = self.batch_size
                chunks += [
                    (i, [rows[k] for k in order[s : s + size]]) for s in range(0, len(rows), size)
                ]
            order = torch.randperm(len(chunks), generator=self.generator).tolist()
            self._queue = [chunks[k] for k in order]
        index, rows = self._queue.pop()
        return self.part(index, torch.tensor(sorted(rows)))

    def part(self, index: int, rows: Tensor) -> tuple[Batch, Any]:
        """Samples of a calibration batch with the float model's output on them."""
        batch = self.calibration.batches[index]
        teacher = self.calibration.teacher()[index]
        return batch[rows], take(teacher, rows, len(batch))

    def score(self, parameters: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """Loss of each held-out sample: float32 [n]."""
        with torch.no_grad():
            return torch.cat(
                [
                    self.losses(parameters, *self.part(index, rows), model)
                    for index, rows in self.held_out
                ]
            )

    def changed(self, parameters: Mapping[str, Tensor], model: nn.Module | None = None) -> float:
        """Share of the held-out answers (most likely classes) that are not the float model's.

        Raises:
            ValueError: the output has no classes.
        """
        logits = self.calibration.logits
        changed = answers = 0
        with torch.no_grad():
            for index, rows in self.held_out:
                batch, teacher = self.part(index, rows)
                expected, got = logits(teacher), logits(self.outputs(parameters, batch, model))
                if expected is None or got is None:
                    raise ValueError("max_drop needs a model whose output holds logits of classes")
                differ = expected.argmax(-1) != got.argmax(-1)
                changed, answers = changed + int(differ.sum()), answers + differ.numel()
        return changed / answers

    @property
    def answers(self) -> int:
        """How many answers `changed` judges; 0 where the output has no classes."""
        found = (
            self.calibration.logits(self.part(index, rows)[1]) for index, rows in self.held_out
        )
        return sum(logits.shape[:-1].numel() for logits in found if logits is not None)


def is_better(gain: Tensor, errors: float = 1.0) -> bool:
    """Whether paired gains of held-out samples are positive by more than so many standard errors.

    The losses have heavy tails and many proposals are tried: without doubt the search would fit the
    held-out samples.
    """
    error = float(gain.std(correction=0)) / len(gain) ** 0.5
    return float(gain.mean()) > errors * error


def activation_simulator(
    bits: int | None,
    names: set[str],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    activation: str,
) -> Callable[[nn.Module], Any]:
    """A context manager in which a float model quantizes the inputs of the named layers."""

    if bits is None:
        return lambda _model: nullcontext()

    @contextmanager
    def simulate(model: nn.Module) -> Iterator[None]:
        handles = []
        for name in names:
            static = ranges.get(name)

            def quantize_input(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                static: Any = static,
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                x, *rest = (*args, *kwargs.values())
                if static is not None:
                    scale, zero = static[0].reshape(1, 1), static[1].reshape(1, 1)
                    y = ops.fake_quantize(x, scale, zero, bits)
                else:
                    rows = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else x
                    y = fake_quantize_dynamic(rows, bits).reshape(x.shape)
                values = [y, *rest]
                named = dict(zip(kwargs, values[len(args) :], strict=True))
                return tuple(values[: len(args)]), named

            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(quantize_input, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return simulate


def _targets(labels: Any, logits: Tensor) -> Tensor:
    """Labels of logits [..., classes] for cross entropy: indices [n], or probabilities [n, classes]."""
    *places, classes = logits.shape
    got = type(labels).__name__
    if isinstance(labels, Tensor):
        found = labels.to(logits.device)
        if found.is_floating_point() and found.shape == logits.shape:
            return found.flatten(0, -2).float()
        whole = not found.is_floating_point() and not found.is_complex()
        if whole and found.numel() == math.prod(places):
            indices = found.flatten().long()
            if bool(((indices >= 0) & (indices < classes) | (indices == _IGNORED)).all()):
                return indices
        got = f"{list(labels.shape)} of {labels.dtype}"
        if labels.numel():
            got += f" between {labels.min()} and {labels.max()}"
    raise ValueError(
        f"calibration: labels must be class indices {places} below {classes}, or probabilities "
        f"{list(logits.shape)}, got {got}; other labels need SearchConfig(label_loss=...)"
    )
