"""Tasks on real weights and data; each test skips where its data is absent, and says what is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cora.tasks import Task, available_tasks, resolve_task
from cora.tasks.imagenet import Imagenet
from cora.tasks.ocr_detection import OcrDetection
from cora.tasks.ocr_recognition import OcrRecognition
from cora.tasks.pages import draw_page, read_page

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = os.environ.get("CORA_DATA") or (str(_BESIDE) if _BESIDE.is_dir() else None)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """The LSTM's many small steps crawl when threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ready(task: Task) -> Task:
    missing = task.missing()
    if missing is not None:
        pytest.skip(missing)
    return task


@pytest.mark.parametrize(("name", "top1"), [("cifar10-resnet20", 0.81), ("cifar10-resnet32", 0.82)])
def test_cifar10(name: str, top1: float) -> None:
    task = ready(resolve_task(name, DATA))
    model = task.model()
    reference = task.outputs(model, limit=1000)
    result = task.evaluate(model, limit=1000, reference=reference)
    assert result["top1"] >= top1 - 0.03
    assert (result["kl"], result["agreement"], result["samples"]) == (0.0, 1.0, 1000.0)
    batches = task.calibration(samples=100, seed=3)
    assert sum(len(x) for x, _ in batches) == 100
    assert torch.equal(batches[0][0], task.calibration(samples=100, seed=3)[0][0])
    assert task.label_loss(model(batches[0][0]), batches[0][1]) < 0.6


def test_recognition() -> None:
    task = ready(OcrRecognition(DATA))
    model = task.model()
    result = task.evaluate(model, limit=300)
    assert result["word_accuracy"] >= 0.8 and result["char_accuracy"] >= 0.93
    inputs, targets = task.calibration(32)[0]
    assert task.label_loss(model(inputs), targets) < 1.0


def test_detection_and_the_pipeline() -> None:
    task = ready(OcrDetection(DATA))
    detector = task.model()
    result = task.evaluate(detector, limit=3, reference=detector)
    assert result["f1"] >= 0.9 and result["relative_error"] == 0.0
    page = task.page("validation", 0, 1)
    read = read_page(detector, ready(OcrRecognition(DATA)).model(), page.image)
    right = {text for _, text in read} & set(page.texts)
    assert len(right) >= 0.6 * len(set(page.texts))
    assert draw_page(page.image, read, page).size == (768, 512)


def test_imagenet() -> None:
    task = ready(Imagenet(data=DATA))
    assert isinstance(task, Imagenet)
    model = task.model()
    result = task.evaluate(model, limit=96)
    assert result["top1"] >= 0.8 and result["top5"] >= 0.9
    calibration, validation = task.items()
    assert not {path for path, _ in calibration} & {path for path, _ in validation}
    some = len(calibration)
    if some <= 300:
        batches = task.calibration(some + 4)
        assert sum(len(x) for x, _ in batches) == some + 4


def test_fashion_mnist() -> None:
    task = ready(resolve_task("fashion-mnist", DATA))
    assert task.evaluate(task.model(), limit=2000)["top1"] >= 0.9


def test_what_is_available_has_nothing_missing() -> None:
    for status in available_tasks(DATA):
        assert status.description and (status.missing is None or "not found" in status.missing)
