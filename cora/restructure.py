"""Linear layers in other clothes become plain ones, so that they can be quantized.

`nn.MultiheadAttention` hands its weights to a function; the `Conv1D` of GPT-2 and its kin in the transformers
library is a linear layer that keeps its weight transposed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention import linear, split_attention
from .modules import replace_layers

__all__ = ["hides_layers", "restructure"]


def _is_conv1d(module: nn.Module) -> bool:
    """By name, so that transformers need not be installed."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def hides_layers(model: nn.Module) -> bool:
    """Whether `restructure` finds something to change."""
    return any(type(m) is nn.MultiheadAttention or _is_conv1d(m) for m in model.modules())


def restructure(model: nn.Module) -> Any:
    """Give a model linear layers where it hides them; it computes the same.

    Returns:
        The model, changed in place, or the new module where the model itself is such a layer.
    """
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if _is_conv1d(m)}
    plain = {
        n: linear(m.weight.mT.contiguous(), m.bias).train(m.training) for n, m in found.items()
    }
    return split_attention(replace_layers(model, plain))
