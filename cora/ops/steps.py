"""Several steps in one call: what `cora.fuse` makes of neighbouring layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native

__all__ = ["LAYER", "MAX_POOL", "MEAN", "MEAN_PIXELS", "Numbers", "Step", "pack_steps", "run_steps"]

# Kinds: run_layer, max_pool2d_codes, mean_codes, mean_pixels.
LAYER, MAX_POOL, MEAN, MEAN_PIXELS = range(4)


class Step(NamedTuple):
    """A step and its operands; `Step` of csrc/ops/steps.cpp, field by field.

    Values are numbered: the call's inputs first, then what each step makes. One that dies is not read
    by a later step, nor an output.
    """

    kind: int
    x: int = 0
    x_dies: bool = False
    add: int = -1  # none
    add_dies: bool = False
    layer: int = 0  # which of the call's layers
    x_given: bool = True  # x_scale is not None
    x_zero_point: int = 0
    x_bits: int = 0
    x_halo: int = 0
    add_zero_point: int = 0
    add_halo: int = 0
    out_given: bool = False
    out_zero_point: int = 0
    out_halo: int = 0
    kernel_size: Sequence[int] = (1, 1)  # of a max pool, two numbers each
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    ceil_mode: bool = False


class Numbers(NamedTuple):
    """A step's operands that are no integers; `Numbers` of csrc/ops/steps.cpp."""

    x_scale: float = 1.0
    add_scale: float = 1.0
    clamp_min: float = -math.inf
    clamp_max: float = math.inf
    out_scale: float = 1.0


def pack_steps(steps: Sequence[tuple[Step, Numbers]]) -> tuple[Tensor, Tensor]:
    """The tables that :func:`run_steps` reads: int64 and float64, a row for each step."""
    rows = [
        [int(n) for field in step for n in (field if isinstance(field, Sequence) else (field,))]
        for step, _ in steps
    ]
    numbers = [list(numbers) for _, numbers in steps]
    return torch.tensor(rows), torch.tensor(numbers, dtype=torch.float64)


def run_steps(
    inputs: Sequence[Tensor],
    layers: Sequence[Tensor],
    program: Tensor,
    numbers: Tensor,
    outputs: Sequence[int],
) -> list[Tensor]:
    """Run layers and pools one after the other, CPU only; each does what the op it is named after does.

    A value that dies in an addition to codes may be overwritten by the result.

    Args:
        inputs: the values that are given.
        layers: from :func:`prepare_layer`.
        program, numbers: from :func:`pack_steps`.
        outputs: the numbers of the values to return.

    Raises:
        RuntimeError: tables that were not made for these operands, or a step's own error.
    """
    result: list[Tensor] = _native.ops.run_steps.default(inputs, layers, program, numbers, outputs)
    return result
