"""Scored film reviews and editorials: what vaderSentiment's source package carries."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cora.tasks.data import Source

__all__ = ["HINT", "NONE", "SNIPPETS", "Texts", "read_snippets", "read_texts"]

SNIPPETS = Source(
    what="scored film reviews and editorials (vaderSentiment's source package)",
    names=("text/vaderSentiment-0.5.zip", "vaderSentiment-0.5.zip"),
)
HINT = "get it with: pip download --no-deps --no-binary :all: -d DIR vaderSentiment==0.5"
NONE = -1
"""In `Texts.targets`: there is none."""

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)
_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts and what is known of each.

    Args:
        texts: sentences, or halves of editorials.
        targets: int64 [texts, 2]: sentiment (1 good, 0 bad), and the number of the editorial that the
            text is a half of; -1 where there is none.
    """

    texts: list[str]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Texts) -> Texts:
        return Texts(self.texts + other.texts, torch.cat([self.targets, other.targets]))

    def pick(self, index: Sequence[int]) -> Texts:
        return Texts([self.texts[i] for i in index], self.targets[list(index)])


def read_snippets(path: str | os.PathLike[str], kind: str) -> list[tuple[str, float, str]]:
    """Snippets of text with their mean score.

    Args:
        path: of vaderSentiment-0.5.zip.
        kind: ``"movieReview"`` or ``"nytEditorial"``.

    Returns:
        (name, score in [-4, 4], text) of each; an editorial's names are "EDITORIAL_SNIPPET".

    Raises:
        ValueError: it is another file, or a damaged one.
    """
    inside = f"hutto_ICWSM_2014/{kind}Snippets_GroundTruth.txt"
    try:
        with zipfile.ZipFile(path) as package:
            archive = io.BytesIO(package.read(_ARCHIVE))
        with tarfile.open(fileobj=archive) as files:
            content = files.extractfile(inside)
            lines = content.read().decode("utf-8-sig").split("\n") if content else []
        rows = [line.strip("\r").split("\t") for line in lines if line]
        return [(name, float(score), text.strip()) for name, score, text in rows]
    except (*_DAMAGE, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected {_ARCHIVE} with {inside} in it: {error}") from error


def read_texts(path: str | os.PathLike[str], split: str) -> tuple[Texts, Texts]:
    """The texts of a split: a fifth of the sentences and half of the editorials are for validation.

    The text itself decides, so none is in both splits.

    Args:
        path: of vaderSentiment-0.5.zip.
        split: ``"calibration"`` or ``"validation"``.

    Returns:
        Sentences of film reviews; halves of editorials, the two of an editorial beside each other.
    """
    if split not in ("calibration", "validation"):
        raise ValueError(f"split: expected 'calibration' or 'validation', got {split!r}")
    held_out = split == "validation"
    scored = {
        text: int(score > 0)
        for _, score, text in read_snippets(path, "movieReview")
        if score != 0 and (_draw(text) < 0.2) == held_out
    }
    editorials: dict[str, list[str]] = {}
    for name, _, text in read_snippets(path, "nytEditorial"):
        editorials.setdefault(name.split("_")[0], []).append(text)
    # Every second sentence, and those between them: both halves are about the whole.
    halves = [
        " ".join(editorial[start::2])
        for editorial in editorials.values()
        if len(editorial) >= 4 and (_draw(" ".join(editorial)) < 0.5) == held_out
        for start in (0, 1)
    ]
    sentiment = torch.full((len(scored), 2), NONE)
    sentiment[:, 0] = torch.tensor(list(scored.values()), dtype=torch.int64)
    number = torch.full((len(halves), 2), NONE)
    number[:, 1] = torch.arange(len(halves)) // 2
    return Texts(list(scored), sentiment), Texts(halves, number)


def _draw(text: str) -> float:
    """A number in [0, 1) that the text decides, whatever its case."""
    return zlib.crc32(text.lower().encode()) / 2**32
