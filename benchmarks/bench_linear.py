"""Linear layers at 4, 3 and 2 bits with an adapter of rank 32, against every peer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rows import Case, linear_cases


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def bench_linear(contest: Callable[[Case], None], case: Case) -> None:
    contest(case)
