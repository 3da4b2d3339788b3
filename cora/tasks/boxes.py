"""Word boxes: found in a detector's score maps, and matched with the true ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "connected_components", "find_boxes", "match_boxes"]

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""


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
