"""Medians of calls that run in turns, so that all see the same machine."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

FLUSH_BYTES = 512 << 20


class Seconds(float):
    """What a call returns when it knows its own time better than a clock around it does."""


@dataclass(frozen=True)
class Times:
    """Seconds of every timed call of one contestant, and its number of calls a turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2]

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        ordered = sorted(self.seconds)
        return (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / self.median


def in_turns(
    calls: Mapping[str, Call],
    seconds: float = 1.0,
    *,
    flush: bool = False,
    calls_a_turn: int | None = None,
    least: int = 5,
) -> dict[str, Times]:
    """Time each call in turns.

    In another order each time: a contestant that always came after the same other one would pay for the
    threads that this leaves spinning. A turn is a pause, in which most threads of the one before stop,
    one call that is not timed, and timed calls for some milliseconds.

    Args:
        calls: name -> what to time.
        seconds: spent on each, about; and `least` turns.
        flush: read half a gibibyte before each turn, so that no weight is left in a cache.
        calls_a_turn: timed calls a turn; None: as many as fit into 10 ms, 1 to 20.
        least: turns.
    """
    spoiler = torch.ones(FLUSH_BYTES // 4) if flush else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    count: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        count[name] = calls_a_turn or max(1, min(20, int(0.010 / max(once, 1e-6))))
    end = time.perf_counter() + seconds * len(calls)
    turns = 0
    while turns < least or time.perf_counter() < end:
        for name, call in shuffle.sample(list(calls.items()), len(calls)):
            if spoiler is not None:
                spoiler.sum()
            time.sleep(0.002)
            call()
            samples = times[name]
            for _ in range(count[name]):
                start = time.perf_counter()
                result = call()
                spent = time.perf_counter() - start
                samples.append(result if isinstance(result, Seconds) else spent)
        turns += 1
    return {name: Times(tuple(values)) for name, values in times.items()}


class Others:
    """How many cores everything outside of this process kept busy since the start (Linux; else 0)."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return 0.0, 0.0, time.perf_counter()
        user, nice, system, _, _, irq, softirq, steal, *_ = (float(w) for w in words)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.perf_counter()

    def cores(self) -> float:
        busy, own, now = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return max(0.0, busy - own) / now


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads in torch and in every library that uses OpenMP."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        try:
            from threadpoolctl import threadpool_limits
        except ImportError:
            yield
        else:
            with threadpool_limits(count, user_api="openmp"):
                torch.set_num_threads(count)
                yield
    finally:
        torch.set_num_threads(before)
