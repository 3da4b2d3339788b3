"""Pages of text: rendered with known words, read by the whole OCR pipeline, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cora.tasks.boxes import Box, find_boxes, match_boxes
from cora.tasks.ocr_recognition import greedy_decode, to_input
from cora.tasks.text import FONTS, Grey, TextSource, load_font, require_renderer

try:
    from PIL import Image, ImageDraw
except ImportError:  # reported by require_renderer()
    Image = None  # type: ignore[assignment]

__all__ = ["Page", "draw_page", "page_input", "read_page", "render_page"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LINE_HEIGHT = 64


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
    require_renderer()
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
