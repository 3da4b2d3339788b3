"""Ranges of activations: from sampled values to a scale and a zero-point."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["ActivationRange", "activation_qparams"]

ActivationRange = Literal["minmax", "percentile", "mse"]

_PERCENTILE = 0.9999


def activation_qparams(
    sample: Tensor, low: float, high: float, bits: int, method: ActivationRange
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of an activation quantizer; its range always holds 0, the padding value.

    Args:
        sample: float32 [n], values of the activation.
        low, high: its extremes.
    """
    if method not in get_args(ActivationRange):
        expected = ", ".join(get_args(ActivationRange))
        raise ValueError(f"activation_range must be one of {expected}, got {method!r}")
    levels = 2**bits - 1
    if method == "percentile":
        ends = sample.new_tensor([1 - _PERCENTILE, _PERCENTILE])
        low, high = (float(v) for v in torch.quantile(sample, ends))
    low, high = min(low, 0.0), max(high, 0.0)

    def quantizer(share: float) -> tuple[Tensor, Tensor]:
        scale = torch.tensor([max(share * (high - low) / levels, 0.0)], dtype=torch.float32)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-share * low / scale).clamp(0, levels).to(torch.int32)
        return scale.to(sample.device), zero.to(sample.device)

    def error(share: float) -> float:
        scale, zero = quantizer(share)
        codes = (torch.round(sample / scale) + zero).clamp(0, levels)
        return float(((codes - zero) * scale - sample).square().sum())

    shares = [1.0 - 0.02 * i for i in range(46)] if method == "mse" else [1.0]
    return quantizer(min(shares, key=error))
