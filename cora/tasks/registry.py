"""Built-in tasks by name, and the user's own by file or module."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cora.tasks.base import Task
from cora.tasks.cifar import Cifar10
from cora.tasks.embedding import TextEmbedding
from cora.tasks.fashion import FashionMnist
from cora.tasks.imagenet import Imagenet
from cora.tasks.ocr_detection import OcrDetection
from cora.tasks.ocr_recognition import OcrRecognition
from cora.tasks.user import UserTask, load_module, load_object

__all__ = ["TaskStatus", "available_tasks", "resolve_task"]

Data = str | os.PathLike[str] | None

_BUILT_IN: dict[str, Callable[[Data], Task]] = {
    "ocr-recognition": lambda data: OcrRecognition(data),
    "ocr-detection": lambda data: OcrDetection(data),
    "cifar10-resnet20": lambda data: Cifar10(20, data),
    "cifar10-resnet32": lambda data: Cifar10(32, data),
    "imagenet": lambda data: Imagenet(data=data),
    "fashion-mnist": lambda data: FashionMnist(data),
    "text-embedding": lambda data: TextEmbedding(data),
}


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """A built-in task and whether it can run here.

    Args:
        name: what ``resolve_task`` takes.
        description: one line.
        missing: None when weights and data are on this machine, else what is missing, where it
            was looked for and how to get it.
    """

    name: str
    description: str
    missing: str | None


def available_tasks(data: Data = None) -> list[TaskStatus]:
    """Every built-in task, without loading or downloading anything."""
    tasks = [make(data) for make in _BUILT_IN.values()]
    return [TaskStatus(task.name, task.description, task.missing()) for task in tasks]


def resolve_task(name: str, data: Data = None) -> Task:
    """The task that a name means.

    Args:
        name: a built-in name (see ``available_tasks``); ``imagenet:timm/NAME`` or
            ``imagenet:torchvision/NAME``; a ``file.py`` that defines build() and calibration(); or
            ``file.py:object`` or ``package.module:object``, the object being a Task, something
            with these functions, or a function that returns one.
        data: a data folder for built-in tasks, searched before ``CORA_DATA``.

    Raises:
        ValueError: no such built-in task.
        TypeError: the object is no task.
        FileNotFoundError, ImportError, AttributeError: see ``load_object``.

    Example:
        task = resolve_task("cifar10-resnet20", data="my-data")
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name](data)
    if name.startswith("imagenet:"):
        return Imagenet(name.removeprefix("imagenet:"), data)
    if name.endswith(".py"):
        return UserTask.from_object(name, load_module(name))
    if ":" in name:
        return _as_task(name, load_object(name))
    raise ValueError(
        f"task: expected one of {', '.join(_BUILT_IN)}, or a file.py or module:object of "
        f"your own, got {name!r}"
    )


def _as_task(name: str, found: object) -> Task:
    if isinstance(found, Task):
        return found
    if callable(found) and not isinstance(found, nn.Module) and not hasattr(found, "calibration"):
        required = [
            p.name
            for p in inspect.signature(found).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if required:
            raise TypeError(f"{name!r}: a task factory takes no arguments, this one {required}")
        found = found()
    elif inspect.isclass(found):
        found = found()
    return found if isinstance(found, Task) else UserTask.from_object(name, found)
