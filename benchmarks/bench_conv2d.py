"""Convolutions at 4 bits with adapters, codes or floats in and out, against every peer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rows import Case, conv_cases


@pytest.mark.parametrize("case", conv_cases(), ids=str)
def bench_conv2d(contest: Callable[[Case], None], case: Case) -> None:
    contest(case)
