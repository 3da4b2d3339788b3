"""What every benchmark shares: threads, the machine line, contestants in turns.

pytest benchmarks --threads 2                       # all; extra_info compares cora with its peers
pytest benchmarks/bench_conv2d.py -k 64@56          # one layer
pytest benchmarks --benchmark-json out.json         # keep

`python benchmarks/performance.py` times the same cases and writes docs/performance.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in performance.py, before torch is loaded
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest
import timing
import torch
from machine import describe, peaks
from rows import Case

from cora import ops

ROUNDS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads")
    parser.addoption("--isa", default=None, help="CPU level: scalar, avx2, avxvnni, avx512 or amx")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--isa"):
        ops.set_isa(config.getoption("--isa"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"{describe()}, {config.getoption('--threads')} threads"


@pytest.fixture(autouse=True)
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode(), timing.threads(request.config.getoption("--threads")):
        yield


@pytest.fixture(scope="session")
def float_peak(request: pytest.FixtureRequest) -> float:
    """Float32 FMA, GFLOP/s; 0 where it cannot be measured."""
    threads = request.config.getoption("--threads")
    return peaks([threads], 64).get(str(threads), {}).get("f32", 0)


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(group, run, flop=..., bytes=...): times run() and notes GFLOP/s and GB/s of the
    median; of GFLOP/s also the share of `peak`."""

    def measured(
        group: str,
        run: Callable[[], object],
        *,
        flop: float = 0,
        bytes: float = 0,
        peak: float = 0,
        rounds: int = 30,
    ) -> None:
        benchmark.group = group
        benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=rounds // 6)
        if not benchmark.stats:
            return
        seconds = benchmark.stats.stats.median
        if flop:
            benchmark.extra_info["gflops"] = round(flop / seconds / 1e9, 1)
        if peak:
            benchmark.extra_info["of peak"] = f"{flop / seconds / 1e7 / peak:.0f} %"
        if bytes:
            benchmark.extra_info["gbs"] = round(bytes / seconds / 1e9, 1)

    return measured


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """contest(case): cora's first contestant is what pytest-benchmark times; before each of its rounds
    every other one has a turn. Their medians (us), and the absent ones' reasons, are in extra_info."""

    def run(case: Case) -> None:
        made = case.build(request.config.getoption("--threads"))
        first, *others = made.calls
        times: dict[str, list[float]] = {name: [] for name in others}
        spoiler = torch.ones(timing.FLUSH_BYTES // 4) if case.flush else None

        def turn(name: str) -> None:
            if spoiler is not None:
                spoiler.sum()
            if not case.once:
                made.calls[name]()

        def before() -> None:
            for name in others:
                turn(name)
                start = time.perf_counter()
                result = made.calls[name]()
                spent = time.perf_counter() - start
                times[name].append(result if isinstance(result, timing.Seconds) else spent)
            turn(first)

        benchmark.group = str(case)
        rounds = 1 if case.once else ROUNDS
        benchmark.pedantic(made.calls[first], setup=before, rounds=rounds)
        if not benchmark.stats:
            return
        own = benchmark.stats.stats.median
        benchmark.extra_info["contestant"] = first
        for name, seconds in times.items():
            median = timing.Times(tuple(seconds)).median
            benchmark.extra_info[name] = f"{1e6 * median:.1f} us, {median / own:.2f}x"
        for name, reason in made.absent.items():
            benchmark.extra_info[name] = f"absent: {reason}"

    return run
