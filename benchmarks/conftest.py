"""What every benchmark shares: threads, the machine line, and work per second beside the time.

pytest benchmarks --threads 2                       # all; groups compare cora with its peers
pytest benchmarks/bench_conv2d.py -k 64@56          # one layer
pytest benchmarks --benchmark-json out.json         # keep
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cora import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.addoption("--isa", default=None, help="CPU level: scalar, avx2 or avx512")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--isa"):
        ops.set_isa(config.getoption("--isa"))


def pytest_report_header(config: pytest.Config) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in cpuinfo.read_text().splitlines()
        if "model name" in line
    ]
    cpu = names[0] if names else platform.processor()
    level, threads = ops.isa()["level"], torch.get_num_threads()
    return f"{cpu}, {threads} threads, level {level}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(group, run, flop=..., bytes=...): times run() and notes GFLOP/s and GB/s of the
    median."""

    def measured(
        group: str, run: Callable[[], object], *, flop: float = 0, bytes: float = 0
    ) -> None:
        benchmark.group = group
        benchmark.pedantic(run, rounds=30, iterations=1, warmup_rounds=5)
        if not benchmark.stats:
            return
        seconds = benchmark.stats.stats.median
        if flop:
            benchmark.extra_info["gflops"] = round(flop / seconds / 1e9, 1)
        if bytes:
            benchmark.extra_info["gbs"] = round(bytes / seconds / 1e9, 1)

    return measured
