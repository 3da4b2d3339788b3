"""The one interface of every task: a model, calibration batches, validation batches, a metric."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cora.batches import kl_divergence

__all__ = ["Batch", "ClassificationMeter", "Meter", "Task"]

Batch = tuple[Tensor, Tensor]
Reference = nn.Module | Callable[[Any], Any] | Sequence[Tensor]
_T = TypeVar("_T")


class Meter(ABC):
    """Collects a metric over batches."""

    @abstractmethod
    def update(self, output: Tensor, targets: Any, reference: Tensor | None) -> None:
        """Add one batch; ``reference`` is the float model's output on the same inputs."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Metric name -> value; the first is the main one."""


class ClassificationMeter(Meter):
    """Top-k accuracy; with a reference also mean KL to it and top-1 agreement with it.

    Args:
        topk: the k of each accuracy, e.g. ``(1, 5)``.
    """

    def __init__(self, topk: Sequence[int] = (1,)) -> None:
        self.topk = tuple(topk)
        self.hits = dict.fromkeys(self.topk, 0)
        self.samples = 0
        self.kl = 0.0
        self.agree = 0
        self.has_reference = False

    def update(self, output: Tensor, targets: Any, reference: Tensor | None) -> None:
        targets = targets.to(output.device)
        order = output.topk(max(self.topk), dim=-1).indices
        for k in self.topk:
            self.hits[k] += int((order[:, :k] == targets[:, None]).any(dim=1).sum())
        self.samples += len(targets)
        if reference is not None:
            self.has_reference = True
            self.kl += float(kl_divergence(reference, output).double().sum())
            self.agree += int((reference.argmax(dim=-1) == output.argmax(dim=-1)).sum())

    def result(self) -> dict[str, float]:
        samples = max(self.samples, 1)
        metrics = {f"top{k}": self.hits[k] / samples for k in self.topk}
        if self.has_reference:
            metrics |= {"kl": self.kl / samples, "agreement": self.agree / samples}
        return metrics | {"samples": float(self.samples)}


class Task(ABC):
    """A pretrained model with the data to quantise it on and the metric to judge it by.

    Example:
        task = cora.tasks.resolve_task("cifar10-resnet20")
        model = task.model()
        task.evaluate(model, limit=1000)    # {"top1": 0.81, "samples": 1000.0}
    """

    name: str = ""
    description: str = ""
    default_samples: int = 1600
    """How many calibration samples suit the task."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The pretrained float model, in eval mode; a new one at each call."""

    @abstractmethod
    def calibration(self, samples: int = 1600, seed: int = 0) -> Sequence[Any]:
        """Batches (inputs, targets), never from the validation data; can be iterated repeatedly.

        Args:
            samples: number of samples over all batches.
            seed: chooses (or renders) them; the same seed gives the same batches.
        """

    @abstractmethod
    def validation(self, limit: int | None = None) -> Iterable[Any]:
        """Batches (inputs, targets), in a fixed order without a pattern.

        Args:
            limit: keep the first so many samples, a fair sample of all.
        """

    @abstractmethod
    def meter(self) -> Meter:
        """A new meter of the task's metric."""

    def missing(self) -> str | None:
        """None when weights and data are on this machine, else what is missing, and how to get it.

        Looks at folders and installed packages only, never at the network.
        """
        return None

    @property
    def has_validation(self) -> bool:
        """Whether there are validation batches, and so `outputs` of the float model on them."""
        return True

    @property
    def has_metric(self) -> bool:
        """Whether `evaluate` can say anything."""
        return self.has_validation

    def output_logits(self, output: Any) -> Tensor | None:
        """Logits [..., classes] in the model's output, on which KL to the float model is taken.

        None means that the output is a regression: use the mean squared error.
        """
        if not isinstance(output, Tensor):
            raise TypeError(f"{self.name}: expected a tensor output, got {type(output).__name__}")
        return output

    def label_loss(self, output: Any, targets: Tensor) -> Tensor:
        """Loss against the labels, for the option to search with labels."""
        logits = self.output_logits(output)
        if logits is None:
            raise ValueError(f"{self.name}: this task has no loss against labels")
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten().to(logits.device))

    def outputs(
        self, model: nn.Module, limit: int | None = None, progress: bool = False
    ) -> list[Tensor]:
        """The model's outputs on the validation batches, to pass as ``reference`` many times."""
        title = f"{self.name}: reference"
        with _eval_mode(model):
            return [
                self._tensor(output).cpu() for output, _ in self._run(model, limit, progress, title)
            ]

    def evaluate(
        self,
        model: nn.Module,
        limit: int | None = None,
        reference: Reference | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """The task's metric on the validation data.

        Args:
            model: a model with the interface of ``self.model()``; its mode is restored afterwards.
            limit: number of validation samples, None for all.
            reference: the float model, or what ``outputs`` returned for it: adds ``kl`` (or an
                output error) and ``agreement``.
            progress: show a bar.

        Returns:
            Metric name -> value; the first is the main one.
        """
        meter = self.meter()
        with _eval_mode(model, reference):
            if reference is None:
                expected: Iterator[Tensor | None] = itertools.repeat(None)
            elif isinstance(reference, Sequence):
                expected = iter(reference)
            else:
                expected = (self._tensor(out) for out, _ in self._run(reference, limit, False, ""))
            for output, targets in self._run(model, limit, progress, self.name):
                output = self._tensor(output)
                teacher = next(expected, output[:0])
                if teacher is not None:
                    if len(teacher) < len(output):
                        raise ValueError(
                            f"reference: expected outputs for all samples of the validation batch "
                            f"({len(output)}), got {len(teacher)}; compute them with task.outputs()"
                        )
                    teacher = teacher[: len(output)].to(output.device)
                meter.update(output, targets, teacher)
        return meter.result()

    def _tensor(self, output: Any) -> Tensor:
        logits = self.output_logits(output)
        tensor: Tensor = output if logits is None else logits
        return tensor

    def _run(
        self, model: Any, limit: int | None, progress: bool, title: str
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (output, targets) a validation batch, without gradients."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        device = _device(model)
        for inputs, targets in _bar(self.validation(limit), progress, title):
            with torch.no_grad():
                output = _call(model, inputs, device)
            yield output, targets


@contextmanager
def _eval_mode(*models: Any) -> Iterator[None]:
    """Put modules in eval mode; afterwards each submodule has the mode it had."""
    roots = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            return tensor.device
    return torch.device("cpu")


def _call(model: Any, inputs: Any, device: torch.device) -> Any:
    """Call with a tensor, a tuple of positional inputs or a dict of named ones."""
    if isinstance(inputs, Tensor):
        return model(inputs.to(device))
    if isinstance(inputs, dict):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return model(*(v.to(device) if isinstance(v, Tensor) else v for v in inputs))


def _bar(iterable: Iterable[_T], progress: bool, title: str) -> Iterable[_T]:
    if not progress:
        return iterable
    bar: Iterable[_T] = tqdm(iterable, desc=title, unit="batch", leave=False)
    return bar


def batches(inputs: Tensor, targets: Tensor, size: int) -> list[Batch]:
    """Cut tensors along their first axis into batches of at most ``size``."""
    starts = range(0, len(inputs), size)
    return [(inputs[i : i + size], targets[i : i + size]) for i in starts]


class LazyBatches(Sequence[Batch]):
    """Batches of images kept as bytes and converted when asked for: four times less memory.

    Args:
        images: uint8 [N, ...].
        targets: [N, ...].
        size: samples a batch.
        convert: uint8 images of one batch -> the model's input.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, size: int, convert: Callable[[Tensor], Tensor]
    ) -> None:
        self.parts = batches(images, targets, size)
        self.convert = convert

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        images, targets = self.parts[index]
        return self.convert(images), targets


def check_samples(samples: int, available: int | None = None) -> None:
    """Raise ValueError unless 1 <= samples <= available."""
    if samples < 1 or (available is not None and samples > available):
        upper = "" if available is None else f" and at most {available}"
        raise ValueError(f"samples: expected at least 1{upper}, got {samples}")
