"""Calibration batches, what a model makes of them, and how far two outputs are apart."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Batch",
    "divergence",
    "divergences",
    "float_tensors",
    "gradients",
    "in_parts",
    "kl_divergence",
    "of_samples",
    "output_logits",
    "required_inputs",
    "take",
]

_LABEL_KEYS = ("labels", "label", "targets", "target")


class Batch:
    """One calibration batch: the model's arguments and, if there are any, the labels.

    Args:
        batch: a tensor; a tuple (inputs, labels) or (inputs,), where inputs may be a tensor, tuple or
            dict; or a dict of named inputs, labels under "labels", "label", "targets" or "target".
        required: inputs the model requires: of a tuple of tensors the first so many are inputs.
        name: of the argument it came in, for error messages.
    """

    def __init__(self, batch: Any, required: int = 1, name: str = "calibration") -> None:
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.labels: Any = None
        if isinstance(batch, list | tuple) and len(batch) > 0:
            apart = required > 1 and len(batch) >= required and isinstance(batch[0], Tensor)
            inputs: Any = tuple(batch[:required]) if apart else batch[0]
            labels = batch[required if apart else 1 :]
            if len(labels) > 1:  # what is left out might be a mask
                raise ValueError(
                    f"{name}: a batch of {len(batch)} items must say which are inputs: "
                    f"((inputs, ...), labels) or a dict; the model requires {required}"
                )
            self.labels = labels[0] if labels else None
        else:
            inputs = batch
        if isinstance(inputs, Mapping):
            named = dict(inputs)
            for key in _LABEL_KEYS:
                if key in named:
                    self.labels = named.pop(key)
            self.args, self.kwargs = (), named
        elif isinstance(inputs, list | tuple):
            self.args, self.kwargs = tuple(inputs), {}
        else:
            self.args, self.kwargs = (inputs,), {}
        if not self.tensors():
            raise TypeError(
                f"{name}: a batch must hold tensors (a tensor, a tuple or a dict of them; of an array: "
                f"torch.from_numpy), got {type(batch).__name__}"
            )

    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def __len__(self) -> int:
        first = self.tensors()[0]
        return first.shape[0] if first.dim() else 1

    def __getitem__(self, samples: slice | Tensor) -> Batch:
        """Some of the samples, by slice or index tensor."""
        size = len(self)

        def take(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
            return value[samples] if whole else value

        part = copy.copy(self)
        part.args = tuple(take(v) for v in self.args)
        part.kwargs = {k: take(v) for k, v in self.kwargs.items()}
        part.labels = take(self.labels)
        return part

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every input tensor changed."""
        part = copy.copy(self)

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        part.args = tuple(map(changed, self.args))
        part.kwargs = {k: changed(v) for k, v in self.kwargs.items()}
        return part

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda t: t.to(device))

    def float(self) -> Batch:
        """The same with floats of single precision."""
        return self._each(lambda t: t.float() if t.is_floating_point() else t)

    def run(self, model: Callable[..., Any]) -> Any:
        """A model's output; it is given copies, since it may change its inputs in place."""
        own = self._each(Tensor.clone)
        return model(*own.args, **own.kwargs)


def in_parts(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The batches, or the halves of a single one: two parts at least, unless there is but one sample."""
    if len(batches) != 1 or len(batches[0]) < 2:
        return batches
    half = len(batches[0]) // 2
    return [batches[0][:half], batches[0][half:]]


def required_inputs(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def output_logits(output: Any) -> Tensor | None:
    """Logits [..., classes] in a model's output, as far as its form tells; None for a regression.

    A tensor [B, C], [B, T, C] is taken as it is, [B, C, H, W] with its classes moved last, and so the
    `logits` of an output object. One output value, or anything else, is a regression.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits", logits)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        return None
    if logits.dim() == 4:
        logits = logits.movedim(1, -1)
    return logits if logits.shape[-1] > 1 else None


def float_tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    if isinstance(output, list | tuple):
        return [t for item in output for t in float_tensors(item)]
    return []


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of softmax distributions, in nats.

    Args:
        teacher, student: logits [..., classes]; a class that the teacher masks (-inf) has no share.

    Returns:
        float32 [...], one value a distribution.
    """
    log_p, log_q = F.log_softmax(teacher.float(), -1), F.log_softmax(student.float(), -1)
    gap = torch.where(log_p == float("-inf"), 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def of_samples(some: list[Tensor], others: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors of two outputs in pairs, without those that do not begin with the samples, as the first ones do.

    The outputs may be of different numbers of samples.
    """
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if b.dim()]
    if not pairs:
        return []
    sizes = tuple(map(len, pairs[0]))
    return pairs[:1] + [
        (a, b) for a, b in pairs[1:] if (len(a), len(b)) == sizes and a.shape[1:] == b.shape[1:]
    ]


def divergences(
    student: Any, teacher: Any, logits: Callable[[Any], Tensor | None] = output_logits
) -> Tensor:
    """How far each sample's output is from the float model's: KL, or relative squared error.

    Args:
        student: the quantized model's output.
        teacher: the float model's output on the same input.
        logits: finds the logits [samples, ..., classes] in an output; None means a regression, whose
            error is taken relative to the energy of the teacher's outputs.

    Returns:
        float32 [samples]: KL in nats, averaged over the distributions of a sample, or the error.
    """
    p, q = logits(teacher), logits(student)
    if p is not None and q is not None:
        return kl_divergence(p, q).reshape(len(p), -1).mean(1)
    pairs = of_samples(float_tensors(student), float_tensors(teacher))
    if not pairs:
        raise TypeError(f"model: output must hold float tensors, got {type(teacher).__name__}")
    errors = [
        (s - t).float().square().reshape(len(t), -1).mean(1)
        / t.float().square().mean().clamp(min=1e-12)
        for s, t in pairs
    ]
    return torch.stack(errors).mean(0)


def divergence(
    student: Any, teacher: Any, logits: Callable[[Any], Tensor | None] = output_logits
) -> Tensor:
    """Mean of `divergences`, a scalar."""
    return divergences(student, teacher, logits).mean()


def gradients(loss: Tensor, values: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
    """Gradients of a loss (None for what it does not depend on), or None of a model that has none.

    Such a model runs without gradients, or changes in place what a gradient needs.
    """
    try:
        return torch.autograd.grad(loss, values, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" in str(error) or "does not require grad" in str(error):
            return None
        raise


def take(output: Any, rows: Tensor, size: int) -> Any:
    """The given samples of a model's output on a batch of `size`."""
    if isinstance(output, Tensor):
        return output[rows] if output.dim() and output.shape[0] == size else output
    if isinstance(output, Mapping):
        return {key: take(value, rows, size) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [take(value, rows, size) for value in output]
    if hasattr(output, "logits"):
        return {"logits": take(output.logits, rows, size)}
    return output
