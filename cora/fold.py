"""Batch norm folded into the layer before it, so that it is quantized with the weight and costs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .batches import float_tensors
from .lowrank import FloatLayer
from .modules import QUANT_LAYERS, replace_layers

__all__ = ["FoldedBatchNorm", "fold_batch_norms", "fold_pairs", "same_outputs"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedBatchNorm(nn.Identity):
    """The place of a batch norm whose scale and shift are in the layer before it."""


class _Observer(TorchFunctionMode):
    """Watches a run of a model: which batch norm reads a layer's output, and who else does.

    A run sees what symbolic tracing cannot (control flow, code that is not torch's), and sees it of
    any model. What reads only a tensor's size does not count as a reader.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = [m for m in model.modules() if type(m) in QUANT_LAYERS]
        self.norms = [m for m in model.modules() if type(m) in _NORMS]
        self.calls: Counter[int] = Counter()
        self.outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor, held, keeps its id
        self.readers: dict[int, set[nn.Module | None]] = {}
        self.inside: nn.Module | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if float_tensors(result):
            self.read([*args, *kwargs.values()])
        return result

    def read(self, values: Any) -> None:
        for tensor in float_tensors(values):
            if id(tensor) in self.outputs:
                self.readers[id(tensor)].add(self.inside)

    def run(self, forward: Callable[[], Any]) -> Any:
        def after_layer(layer: nn.Module, _args: Any, output: Tensor) -> None:
            self.calls[id(layer)] += 1
            self.outputs[id(output)] = (layer, output)
            self.readers[id(output)] = set()

        def before_norm(norm: nn.Module, _args: Any) -> None:
            self.calls[id(norm)] += 1
            self.inside = norm

        def after_norm(_norm: nn.Module, _args: Any, _output: Tensor) -> None:
            self.inside = None

        handles = [layer.register_forward_hook(after_layer) for layer in self.layers]
        for norm in self.norms:
            handles.append(norm.register_forward_pre_hook(before_norm))
            handles.append(norm.register_forward_hook(after_norm))
        try:
            with torch.no_grad(), self:
                output = forward()
        finally:
            for handle in handles:
                handle.remove()
        self.read([output])  # what the model returns is read by its caller
        return output


def fold_batch_norms(
    model: nn.Module, forward: Callable[[nn.Module], Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold batch norms in place: each becomes a `FoldedBatchNorm`.

    Folded is a batch norm that alone reads the output of one layer, both of which run once. The folded
    model must give the same output, or nothing is folded.

    Args:
        model: in eval mode.
        forward: runs a model on a batch of its data.

    Returns:
        layer -> batch norm, and batch norm -> why it stays, by name.
    """
    names = {id(module): name for name, module in model.named_modules()}
    norms = {id(m): m for m in model.modules() if isinstance(m, _BatchNorm)}
    if not any(type(norm) in _NORMS for norm in norms.values()):
        return {}, {}
    observer = _Observer(model)
    expected = observer.run(lambda: forward(model))
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    pairs: dict[str, str] = {}
    for key, (layer, output) in observer.outputs.items():
        readers = observer.readers[key]
        norm = next(iter(readers)) if len(readers) == 1 else None
        if (
            norm is not None
            and observer.calls[id(layer)] == observer.calls[id(norm)] == 1
            and uses[id(layer.weight)] == 1
            and _channels_meet(layer, norm, output)
        ):
            pairs[names[id(layer)]] = names[id(norm)]
    kept = {
        names[id(norm)]: f"{type(norm).__name__}: it does not alone read the output of one layer"
        for norm in norms.values()
        if names[id(norm)] not in pairs.values()
    }
    before = {name: _weights(model.get_submodule(name)) for name in pairs}
    modules = {norm: model.get_submodule(norm) for norm in pairs.values()}
    fold_pairs(model, pairs)
    with torch.no_grad():
        same = same_outputs(expected, forward(model))
    if not same:
        for name, (weight, bias) in before.items():
            layer = model.get_submodule(name)
            layer.weight, layer.bias = weight, bias
        replace_layers(model, modules)
        for name, norm in modules.items():
            kept[name] = f"{type(norm).__name__}: the model with it folded gave another output"
        return {}, kept
    return pairs, kept


def fold_pairs(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Fold the batch norms of `pairs` (layer -> batch norm, by name) in place."""
    for name, norm_name in pairs.items():
        layer: FloatLayer = model.get_submodule(name)
        norm: Any = model.get_submodule(norm_name)
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double()
        if layer.bias is not None:
            shift = shift + layer.bias.detach().double()
        if norm.affine:
            factor = factor * norm.weight.detach().double()
        shift = shift * factor + (norm.bias.detach().double() if norm.affine else 0.0)
        weight = layer.weight.detach()
        if getattr(layer, "transposed", False):  # [Cin, Cout / groups, ...]
            rows = factor.reshape(layer.groups, 1, -1)
            rows = rows.expand(-1, weight.shape[0] // layer.groups, -1).flatten(0, 1)
        else:
            rows = factor.reshape(-1, 1)
        rows = rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
        folded = (weight.double() * rows).to(weight.dtype)
        layer.weight = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=layer.weight.requires_grad)
        replace_layers(model, {norm_name: FoldedBatchNorm().train(norm.training)})


def _channels_meet(layer: FloatLayer, norm: nn.Module, output: Tensor) -> bool:
    """Whether the norm has running statistics of the layer's output channels, in dimension 1."""
    dims = 2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2
    return (
        getattr(norm, "running_mean", None) is not None
        and output.dim() == dims
        and output.shape[1] == norm.num_features
    )


def _weights(layer: FloatLayer) -> tuple[Any, Any]:
    return layer.weight, layer.bias


def same_outputs(expected: Any, got: Any) -> bool:
    """Equal up to the rounding of the model's own precision."""
    pairs = list(zip(float_tensors(expected), float_tensors(got), strict=True))
    for a, b in pairs:
        tolerance = 1e-3 if a.dtype == torch.float32 else 0.1
        scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 1.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return False
    return bool(pairs)
