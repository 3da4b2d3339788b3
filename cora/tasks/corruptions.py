"""Corrupted copies of validation images: does a quantized model break sooner than its float one?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cora.tables import format_metric
from cora.tasks.base import Meter, Task, _eval_mode

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corrupted", "corrupt", "robustness", "robustness_table"]

SEVERITIES = (1, 2, 3, 4, 5)

# Amounts by severity: of CIFAR-10-C for images of 32 pixels, of ImageNet-C for 224.
_AMOUNTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
}
CORRUPTIONS = tuple(_AMOUNTS)
# Metrics that compare outputs with the float model's: the others judge a model by the targets.
_AGAINST_FLOAT = ("kl", "relative_error", "agreement")


def _noise(x: Tensor, amount: float, seed: int, first: int) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    # An image's own generator: it does not depend on the batches, and severities scale one noise.
    drawn = np.stack(
        [
            np.random.default_rng([seed, index]).standard_normal(x.shape[1:], dtype=np.float32)
            for index in range(first, first + len(x))
        ]
    )
    noise = torch.from_numpy(drawn).to(x)
    return torch.minimum(torch.maximum(x + amount * (high - low) * noise, low), high)


def _blur(x: Tensor, amount: float, _seed: int, _first: int) -> Tensor:
    radius = math.ceil(4 * amount)
    taps = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / amount) ** 2)
    kernel = (kernel / kernel.sum()).to(x)
    channels = x.shape[1]
    down = kernel.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, down, groups=channels), down.mT, groups=channels)


def _contrast(x: Tensor, amount: float, _seed: int, _first: int) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + amount * (x - mean)


_FUNCTIONS: dict[str, Callable[[Tensor, float, int, int], Tensor]] = {
    "gaussian_noise": _noise,
    "gaussian_blur": _blur,
    "contrast": _contrast,
}


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupted copies of images, as the model takes them, whatever their normalisation.

    Amounts are those of ImageNet-C, relative to what an image holds: noise (clipped as there) to the
    range of each channel in the image, contrast to each channel's mean, blur is in pixels. So any
    scale and offset a channel commute with the corruption, and where an image's channels span black to
    white it is the benchmark's own. Between 32 pixels (CIFAR-10-C) and 224 (ImageNet-C) of the
    shorter side, amounts follow a power law; beyond, they stay.

    Args:
        images: float [N, C, H, W].
        kind: a name in `CORRUPTIONS`.
        severity: 1..5.
        seed: of the noise.
        first: index of the first image in its data set; an image's noise depends on its index, not
            on its batch.

    Returns:
        The images' shape and dtype; a flat channel stays as it is.

    Raises:
        ValueError: images of another shape or dtype, an unknown kind or severity.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"corruptions need images, float [N, C, H, W], got {_what(images)}")
    if kind not in _AMOUNTS:
        raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be an integer 1..5, got {severity!r}")
    if not images.numel():
        return images.clone()
    small, large = (amounts[severity - 1] for amounts in _AMOUNTS[kind])
    place = math.log(min(images.shape[2:]) / 32) / math.log(224 / 32)
    amount = small * (large / small) ** min(max(place, 0.0), 1.0)
    return _FUNCTIONS[kind](images, amount, seed, first)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


class Corrupted(Task):
    """An image task with its validation images corrupted; everything else is the task's own.

    Args:
        task: its validation must yield (images, targets), images float [N, C, H, W].
        kind, severity, seed: as in `corrupt`; severity 0 leaves the images as they are.
    """

    def __init__(self, task: Task, kind: str, severity: int, seed: int = 0) -> None:
        self.task, self.kind, self.severity, self.seed = task, kind, severity, seed
        self.name = f"{task.name}: {kind} {severity}"
        self.description = f"{task.description}, corrupted"
        self.default_samples = task.default_samples

    def model(self) -> nn.Module:
        return self.task.model()

    def calibration(self, samples: int = 1600, seed: int = 0) -> Sequence[Any]:
        return self.task.calibration(samples, seed)

    def validation(self, limit: int | None = None) -> Iterator[tuple[Tensor, Any]]:
        seen = 0
        for inputs, targets in self.task.validation(limit):
            # Checked at severity 0 too, which comes first.
            corrupted = corrupt(inputs, self.kind, self.severity or 1, self.seed, seen)
            yield corrupted if self.severity else inputs, targets
            seen += len(inputs)

    def meter(self) -> Meter:
        return self.task.meter()

    @property
    def has_validation(self) -> bool:
        return self.task.has_validation

    def output_logits(self, output: Any) -> Tensor | None:
        return self.task.output_logits(output)

    def _tensor(self, output: Any) -> Tensor:
        return self.task._tensor(output)

    def compare(
        self, models: Mapping[str, nn.Module], limit: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics of several models on the same images, each also against the first model's outputs."""
        meters = {name: self.meter() for name in models}
        with _eval_mode(*models.values()):
            runs = [self._run(model, limit, False, "") for model in models.values()]
            for results in zip(*runs, strict=True):
                reference = self._tensor(results[0][0])
                for meter, (output, targets) in zip(meters.values(), results, strict=True):
                    output = self._tensor(output)
                    meter.update(output, targets, reference.to(output.device))
        return {name: meter.result() for name, meter in meters.items()}


def robustness(
    task: Task,
    models: Mapping[str, nn.Module],
    limit: int | None = None,
    severities: Iterable[int] = SEVERITIES,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """How models take corrupted validation images, side by side.

    Args:
        task: with images as inputs, see `Corrupted`; judged by its meter (not by a user's evaluate()).
        models: label -> model; the first is the float model, whose outputs on the same images the
            others' are compared with.
        limit: number of validation samples, None for all.
        severities: of 1..5.
        seed: of the noise.
        progress: show a bar.

    Returns:
        Rows: the clean images, each corruption at each severity, and the mean over the corrupted ones.
        {"corruption", "severity" (0: clean, None: mean), "metric": name of the task's main metric
        or None, "models": {label: {metric: value, "drop": metric lost since clean, "kl" (or
        "relative_error"), "agreement"}}}, as far as the task's meter has them.

    Raises:
        ValueError: no models, a severity out of range, inputs that are no images, no validation data.

    Example:
        >>> rows = robustness(task, {"float": model, "packed": qmodel}, limit=1000)
    """
    severities = list(severities)
    wrong = [s for s in severities if s not in SEVERITIES]
    if wrong or not severities:
        got = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"severities must be integers 1..5, got {got}")
    if not models:
        raise ValueError("models: expected at least the float model, got none")
    settings = [(CORRUPTIONS[0], 0), *itertools.product(CORRUPTIONS, severities)]
    bar = tqdm(settings, desc=f"{task.name}: corruptions", leave=False, disable=not progress)
    rows: list[dict[str, Any]] = []
    clean: dict[str, dict[str, float]] = {}
    for kind, severity in bar:
        found = Corrupted(task, kind, severity, seed).compare(models, limit)
        clean = clean or found
        metric = _main_metric(clean)
        kept = {name: _kept(values, clean[name], metric) for name, values in found.items()}
        label = kind if severity else "clean"
        rows.append({"corruption": label, "severity": severity, "metric": metric, "models": kept})
    corrupted = rows[1:]
    mean = {
        name: {
            key: sum(row["models"][name][key] for row in corrupted) / len(corrupted)
            for key in corrupted[0]["models"][name]
        }
        for name in models
    }
    last = {"corruption": "mean", "severity": None, "metric": rows[0]["metric"], "models": mean}
    return [*rows, last]


def _main_metric(results: Mapping[str, Mapping[str, float]]) -> str | None:
    """The first metric that judges by the targets."""
    names = next(iter(results.values()))
    return next((name for name in names if name not in (*_AGAINST_FLOAT, "samples")), None)


def _kept(
    values: Mapping[str, float], clean: Mapping[str, float], metric: str | None
) -> dict[str, float]:
    kept = (
        {} if metric is None else {metric: values[metric], "drop": clean[metric] - values[metric]}
    )
    return kept | {key: values[key] for key in _AGAINST_FLOAT if key in values}


def robustness_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of what `robustness` returns; the float model has no columns against itself."""
    metric = rows[0]["metric"]
    # A metric's columns stand together, float first: that is what is compared.
    columns = [
        (name, key)
        for key in (metric, "drop", *_AGAINST_FLOAT)
        for index, (name, values) in enumerate(rows[0]["models"].items())
        if key in values and not (index == 0 and key in _AGAINST_FLOAT)
    ]
    head = ["", "severity", *[f"{name} {key}".replace("_", " ") for name, key in columns]]
    cells = [
        [
            str(row["corruption"]).replace("_", " "),
            "-" if not row["severity"] else str(row["severity"]),
            *[
                format_metric(metric if key == "drop" else key, row["models"][name][key])
                for name, key in columns
            ],
        ]
        for row in rows
    ]
    return head, cells
