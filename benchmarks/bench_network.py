"""Whole ResNets, every layer packed, against every peer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rows import Case, network_cases


@pytest.mark.parametrize("case", network_cases(), ids=str)
def bench_network(contest: Callable[[Case], None], case: Case) -> None:
    contest(case)
