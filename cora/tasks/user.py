"""A user's own model and data, named ``module:object`` or ``file.py:object``."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cora import batches
from cora.batches import Batch, float_tensors, kl_divergence, required_inputs
from cora.tasks.base import ClassificationMeter, Meter, Reference, Task

__all__ = ["UserTask", "load_module", "load_object"]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such Python file (searched from {Path.cwd()})")
    name = f"_cora_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def load_module(name: str) -> ModuleType:
    """Import ``package.module``, or the file when the name ends in ``.py``.

    Modules are also found in the current folder, as ``python -m`` finds them.

    Raises:
        FileNotFoundError: no such file.
        ImportError: no such module.
    """
    if name.endswith(".py"):
        return _import_file(Path(name).expanduser())
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ImportError(
                f"no Python module named {name!r} in {here} or the installed packages"
            ) from error
        raise
    finally:
        sys.path.remove(here)


def load_object(name: str) -> Any:
    """The object that ``package.module:object`` or ``path/to/file.py:object`` names.

    Raises:
        ValueError: the name has no ``:object`` part.
        FileNotFoundError, ImportError: there is no such file or module.
        AttributeError: it has no such object; the message lists what it has.

    Example:
        build = load_object("mymodel.py:build")
    """
    module_name, separator, attribute = name.rpartition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(f"expected 'module:object' or 'file.py:object', got {name!r}")
    found: Any = load_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(n for n in vars(found) if not n.startswith("_")) or "nothing"
            raise AttributeError(f"{module_name!r} has no {attribute!r}; it has: {public}")
        found = getattr(found, part)
    return found


def _call_with(function: Callable[..., Any], **options: Any) -> Any:
    """Call with those of the options that the function takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**options)
    return function(**{key: value for key, value in options.items() if key in parameters})


def _size(value: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, (tuple, list)):
        return _size(value[0])
    return len(value)


class _AnyMeter(Meter):
    """Top-1 where targets are classes; with a reference KL and agreement, else relative error.

    Outputs are logits [..., classes], or the values of a regression [..., 1]: see `UserTask._tensor`.
    """

    def __init__(self) -> None:
        self.classes = ClassificationMeter()
        self.kl = self.error = self.energy = 0.0
        self.agree = self.count = self.samples = 0

    def update(self, output: Tensor, targets: Any, reference: Tensor | None) -> None:
        self.samples += len(output)
        regression = output.shape[-1] == 1
        labels = isinstance(targets, Tensor) and not targets.is_floating_point()
        if labels and not regression and targets.shape == output.shape[:-1]:
            self.classes.update(output.flatten(0, -2), targets.flatten(), None)
        if reference is None:
            return
        if regression:
            self.error += float((output - reference).double().square().sum())
            self.energy += float(reference.double().square().sum())
            return
        kl = kl_divergence(reference, output)
        self.count += kl.numel()
        self.kl += float(kl.double().sum())
        self.agree += int((reference.argmax(dim=-1) == output.argmax(dim=-1)).sum())

    def result(self) -> dict[str, float]:
        metrics = {"top1": self.classes.result()["top1"]} if self.classes.samples else {}
        if self.count:
            metrics |= {"kl": self.kl / self.count, "agreement": self.agree / self.count}
        if self.energy:
            metrics["relative_error"] = self.error / self.energy
        return metrics | {"samples": float(self.samples)}


class UserTask(Task):
    """A task made of a user's functions.

    Args:
        name: for messages.
        build: returns the float model; called ``model`` or ``build`` in the user's file.
        calibration: returns batches; may take ``samples`` and ``seed``.
        validation: returns batches; may take ``limit``.
        evaluate: ``evaluate(model)`` returns a dict or a number; may take what Task.evaluate takes.
        output_logits: as in Task; by default what `cora.quantize` takes an output for, see
            `cora.batches.output_logits`.
        label_loss: as in Task.
        regression: whatever the output's form, it is not logits; compare by squared error.
    """

    def __init__(
        self,
        name: str,
        build: Callable[..., nn.Module],
        calibration: Callable[..., Iterable[Any]],
        validation: Callable[..., Iterable[Any]] | None = None,
        evaluate: Callable[..., Any] | None = None,
        output_logits: Callable[[Any], Tensor | None] | None = None,
        label_loss: Callable[[Any, Tensor], Tensor] | None = None,
        regression: bool = False,
    ) -> None:
        self.name = name
        self.description = f"the user's own: {name}"
        self._build = build
        self._calibration = calibration
        self._validation = validation
        self._evaluate = evaluate
        self._output_logits = output_logits
        self._label_loss = label_loss
        self.regression = regression
        self._required: int | None = None  # inputs of the model

    @classmethod
    def from_object(cls, name: str, found: Any) -> UserTask:
        """Collect the functions from a module or another object that has them.

        Raises:
            TypeError: it lacks ``build`` (or ``model``) or ``calibration``.
        """
        build = getattr(found, "build", None) or getattr(found, "model", None)
        calibration = getattr(found, "calibration", None)
        if not callable(build) or not callable(calibration):
            lacking = "calibration" if callable(build) else "build (or model)"
            raise TypeError(
                f"{name!r} is no task: it must define the function {lacking}; a task needs "
                "build() and calibration(), and may have validation() and evaluate(model)"
            )
        return cls(
            name,
            build,
            calibration,
            validation=getattr(found, "validation", None),
            evaluate=getattr(found, "evaluate", None),
            output_logits=getattr(found, "output_logits", None),
            label_loss=getattr(found, "label_loss", None),
            regression=bool(getattr(found, "regression", False)),
        )

    def with_data(
        self,
        calibration: Callable[..., Iterable[Any]] | None = None,
        validation: Callable[..., Iterable[Any]] | None = None,
    ) -> UserTask:
        """The same task with other batches, where they are given."""
        other = copy.copy(self)
        other._calibration = calibration or self._calibration
        other._validation = validation or self._validation
        return other

    def model(self) -> nn.Module:
        model = self._build()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{self.name}: build() must return a torch.nn.Module, got {type(model)}"
            )
        self._required = required_inputs(model)
        model.eval()
        return model

    def calibration(self, samples: int = 1600, seed: int = 0) -> list[Any]:
        kept, seen = [], 0
        given = _call_with(self._calibration, samples=samples, seed=seed)
        if isinstance(given, Tensor | Mapping):
            given = [given]
        if not isinstance(given, Iterable):
            kind = type(given).__name__
            raise TypeError(f"{self.name}: calibration() must return batches, got {kind}")
        for batch in given:
            if seen >= samples:
                break
            kept.append(batch)
            seen += len(self._batch(batch))
        if not kept:
            raise ValueError(f"{self.name}: calibration() returned no batches")
        return kept

    def validation(self, limit: int | None = None) -> Iterable[Any]:
        if self._validation is None:
            raise ValueError(f"{self.name}: no validation() is defined, so it cannot be evaluated")
        seen = 0
        for batch in _call_with(self._validation, limit=limit):
            if limit is not None and seen >= limit:
                return
            made = self._batch(batch)
            seen += len(made)
            single = len(made.args) == 1 and not made.kwargs
            yield made.args[0] if single else made.kwargs or made.args, made.labels

    def _batch(self, batch: Any) -> Batch:
        """As `cora.quantize` reads it."""
        if self._required is None:
            self.model()
        assert self._required is not None
        return Batch(batch, self._required)

    @property
    def has_validation(self) -> bool:
        return self._validation is not None

    @property
    def has_metric(self) -> bool:
        return self.has_validation or self._evaluate is not None

    def output_logits(self, output: Any) -> Tensor | None:
        if self._output_logits is not None:
            return self._output_logits(output)
        return None if self.regression else batches.output_logits(output)

    def _tensor(self, output: Any) -> Tensor:
        """Logits [..., classes]; of a regression all values of a sample, [samples, values, 1]."""
        logits = self.output_logits(output)
        if logits is not None:
            return logits
        found = float_tensors(output)
        if not found:
            raise TypeError(
                f"{self.name}: the model's output must hold float tensors, got {type(output).__name__}"
            )
        return torch.cat([t.reshape(len(t), -1) for t in found], 1)[..., None]

    def label_loss(self, output: Any, targets: Tensor) -> Tensor:
        if self._label_loss is not None:
            return self._label_loss(output, targets)
        return super().label_loss(output, targets)

    def meter(self) -> Meter:
        return _AnyMeter()

    def evaluate(
        self,
        model: nn.Module,
        limit: int | None = None,
        reference: Reference | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        if self._evaluate is None:
            return super().evaluate(model, limit, reference, progress)
        evaluate = self._evaluate
        if "model" in inspect.signature(evaluate).parameters:
            options = {"limit": limit, "reference": reference, "progress": progress}
            result = _call_with(evaluate, model=model, **options)
        else:
            result = evaluate(model)
        return dict(result) if isinstance(result, dict) else {"metric": float(result)}
