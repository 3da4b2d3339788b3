"""Corrupted images: the amounts, the seeds, and models side by side on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cora.tasks import UserTask
from cora.tasks.base import ClassificationMeter, Task
from cora.tasks.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    Corrupted,
    corrupt,
    robustness,
    robustness_table,
)


def images(size: int = 32, count: int = 6, channels: int = 3) -> Tensor:
    """Smooth blobs that span 0 to 1 in every channel, as photographs nearly do."""
    x = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(5))
    x = nn.functional.interpolate(x, size=(size, size), mode="bicubic")
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low)


# --- Corruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 80, 224])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_increases_the_distance(kind: str, size: int) -> None:
    x = images(size)
    distances = [float((corrupt(x, kind, s) - x).square().mean().sqrt()) for s in SEVERITIES]
    assert distances == sorted(set(distances)) and distances[0] > 1e-4


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_seed_decides(kind: str) -> None:
    x = images()
    before = x.clone()
    first = corrupt(x, kind, 3, seed=1)
    assert torch.equal(corrupt(x, kind, 3, seed=1), first) and torch.equal(x, before)
    assert torch.equal(corrupt(x, kind, 3, seed=2), first) == (kind != "gaussian_noise")
    assert first.shape == x.shape and first.dtype == x.dtype


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_batches_do_not_matter(kind: str) -> None:
    x = images()
    parts = [corrupt(x[:4], kind, 2), corrupt(x[4:], kind, 2, first=4)]
    torch.testing.assert_close(torch.cat(parts), corrupt(x, kind, 2))


def test_images_have_noise_of_their_own() -> None:
    x = images(count=1).expand(2, -1, -1, -1)
    noisy = corrupt(x, "gaussian_noise", 1)
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_normalisation_commutes(kind: str) -> None:
    """Whether a task's images are in 0..1 or normalised, the corruption is the same."""
    x = images()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])

    def normalise(x: Tensor) -> Tensor:
        return (x - mean[:, None, None]) / std[:, None, None]

    torch.testing.assert_close(corrupt(normalise(x), kind, 4), normalise(corrupt(x, kind, 4)))


@pytest.mark.parametrize(("size", "amounts"), [(32, (0.04, 0.10)), (224, (0.08, 0.38))])
def test_noise_is_the_benchmarks(size: int, amounts: tuple[float, float]) -> None:
    x = images(size)
    for severity, amount in zip((1, 5), amounts, strict=True):
        noisy = corrupt(x, "gaussian_noise", severity)
        assert noisy.min() >= 0 and noisy.max() <= 1  # clipped to what the image holds
        middle = (x - 0.5).abs() < 0.05  # where clipping is rare
        error = noisy[middle] - x[middle]
        kept = error[(error.abs() < 0.4)]
        expected = torch.randn(100_000) * amount
        expected = expected[expected.abs() < 0.4]
        assert float(kept.std()) == pytest.approx(float(expected.std()), rel=0.1)


@pytest.mark.parametrize(("size", "amounts"), [(32, (0.75, 0.15)), (224, (0.4, 0.05))])
def test_contrast_is_the_benchmarks(size: int, amounts: tuple[float, float]) -> None:
    x = images(size)
    for severity, amount in zip((1, 5), amounts, strict=True):
        flat = corrupt(x, "contrast", severity)
        torch.testing.assert_close(flat.std((2, 3)), amount * x.std((2, 3)))
        torch.testing.assert_close(flat.mean((2, 3)), x.mean((2, 3)))


@pytest.mark.parametrize(("size", "sigma"), [(32, 1.0), (16, 1.0), (224, 6.0), (300, 6.0)])
def test_blur_is_the_benchmarks(size: int, sigma: float) -> None:
    """A point becomes a Gaussian of the benchmark's width; the border repeats, so sums stay."""
    x = torch.zeros(1, 1, size, size + 5)
    x[0, 0, size // 2, size // 2] = 1
    blurred = corrupt(x, "gaussian_blur", 5)[0, 0]
    place = torch.arange(size) - size // 2
    rows = blurred.sum(1)
    assert float(blurred.sum()) == pytest.approx(1, rel=1e-4)
    assert float((rows * place**2).sum().sqrt()) == pytest.approx(sigma, rel=0.05)
    torch.testing.assert_close(
        corrupt(torch.ones(1, 2, 8, 8), "gaussian_blur", 5)[0, 0, 0, 0], torch.tensor(1.0)
    )


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_flat_image_stays(kind: str) -> None:
    x = torch.full((2, 3, 8, 8), 0.7)
    torch.testing.assert_close(corrupt(x, kind, 5), x)
    assert corrupt(x[:0], kind, 5).shape == (0, 3, 8, 8)


def test_bad_arguments() -> None:
    x = images()
    for wrong in (x[0], x.to(torch.uint8), x.tolist()):
        with pytest.raises(ValueError, match="corruptions need images"):
            corrupt(wrong, "contrast", 1)
    with pytest.raises(ValueError, match="kind must be one of gaussian_noise"):
        corrupt(x, "fog", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match="severity must be an integer 1..5"):
            corrupt(x, "contrast", severity)


# --- Models on them ------------------------------------------------------------------------------


class Pictures(Task):
    """Images whose class is a quadrant of the mean of the first two channels."""

    name = "pictures"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 4))
        return net.eval()

    def calibration(self, samples: int = 16, seed: int = 0) -> list[Any]:
        return list(self.validation(samples))

    def validation(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        x = images(count=48)[:limit]
        reference = self.model()
        with torch.no_grad():
            targets = reference(x).argmax(1)  # so that the float model is right on clean images
        yield from zip(x.split(20), targets.split(20), strict=True)

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter()


def models() -> dict[str, nn.Module]:
    """A model, and the same with a little noise on its weights."""
    exact, worse = Pictures().model(), Pictures().model()
    with torch.no_grad():
        worse[3].weight.add_(0.01 * torch.randn_like(worse[3].weight))
    return {"float": exact, "packed": worse}


def test_rows() -> None:
    task, both = Pictures(), models()
    rows = robustness(task, both, severities=(1, 5))
    assert [(row["corruption"], row["severity"]) for row in rows] == [
        ("clean", 0),
        *((kind, severity) for kind in CORRUPTIONS for severity in (1, 5)),
        ("mean", None),
    ]
    clean = rows[0]["models"]
    assert clean["float"] == {"top1": 1.0, "drop": 0.0, "kl": 0.0, "agreement": 1.0}
    expected = task.evaluate(both["packed"], reference=both["float"])
    for key in ("top1", "kl", "agreement"):
        assert clean["packed"][key] == pytest.approx(expected[key])
    for row in rows:
        assert row["metric"] == "top1" and row["models"]["float"]["agreement"] == 1.0
        for name, values in row["models"].items():
            assert values["drop"] == pytest.approx(clean[name]["top1"] - values["top1"])
    worst = {row["corruption"]: row["models"]["float"]["drop"] for row in rows[1:-1]}
    assert max(worst.values()) > 0.02  # they do hurt
    mean = sum(row["models"]["packed"]["kl"] for row in rows[1:-1]) / 6
    assert rows[-1]["models"]["packed"]["kl"] == pytest.approx(mean)


def test_metrics_are_those_of_the_corrupted_task() -> None:
    task, both = Pictures(), models()
    rows = robustness(task, both, limit=30, severities=[3], seed=7)
    for row in rows[1:-1]:
        corrupted = Corrupted(task, row["corruption"], 3, seed=7)
        expected = corrupted.evaluate(both["packed"], limit=30, reference=both["float"])
        assert expected["samples"] == 30
        for key in ("top1", "kl", "agreement"):
            assert row["models"]["packed"][key] == pytest.approx(expected[key])


def test_rows_repeat_under_a_seed() -> None:
    task, both = Pictures(), models()
    both["packed"].train()
    first = robustness(task, both, severities=[2], seed=1)
    assert robustness(task, both, severities=[2], seed=1) == first
    other = robustness(task, both, severities=[2], seed=2)
    assert other != first and other[2:-1] == first[2:-1]  # only noise is drawn
    assert both["packed"].training and not both["float"].training


def test_images_are_numbered_over_batches() -> None:
    """Two equal images in different batches have different noise."""
    x = images(count=1)
    data = [(x, torch.zeros(1)), (x, torch.zeros(1))]
    task = UserTask("same", nn.Identity, lambda: data, validation=lambda: data)
    first, second = (x for x, _ in Corrupted(task, "gaussian_noise", 1).validation())
    assert not torch.equal(first, second)


def test_a_users_task_without_labels() -> None:
    """There is no accuracy to drop: outputs are compared with the float model's."""
    task = UserTask(
        "mine", nn.Identity, lambda: [images()], validation=lambda: [images()], regression=True
    )
    rows = robustness(task, models(), severities=[4])
    assert rows[0]["metric"] is None
    assert rows[0]["models"]["packed"].keys() == {"relative_error"}
    assert robustness_table(rows)[0] == ["", "severity", "packed relative error"]


def test_table() -> None:
    head, cells = robustness_table(robustness(Pictures(), models(), severities=[1]))
    assert head == [
        *("", "severity", "float top1", "packed top1", "float drop", "packed drop"),
        *("packed kl", "packed agreement"),
    ]
    assert [row[:2] for row in cells] == [
        ["clean", "-"],
        ["gaussian noise", "1"],
        ["gaussian blur", "1"],
        ["contrast", "1"],
        ["mean", "-"],
    ]
    assert cells[0][2] == "100.00 %" and cells[0][4] == "0.00 %"


def test_what_cannot_be_corrupted() -> None:
    tokens = [(torch.randint(0, 9, (4, 7)), torch.zeros(4))]
    named = [({"x": images()}, torch.zeros(4))]
    for data in (tokens, named):
        task = UserTask("words", nn.Identity, lambda: data, validation=lambda: data)  # noqa: B023
        with pytest.raises(ValueError, match="corruptions need images, float"):
            robustness(task, models())
    for severities in ((), (1, 6)):
        with pytest.raises(ValueError, match="severities must be integers 1..5"):
            robustness(Pictures(), models(), severities=severities)
    with pytest.raises(ValueError, match="models: expected"):
        robustness(Pictures(), {})
    blind = UserTask("blind", nn.Identity, lambda: [images()])
    with pytest.raises(ValueError, match="no validation"):
        robustness(blind, models())
