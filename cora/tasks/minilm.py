"""BERT's encoder as a sentence encoder, in plain torch; attribute names are the checkpoint's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SentenceEncoder"]

_EPSILON = 1e-12


class _Embeddings(nn.Module):
    def __init__(self, vocabulary: int, width: int, positions: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, input_ids: Tensor) -> Tensor:
        # A sentence is never part of a pair here: all tokens are of type 0.
        places = self.position_embeddings.weight[: input_ids.shape[1]]
        places = places + self.token_type_embeddings.weight[0]
        out: Tensor = self.LayerNorm(self.word_embeddings(input_ids) + places)
        return out


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        """[N, T, width] -> [N, heads, T, width / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (self._split(f(x)) for f in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class _AddNorm(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(x) + residual)
        return out


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": _SelfAttention(width, heads), "output": _AddNorm(width, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _AddNorm(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return out


class SentenceEncoder(nn.Module):
    """BERT (Devlin et al. 2018), its tokens' mean scaled to length 1; MiniLM-L6 by default.

    Maps token numbers and mask, int64 [N, T], to embeddings [N, width]. The mask is 1 where there is
    a token, 0 where the sentence has ended; what stands there changes nothing.

    Args:
        vocabulary: number of tokens.
        width: of the embeddings, a multiple of heads.
        layers, heads: of the encoder.
        hidden: width between the two linear layers that follow attention.
        positions: tokens of the longest sentence.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        width: int = 384,
        layers: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        positions: int = 512,
    ) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocabulary, width, positions)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(_Layer(width, heads, hidden) for _ in range(layers))}
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.encoder["layer"].children():
            x = layer(x, mask)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        # Never 0 tokens: a sentence of padding only is 0, not NaN.
        mean = (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return F.normalize(mean, dim=-1)
