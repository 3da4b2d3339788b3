"""Multi-head attention as four linear layers, so that its weights can be quantized.

`nn.MultiheadAttention` hands its weights to a function, which layers that hold codes cannot take part in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import replace_layers

__all__ = ["SplitAttention", "linear", "split_attention"]


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` with its projections as layers: `q_proj`, `k_proj`, `v_proj`, `out_proj`.

    Takes and returns what the original does, and computes the same.
    """

    in_proj_bias = None  # what tells torch's TransformerEncoderLayer not to read the weights itself

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.add_zero_attn = attention.add_zero_attn
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        shared = attention.in_proj_bias
        biases = (None, None, None) if shared is None else shared.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal, got None")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, more.expand(len(x), 1, -1)], 1)
                for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        # With nothing else to hide torch believes the hint, and does not look at the mask.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores: float, broadcasts over [N, heads, L, S]."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _additive(attn_mask, q)
            if total.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None]
            total = padding if total is None else total + padding
        if total is not None and (more := k.shape[2] - total.shape[-1]):
            total = F.pad(total, (0, more))  # bias_k and the zeros are seen by all
        return total


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with copies of a weight [N, K] and a bias [N]."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def split_attention(model: nn.Module) -> Any:
    """Put a `SplitAttention` in the place of every `nn.MultiheadAttention` of a model (of that exact type).

    Returns:
        The model, changed in place, or the new module where the model is the attention itself.
    """
    found = {
        name: SplitAttention(module)
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
    }
    for module in model.modules():
        if found and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # those are for the function that reads the weights
    return replace_layers(model, found)
