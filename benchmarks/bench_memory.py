"""Peak memory of the packed ResNet-50 process (not a time: the packed process's run is what is timed)."""

from __future__ import annotations

from typing import Any

from memory import measure


def bench_memory(benchmark: Any) -> None:
    benchmark.group = "memory"
    benchmark.extra_info.update(benchmark.pedantic(measure, rounds=1))
