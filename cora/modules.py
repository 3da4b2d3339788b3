"""Packed layers: what a quantized model is made of, and what runs it.

A layer kind is one class below with its `forward`, entered in `QUANT_LAYERS`. Linear and 1-d and 2-d
convolutions run fused on the packed weight; 3-d and transposed ones unpack it for the call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .lowrank import (
    Adapter,
    FloatLayer,
    LayerShape,
    factors,
    fold,
    quantize_adapter,
    rank_bits,
    truncate,
    unfold,
)
from .quantizer import QParams, QuantSpec, check_bits, weight_bits
from .rounding import Feedback, quantize_matrix

__all__ = [
    "QUANT_LAYERS",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantLayer",
    "QuantLinear",
    "QuantWeight",
    "copied",
    "fake_quantize_dynamic",
    "quantize_weight",
    "replace_layers",
]


_Ints = tuple[int, ...]
_KernelGeometry = tuple[int, _Ints, _Ints, _Ints, _Ints, int]


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A quantized weight and its adapter, as stored.

    Args:
        codes: packed uint8 [N, ceil(K * bits / 8)].
        qparams: scale, zero-point and bits.
        adapter: the low-rank term, rank 0 if there is none.
        shape: the weight as a matrix.
    """

    codes: Tensor
    qparams: QParams
    adapter: Adapter
    shape: LayerShape

    def dequantized(self) -> Tensor:
        """The weight without its adapter, float32 [N, K]."""
        p = self.qparams
        return ops.dequantize_packed(self.codes, p.scale, p.zero_point, p.bits, self.shape.columns)

    def stored_bits(self) -> dict[str, int]:
        """Bits in the file: the packed weight with its scales and zero-points, and the adapter."""
        return {
            "weight": weight_bits(self.shape.rows, self.shape.columns, self.qparams),
            "adapter": self.adapter.rank * rank_bits(self.shape, self.adapter.bits),
        }


def quantize_weight(
    matrix: Tensor,
    shape: LayerShape,
    spec: QuantSpec,
    rank: int = 0,
    adapter_bits: int = 8,
    moment: Tensor | None = None,
    layer: str = "weight",
) -> QuantWeight:
    """Quantize a weight matrix and fit an adapter of `rank` to the residual.

    Args:
        matrix: float32 [N, K].
        moment: regularised second moment of the layer's input [groups or 1, K, K], or None.

    Raises:
        ValueError: non-finite weight, rank above `shape.full_rank`, group_size that does not divide K.
    """
    if not 0 <= rank <= shape.full_rank:
        raise ValueError(f"{layer}: rank must be 0..{shape.full_rank}, got {rank}")
    feedback = None if moment is None else Feedback.of(moment)
    rounded = quantize_matrix(matrix, spec, layer, feedback)
    a = matrix.new_zeros(0, shape.columns)
    b = matrix.new_zeros(shape.rows, 0)
    if rank:
        full_a, full_b, _ = factors(matrix - rounded.dequantized, shape.groups, moment)
        a, b = truncate(full_a, full_b, rank, shape.groups)
    adapter = quantize_adapter(a, b, adapter_bits, shape.groups)
    return QuantWeight(rounded.packed(), rounded.qparams, adapter, shape)


def fake_quantize_dynamic(x: Tensor, bits: int) -> Tensor:
    """Fake-quantize each slice x[i] by its own range, widened to hold 0.

    Args:
        x: float [n, ...].
    """
    flat = x.detach().reshape(x.shape[0], -1).float()
    low, high = flat.amin(1, keepdim=True).clamp(max=0), flat.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ops.fake_quantize(x, scale, torch.round(-low / scale).to(torch.int32), bits)


class QuantLayer(nn.Module):
    """Base of the packed layers: holds the packed weight, its adapter and the activation quantizer.

    Buffers: `codes` uint8, `scale` float32, `zero_point` int32, `adapter_a`, `adapter_b` and
    `adapter_scale` (None unless the adapter is integer), `bias`, `x_scale`, `x_zero_point` (None
    unless activations are quantized with a static range), `y_scale`, `y_zero_point` (the same of its
    output, for what hands it on as codes). `prepared`, which is not part of the state,
    is the same in the order the kernels read it; `prepare()` makes it anew after a buffer was changed
    in place.
    """

    float_type: ClassVar[type[nn.Module]]
    _geometry: ClassVar[tuple[str, ...]] = ()

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    adapter_a: Tensor
    adapter_b: Tensor
    adapter_scale: Tensor | None
    bias: Tensor | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None
    y_scale: Tensor | None
    y_zero_point: Tensor | None
    prepared: Tensor | None

    def __init__(
        self, layer: FloatLayer, weight: QuantWeight, activation_bits: int | None = None
    ) -> None:
        super().__init__()
        for name in self._geometry:
            setattr(self, name, getattr(layer, name))
        self.shape = weight.shape
        self.weight_shape: torch.Size = layer.weight.shape
        self.bits = weight.qparams.bits
        self.scale_dtype = weight.qparams.scale_dtype
        self.symmetric = weight.qparams.symmetric
        self.adapter_bits = weight.adapter.bits
        self.rank = weight.adapter.rank
        self.activation_bits = activation_bits
        self.float_bias = layer.bias is not None  # the model's own; a folded batch norm brings one
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.qparams.scale)
        self.register_buffer("zero_point", weight.qparams.zero_point)
        has_adapter = self.rank > 0
        self.register_buffer("adapter_a", weight.adapter.a if has_adapter else None)
        self.register_buffer("adapter_b", weight.adapter.b if has_adapter else None)
        self.register_buffer("adapter_scale", weight.adapter.scale if has_adapter else None)
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        self.register_buffer("bias", bias)
        self.register_buffer("x_scale", None)
        self.register_buffer("x_zero_point", None)
        self.register_buffer("y_scale", None)
        self.register_buffer("y_zero_point", None)
        self.register_buffer("prepared", None, persistent=False)
        self.prepare()

    @classmethod
    def from_float(
        cls,
        layer: FloatLayer,
        spec: QuantSpec | None = None,
        rank: int = 8,
        activation_bits: int | None = None,
        *,
        adapter_bits: int = 8,
        moment: Tensor | None = None,
    ) -> QuantLayer:
        """A packed layer from a float one, which stays as it is.

        Args:
            layer: the float layer.
            spec: weight quantizer, `QuantSpec()` by default.
            rank: rank of the adapter a group; at most min(Cout / groups, Cin/groups * kernel).
            activation_bits: quantize inputs too, with a range taken from each call (dynamic).
            adapter_bits: 2..8, 16 or 32.
            moment: second moment of the layer's input [groups or 1, K, K], to weight the fit by.

        Raises:
            TypeError: the layer is of another kind.
            ValueError: a weight that is not finite, a rank or a number of bits out of range.
        """
        if not isinstance(layer, cls.float_type):
            raise TypeError(
                f"{cls.__name__}.from_float: layer must be {cls.float_type.__name__}, "
                f"got {type(layer).__name__}"
            )
        check_bits("activation_bits", activation_bits)
        shape = LayerShape.of(layer)
        transposed = getattr(layer, "transposed", False)
        matrix = unfold(layer.get_parameter("weight").detach().float(), transposed, shape.groups)
        weight = quantize_weight(
            matrix, shape, spec or QuantSpec(), rank, adapter_bits, moment, cls.float_type.__name__
        )
        return cls(layer, weight, activation_bits)

    def set_activation_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Fix the input's quantizer by a scale and a zero-point of one element each."""
        self.x_scale = scale.reshape(1).float()
        self.x_zero_point = zero_point.reshape(1).to(torch.int32)
        self._read_range()

    def set_output_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Say what the output's codes would be; the layer itself gives floats."""
        self.y_scale = scale.reshape(1).float()
        self.y_zero_point = zero_point.reshape(1).to(torch.int32)

    def set_bias(self, bias: Tensor | None) -> None:
        """Replace the bias, float32 [N]."""
        self.bias = bias
        self.prepare()

    def prepare(self) -> None:
        """Bring `prepared` up to date with the buffers."""
        self._read_range()
        if any(buffer.is_meta for buffer in self.buffers()):
            return
        if (geometry := self._kernel_geometry()) is None:
            return
        channels, kernel, stride, padding, dilation, groups = geometry
        self.prepared = ops.prepare_layer(
            self.codes,
            self.scale,
            self.zero_point,
            self.bits,
            channels,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            self.adapter_a,
            self.adapter_b,
            self.adapter_scale,
            self.bias,
        )
        self.geometry = ops.layer_geometry(
            self.codes,
            self.scale,
            self.bits,
            channels,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            self.adapter_b,
            self.bias is not None,
        )

    def _read_range(self) -> None:
        """The input's quantizer as numbers, which a call takes."""
        self._range: tuple[float | None, int] = (None, 0)
        scale, zero_point = self.x_scale, self.x_zero_point
        if (
            scale is not None
            and zero_point is not None
            and not (scale.is_meta or zero_point.is_meta)
        ):
            self._range = (float(scale), int(zero_point))

    def _kernel_geometry(self) -> _KernelGeometry | None:
        """(channels, kernel, stride, padding, dilation, groups) of the kernel that runs this layer:
        kernel () for a linear one; None if it runs on an unpacked weight."""
        return None

    def run(self, x: Tensor) -> Tensor:
        """The layer on an input that needs no more padding than the kernel does."""
        scale, zero_point = self._range
        assert self.prepared is not None
        return ops.run_layer(
            x, self.prepared, self.geometry, scale, zero_point, self.activation_bits or 0
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.symmetric and not self.zero_point.is_meta:  # the state may be another layer's
            self.symmetric = bool((self.zero_point == 2 ** (self.bits - 1)).all())
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "prepared": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare()

    def packed_weight(self) -> QuantWeight:
        """The packed weight and adapter this layer holds."""
        qparams = QParams(self.scale, self.zero_point, self.bits, self.scale_dtype, self.symmetric)
        if self.rank:
            adapter = Adapter(self.adapter_a, self.adapter_b, self.adapter_scale, self.adapter_bits)
        else:
            adapter = Adapter(
                self.scale.new_zeros(0, self.shape.columns),
                self.scale.new_zeros(self.shape.rows, 0),
                None,
                self.adapter_bits,
            )
        return QuantWeight(self.codes, qparams, adapter, self.shape)

    def matrix(self) -> Tensor:
        """The effective weight, dequantized plus adapter, float32 [N, K]."""
        packed = self.packed_weight()
        dequantized = packed.dequantized()
        return dequantized + packed.adapter.matrix() if self.rank else dequantized

    @property
    def weight(self) -> Tensor:
        """The effective float weight in the float layer's shape (a new tensor at each access)."""
        transposed = getattr(self, "transposed", False)
        return fold(self.matrix(), self.weight_shape, transposed, self.shape.groups)

    def stored_bits(self) -> dict[str, int]:
        """Bits in the file by part: weight, adapter, bias, activation range."""
        bits = self.packed_weight().stored_bits()
        bits["bias"] = 0 if self.bias is None else 32 * self.bias.numel()
        bits["activation"] = sum(64 for scale in (self.x_scale, self.y_scale) if scale is not None)
        return bits

    def to_float(self) -> nn.Module:
        """The plain float layer with weight and adapter merged (activations are not quantized)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        activation = f", activation_bits={self.activation_bits}" if self.activation_bits else ""
        return (
            f"{list(self.weight_shape)}, bits={self.bits}, rank={self.rank}, "
            f"adapter_bits={self.adapter_bits}, bias={self.bias is not None}{activation}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLayer:
        # .half() and .bfloat16() change the activations, not what is stored: integers, float32
        # scales and a float adapter stay as they are; .to(device) moves them.
        before, prepared = dict(self._buffers), self.prepared
        self.prepared = None  # its order is the device's
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if prepared is not None and prepared.device == self.codes.device:
            self.prepared = prepared
        else:
            self.prepare()
        return self

    def _quantized_input(self, x: Tensor) -> Tensor:
        """Fake-quantized input, for the layers that run on an unpacked weight."""
        if not self.activation_bits:
            return x
        if self.x_scale is not None and self.x_zero_point is not None:
            scale, zero_point = self.x_scale.reshape(1, 1), self.x_zero_point.reshape(1, 1)
            return ops.fake_quantize(x, scale, zero_point, self.activation_bits)
        return fake_quantize_dynamic(x, self.activation_bits)


class QuantLinear(QuantLayer):
    """Packed `nn.Linear`: y = x What^T + B (A x) + bias in one call."""

    float_type = nn.Linear
    _geometry = ("in_features", "out_features")
    in_features: int
    out_features: int

    def _kernel_geometry(self) -> _KernelGeometry:
        return self.in_features, (), (), (), (), 1

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)

    def to_float(self) -> nn.Module:
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _with_weights(layer, self)


_CONV_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
    "_reversed_padding_repeated_twice",
)


class _QuantConv(QuantLayer):
    """A packed convolution: padding that the kernels do not know is applied to the input here."""

    _geometry = _CONV_GEOMETRY
    dims: ClassVar[int]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    transposed: bool
    output_padding: tuple[int, ...]
    _reversed_padding_repeated_twice: list[int]

    def _sides(self) -> list[tuple[int, int]]:
        """Padding before and after, by dimension."""
        if isinstance(self.padding, str):
            both = self._reversed_padding_repeated_twice[::-1]
            return [(both[2 * i + 1], both[2 * i]) for i in range(self.dims)]
        return [(p, p) for p in self.padding]

    def _kernel_padding(self) -> tuple[int, ...]:
        """What the kernels pad with zeros themselves: the same amount on both sides, or nothing."""
        sides = self._sides()
        if self.padding_mode == "zeros" and all(left == right for left, right in sides):
            return tuple(left for left, _ in sides)
        return (0,) * self.dims

    def _padded(self, x: Tensor) -> Tensor:
        """The input as a batch, padded unless the kernel does it."""
        sides = self._sides()
        if all(
            left == right == p
            for (left, right), p in zip(sides, self._kernel_padding(), strict=True)
        ):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        amounts = [amount for pair in reversed(sides) for amount in pair]
        return F.pad(x, amounts, mode=mode)

    def forward(self, input: Tensor) -> Tensor:
        x = input if input.dim() == self.dims + 2 else input.unsqueeze(0)
        y = self._convolve(self._padded(x))
        return y if x is input else y.squeeze(0)

    def _convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def to_float(self) -> nn.Module:
        layer = self.float_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
            **({"output_padding": self.output_padding} if self.transposed else {}),
        )
        return _with_weights(layer, self)


class QuantConv1d(_QuantConv):
    """Packed `nn.Conv1d`, run as a convolution over one row."""

    float_type = nn.Conv1d
    dims = 1

    def _kernel_geometry(self) -> _KernelGeometry:
        return (
            self.in_channels,
            (1, self.kernel_size[0]),
            (1, self.stride[0]),
            (0, self._kernel_padding()[0]),
            (1, self.dilation[0]),
            self.groups,
        )

    def _convolve(self, x: Tensor) -> Tensor:
        return self.run(x.unsqueeze(2)).squeeze(2)


class QuantConv2d(_QuantConv):
    """Packed `nn.Conv2d`: y = conv(x, What) + B (A * x) + bias in one call."""

    float_type = nn.Conv2d
    dims = 2

    def _kernel_geometry(self) -> _KernelGeometry:
        return (
            self.in_channels,
            self.kernel_size,
            self.stride,
            self._kernel_padding(),
            self.dilation,
            self.groups,
        )

    def _convolve(self, x: Tensor) -> Tensor:
        return self.run(x)


class QuantConv3d(_QuantConv):
    """Packed `nn.Conv3d`; the weight is unpacked, with its adapter merged in, for each call."""

    float_type = nn.Conv3d
    dims = 3

    def _convolve(self, x: Tensor) -> Tensor:
        return F.conv3d(
            self._quantized_input(x),
            self.weight.to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
            self.stride,
            self._kernel_padding(),
            self.dilation,
            self.groups,
        )


class _QuantConvTranspose(_QuantConv):
    """A packed transposed convolution; the weight is unpacked for each call."""

    padding: tuple[int, ...]  # torch takes no name for it here

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = input if input.dim() == self.dims + 2 else input.unsqueeze(0)
        output_padding = nn.modules.conv._ConvTransposeNd._output_padding(
            self,  # type: ignore[arg-type]  # only its output_padding is read
            input,
            output_size,
            list(self.stride),
            list(self.padding),
            list(self.kernel_size),
            self.dims,
            list(self.dilation),
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
        y = convolve(
            self._quantized_input(x),
            self.weight.to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return y if x is input else y.squeeze(0)


class QuantConvTranspose1d(_QuantConvTranspose):
    """Packed `nn.ConvTranspose1d`."""

    float_type = nn.ConvTranspose1d
    dims = 1


class QuantConvTranspose2d(_QuantConvTranspose):
    """Packed `nn.ConvTranspose2d`."""

    float_type = nn.ConvTranspose2d
    dims = 2


class QuantConvTranspose3d(_QuantConvTranspose):
    """Packed `nn.ConvTranspose3d`."""

    float_type = nn.ConvTranspose3d
    dims = 3


def _with_weights(layer: FloatLayer, packed: QuantLayer) -> nn.Module:
    layer.weight = nn.Parameter(packed.weight)
    if packed.bias is not None:
        layer.bias = nn.Parameter(packed.bias.clone())
    return layer.train(packed.training)


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode, also of a model that keeps results of a gradient pass, which deepcopy refuses."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    model = copy.deepcopy(model, memo)
    model.eval()  # a model's own `train` may return nothing
    return model


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put `layers` in the place of the modules of those names, wherever the model holds them.

    Returns:
        The model, or the layer itself where the model is the layer replaced (name "").
    """
    replaced = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    if id(model) in replaced:
        return replaced[id(model)]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in replaced:
                parent._modules[key] = replaced[id(child)]
    return model


QUANT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    cls.float_type: cls
    for cls in (
        QuantLinear,
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
    )
}
