"""Packed layers have no gradient, and say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["NoGradient", "no_gradient"]

_NO_GRADIENT = (
    "cora::{op}: packed layers have no gradient: train the float model, or its merged copy from "
    "cora.dequantize()"
)


def no_gradient(op: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(_NO_GRADIENT.format(op=op))

    torch.library.register_autograd(f"cora::{op}", backward)


class NoGradient(torch.autograd.Function):
    """The identity; its gradient refuses. A registered one would cost each call 8 us."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(_NO_GRADIENT.format(op="run_layer"))
