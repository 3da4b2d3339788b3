"""Fixtures every test module may use, and the tolerances of float comparisons, derived once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Test processes side by side (pytest-xdist) share the processors.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
)
# Small operations on a busy machine: spinning OpenMP threads would cost several times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from cora import ops

LEVELS = ("scalar", "avx2", "avxvnni", "avx512", "amx")


def supported_levels() -> tuple[str, ...]:
    """The CPU levels of this machine, lowest first."""
    best = ops.isa()["level"]
    found = []
    for level in LEVELS[: LEVELS.index(best) + 1]:
        try:
            ops.set_isa(level)
        except RuntimeError:  # avxvnni is not below avx512 on every CPU
            continue
        found.append(level)
    ops.set_isa(best)
    return tuple(found)


SUPPORTED = supported_levels()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(1234)
    return 1234


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every CPU level; a level the machine lacks is a skip that says so."""
    if request.param not in SUPPORTED:
        pytest.skip(f"this CPU has no {request.param}")
    before = ops.isa()["level"]
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_product_close(
    actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, k: int
) -> None:
    """A sum of k products may differ by k * eps times the sum of the products' magnitudes.

    The bound of a worst-case float32 summation, doubled for the adapter's second product, plus half
    a unit of the output's own dtype.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    eps = torch.finfo(torch.float32).eps
    unit = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    bound = 2 * (k + 2) * eps * magnitude.double() + unit * expected.double().abs() + 1e-30
    error = (actual.double() - expected.double()).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"error is {worst:.3g} times its bound; largest {error.max().item():.3g}"
