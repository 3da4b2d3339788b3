"""Comparison rows as text: one place that says how a metric is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["comparison_table", "format_metric", "kib", "metrics_of", "text_table"]

_PERCENT = frozenset(
    {
        *("word_accuracy", "char_accuracy", "top1", "top5", "f1", "precision", "recall"),
        *("sentiment", "retrieval", "agreement"),
    }
)
_ORDER = (
    *("word_accuracy", "char_accuracy", "top1", "top5", "f1", "precision", "recall"),
    *("sentiment", "retrieval"),
    *("kl", "similarity", "relative_error", "agreement"),
)
_NOT_METRICS = frozenset({"row", "bits_per_weight", "total_bits", "samples", "seconds"})


def format_metric(name: str, value: Any) -> str:
    """A metric as text: shares in percent, others with four digits, "-" if there is none."""
    if not isinstance(value, (int, float)):
        return "-"
    return f"{100 * value:.2f} %" if name in _PERCENT else f"{value:.4g}"


def kib(bits: float) -> str:
    """Bits as KiB, e.g. "1,234.5"."""
    return f"{bits / 8192:,.1f}"


def metrics_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics in comparison rows: unknown ones first, accuracies, then nearness to float."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(key for key in row if key not in _NOT_METRICS))
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else -1)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the rows that `cora.compare` returns."""
    metrics = metrics_of(rows)
    head = ["", "bits/weight", "KiB", *[name.replace("_", " ") for name in metrics]]
    cells = [
        [
            str(row["row"]),
            f"{row['bits_per_weight']:.2f}",
            kib(row["total_bits"]),
            *[format_metric(name, row.get(name)) for name in metrics],
        ]
        for row in rows
    ]
    return head, cells


def text_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *cells]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
