"""Packed embeddings: rows of codes, a scale and a zero-point each; a lookup unpacks the rows it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .quantizer import QParams, QuantSpec, check_bits, weight_bits
from .rounding import quantize_matrix

__all__ = ["QuantEmbedding", "names_sharing", "pack_embeddings"]


class QuantEmbedding(nn.Module):
    """Packed `nn.Embedding`.

    Buffers: `codes` uint8 [V, ceil(D * bits / 8)], `scale` float32 and `zero_point` int32 [V, 1]. What a
    lookup gives has the dtype of the float embedding, or what `.half()` and the like made of it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    like: Tensor

    def __init__(
        self, embedding: nn.Embedding, codes: Tensor, qparams: QParams, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx
        self.bits, self.scale_dtype = qparams.bits, qparams.scale_dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", qparams.scale)
        self.register_buffer("zero_point", qparams.zero_point)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, bits: int = 8, name: str = "embedding"
    ) -> QuantEmbedding:
        """Round each row to nearest, in the range with the least squared error.

        Args:
            embedding: float [V, D]; it stays as it is.
            bits: of a code, 2..8.
            name: for error messages.

        Raises:
            ValueError: bits out of range, or a weight that is not finite.
        """
        check_bits("embedding_bits", bits)
        matrix = embedding.weight.detach().float()
        rounded = quantize_matrix(matrix, QuantSpec(bits, rounding="nearest"), name)
        return cls(embedding, rounded.packed(), rounded.qparams, embedding.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of integer ids [...]: float [..., D]."""
        flat = ids.reshape(-1)
        codes = F.embedding(flat, self.codes)  # which refuses what are no ids, as nn.Embedding does
        rows = ops.dequantize_packed(
            codes, self.scale[flat], self.zero_point[flat], self.bits, self.embedding_dim
        )
        return rows.to(self.like.dtype).reshape(*ids.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """The float rows [V, D] (a new tensor at each access)."""
        return self.forward(torch.arange(self.num_embeddings, device=self.codes.device))

    @property
    def qparams(self) -> QParams:
        return QParams(self.scale, self.zero_point, self.bits, self.scale_dtype, False)

    def stored_bits(self) -> int:
        """Bits in the file: codes, scales and zero-points."""
        return weight_bits(self.num_embeddings, self.embedding_dim, self.qparams)

    def to_float(self) -> nn.Embedding:
        """The plain float embedding of the packed rows."""
        return nn.Embedding.from_pretrained(
            self.weight, freeze=True, padding_idx=self.padding_idx
        ).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantEmbedding:
        # .half() changes what a lookup gives, not what is stored.
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self


def pack_embeddings(
    model: nn.Module, bits: int | None, skipped: Callable[[str], bool] = lambda name: False
) -> dict[str, QuantEmbedding]:
    """The embeddings of a model, packed, by name; the model stays as it is.

    Left out are subclasses, which may use their rows in their own way, and those with a `max_norm`, which
    change them. Embeddings that share a weight become one.

    Args:
        bits: of a code; None: nothing is packed.
        skipped: whether the one of a name stays float.

    Raises:
        ValueError: a weight that is not finite.
    """
    if bits is None:
        return {}
    packed: dict[str, QuantEmbedding] = {}
    for name, module in model.named_modules():
        if (
            type(module) is nn.Embedding
            and name not in packed
            and module.max_norm is None
            and module.weight.is_floating_point()
            and module.weight.numel()
            and not skipped(name)
        ):
            found = QuantEmbedding.from_float(module, bits, name)
            packed |= dict.fromkeys(names_sharing(model, module), found)
    return packed


def names_sharing(model: nn.Module, embedding: nn.Embedding) -> list[str]:
    """The embeddings of a model that hold the same weight, itself among them."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Embedding and module.weight is embedding.weight
    ]
