"""Recurrent layers whose weight matrices are stored as codes, by rows.

torch's recurrent kernels want floats: a layer is small in the file and computes with float copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .quantizer import QParams, QuantSpec, check_bits, weight_bits
from .rounding import quantize_matrix

__all__ = [
    "QUANT_RECURRENT",
    "QuantGRU",
    "QuantLSTM",
    "QuantRNN",
    "QuantRecurrent",
    "pack_recurrent",
]


class QuantRecurrent(nn.RNNBase):
    """Base of the packed recurrent layers; each is also the torch layer that it stands for.

    Buffers, for each weight matrix NAME [R, K] of the layer: `NAME_codes` uint8 [R, ceil(K * bits / 8)],
    `NAME_scale` float32 and `NAME_zero_point` int32 [R, 1]; `NAME` itself, which is not part of the state, is
    what they stand for. Biases are parameters as ever.
    """

    float_type: ClassVar[type[nn.RNNBase]]
    bits: int
    scale_dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, layer: nn.RNNBase, bits: int, packed: dict[str, tuple[Tensor, QParams]]) -> Any:
        """A packed layer of codes and quantizers, by the name of the weight."""
        made: Any = cls.__new__(cls)
        made.__dict__.update(copy.deepcopy(layer).__dict__)
        made.bits, made.scale_dtypes = bits, {}
        for name, (codes, qparams) in packed.items():
            weight = made._parameters.pop(name)
            made.register_buffer(f"{name}_codes", codes)
            made.register_buffer(f"{name}_scale", qparams.scale)
            made.register_buffer(f"{name}_zero_point", qparams.zero_point)
            made.scale_dtypes[name] = qparams.scale_dtype
            made.register_buffer(name, weight.detach(), persistent=False)
        made.unpack()
        return made

    @classmethod
    def from_float(cls, layer: nn.RNNBase, bits: int = 8, name: str = "recurrent") -> Any:
        """Round each row of each weight to nearest, in the range with the least squared error.

        Args:
            layer: the float layer; it stays as it is.
            bits: of a code, 2..8.
            name: for error messages.

        Raises:
            TypeError: the layer is of another kind.
            ValueError: bits out of range, or a weight that is not finite.
        """
        if type(layer) is not cls.float_type:
            raise TypeError(f"{cls.__name__}.from_float: got a layer of {type(layer).__name__}")
        check_bits("recurrent_bits", bits)
        spec = QuantSpec(bits, rounding="nearest")
        packed = {}
        for key in matrices_of(layer):
            matrix = layer.get_parameter(key).detach().float()
            rounded = quantize_matrix(matrix, spec, f"{name}.{key}" if name else key)
            packed[key] = rounded.packed(), rounded.qparams
        return cls.of(layer, bits, packed)

    def unpack(self) -> None:
        """Bring the float copies up to date with the codes."""
        for name in self.scale_dtypes:
            old = self._buffers[name]
            assert old is not None
            codes, qparams = self.packed(name)
            if codes.is_meta:
                continue
            scale, zero = qparams.scale, qparams.zero_point
            floats = ops.dequantize_packed(codes, scale, zero, self.bits, old.shape[1])
            setattr(self, name, floats.to(old.dtype))  # torch's own list of weights follows

    def packed(self, name: str) -> tuple[Tensor, QParams]:
        """Codes and quantizer of one weight."""
        codes, scale, zero = (
            self.get_buffer(f"{name}_{part}") for part in ("codes", "scale", "zero_point")
        )
        return codes, QParams(scale, zero, self.bits, self.scale_dtypes[name], False)

    def stored_bits(self, name: str) -> int:
        """Bits of one weight in the file."""
        rows, columns = self.get_buffer(name).shape
        return weight_bits(rows, columns, self.packed(name)[1])

    def to_float(self) -> nn.RNNBase:
        """The plain float layer of the packed weights."""
        made: Any = self.float_type.__new__(self.float_type)
        made.__dict__.update(copy.deepcopy(self).__dict__)
        for name in made.__dict__.pop("scale_dtypes"):
            for part in ("codes", "scale", "zero_point"):
                del made._buffers[f"{name}_{part}"]
            weight = made._buffers.pop(name)
            made._non_persistent_buffers_set.discard(name)
            made.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            setattr(made, name, made._parameters[name])
        return made

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.unpack()

    def _apply(self, fn: Any, recurse: bool = True) -> QuantRecurrent:
        # .half() changes what is computed with, not what is stored.
        scales = {name: self.get_buffer(f"{name}_scale") for name in self.scale_dtypes}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            setattr(self, f"{name}_scale", scale.to(self.get_buffer(name).device))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantRNN(QuantRecurrent, nn.RNN):
    """Packed `nn.RNN`."""

    float_type = nn.RNN


class QuantLSTM(QuantRecurrent, nn.LSTM):
    """Packed `nn.LSTM`."""

    float_type = nn.LSTM


class QuantGRU(QuantRecurrent, nn.GRU):
    """Packed `nn.GRU`."""

    float_type = nn.GRU


QUANT_RECURRENT: dict[type[nn.RNNBase], type[QuantRecurrent]] = {
    cls.float_type: cls for cls in (QuantRNN, QuantLSTM, QuantGRU)
}


def matrices_of(layer: nn.RNNBase) -> list[str]:
    """The names of a recurrent layer's weight matrices."""
    return [name for name, p in layer.named_parameters(recurse=False) if p.dim() == 2]


def pack_recurrent(
    model: nn.Module, bits: int | None, skipped: Callable[[str], bool] = lambda name: False
) -> dict[str, QuantRecurrent]:
    """The recurrent layers of a model, packed, by name; the model stays as it is. Subclasses are left out.

    Args:
        bits: of a code; None: nothing is packed.
        skipped: whether the one of a name stays float.

    Raises:
        ValueError: a weight that is not finite.
    """
    if bits is None:
        return {}
    return {
        name: QUANT_RECURRENT[type(module)].from_float(module, bits, name)
        for name, module in model.named_modules()
        if type(module) in QUANT_RECURRENT and not skipped(name)
    }
