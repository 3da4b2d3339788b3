"""Layers in other clothes become plain ones, so that they can be quantized and batch norms folded.

`nn.MultiheadAttention` hands its weights to a function; the `Conv1D` of GPT-2 and its kin in the transformers
library is a linear layer that keeps its weight transposed; timm has a Linear and a batch norm with activation of
its own; a weight may be made anew at every call, of a parametrization (weight or spectral norm, orthogonal), of
torch's older norms, or of a pruning mask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .attention import linear, split_attention
from .modules import QUANT_LAYERS, replace_layers

__all__ = ["hides_layers", "restructure"]


def _from_conv1d(module: Any) -> nn.Module:
    return linear(module.weight.mT.contiguous(), module.bias)


def _from_timm_linear(module: Any) -> nn.Module:
    return linear(module.weight, module.bias)


def _from_batch_norm_act(module: Any) -> nn.Module:
    norm = nn.BatchNorm2d(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    norm._parameters, norm._buffers = module._parameters, module._buffers
    return nn.Sequential(OrderedDict(norm=norm, drop=module.drop, act=module.act))


# By name, so that the libraries need not be installed.
_FOREIGN: dict[tuple[str, str], Callable[[Any], nn.Module]] = {
    ("transformers.pytorch_utils", "Conv1D"): _from_conv1d,
    ("timm.layers.linear", "Linear"): _from_timm_linear,
    ("timm.layers.norm_act", "BatchNormAct2d"): _from_batch_norm_act,
}


def _foreign(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    return _FOREIGN.get((type(module).__module__, type(module).__name__))


def _weight_hooks(module: nn.Module) -> list[Any]:
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def _makes_its_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is made anew at every call, of other tensors."""
    if parametrize.is_parametrized(module):
        return parametrize.type_before_parametrizations(module) in QUANT_LAYERS
    return type(module) in QUANT_LAYERS and bool(_weight_hooks(module))


def _keep_weight(module: Any) -> None:
    """The tensors that a layer makes become its own, as they are."""
    if parametrize.is_parametrized(module):
        # Not by torch's own removal: it changes the class, which copies share.
        made = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in made.items():
            module.register_parameter(name, nn.Parameter(value))
    for hook in _weight_hooks(module):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        else:
            prune.remove(module, hook._tensor_name)


def hides_layers(model: nn.Module) -> bool:
    """Whether `restructure` finds something to change."""
    return any(
        type(m) is nn.MultiheadAttention or _foreign(m) is not None or _makes_its_weight(m)
        for m in model.modules()
    )


def restructure(model: nn.Module) -> Any:
    """Give a model plain layers where it hides them; it computes the same.

    Returns:
        The model, changed in place, or the new module where the model itself is such a layer.
    """
    for module in list(model.modules()):
        if _makes_its_weight(module):
            _keep_weight(module)
    plain = {}
    for name, module in model.named_modules():
        if (convert := _foreign(module)) is not None:
            plain[name] = convert(module).train(module.training)
    return split_attention(replace_layers(model, plain))
