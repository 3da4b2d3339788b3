"""What a node of a traced graph does, whether it calls a module, a function or a method."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = [
    "clamp_of",
    "is_cat",
    "is_flatten",
    "is_identity",
    "max_pool_of",
    "mean_of",
    "module_of",
    "name_of",
    "shape_of",
    "zero_pad_of",
]


def shape_of(node: fx.Node) -> torch.Size | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def module_of(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The module that a node calls, or None."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def name_of(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    return (
        "max_pool2d"
        if node.target is F.max_pool2d
        else getattr(node.target, "__name__", str(node.target))
    )


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def clamp_of(gm: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The bounds of a ReLU and its like."""
    module, name = module_of(gm, node), name_of(node)
    if type(module) is nn.ReLU or name == "relu":
        return 0.0, math.inf
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(module.min_val), float(module.max_val)
    if name == "relu6":
        return 0.0, 6.0
    if name in ("hardtanh", "clamp", "clip"):
        ends = (-1.0, 1.0) if name == "hardtanh" else (None, None)
        key = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        low, high = (argument(node, i + 1, key[i], ends[i]) for i in range(2))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if isinstance(low, int | float) and isinstance(high, int | float):
            return float(low), float(high)
    return None


def max_pool_of(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """The window of a max pool over height and width."""
    module = module_of(gm, node)
    keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if type(module) is nn.MaxPool2d:
        window = {key: getattr(module, key) for key in keys}
    elif name_of(node) == "max_pool2d":
        defaults = (None, None, 0, 1, False, False)
        window = {key: argument(node, i + 1, key, defaults[i]) for i, key in enumerate(keys)}
    else:
        return None
    if window.pop("return_indices") or len(shape_of(node) or ()) != 4:
        return None
    window["stride"] = window["stride"] or window["kernel_size"]
    pairs = {key: [v, v] if isinstance(v, int) else list(v) for key, v in window.items()}
    return {**pairs, "ceil_mode": bool(window["ceil_mode"])}


def mean_of(gm: fx.GraphModule, node: fx.Node) -> bool | None:
    """Whether a mean over height and width keeps those dimensions; None if it is no such mean."""
    module, name = module_of(gm, node), name_of(node)
    if type(module) is nn.AdaptiveAvgPool2d or name == "adaptive_avg_pool2d":
        size = module.output_size if module else argument(node, 1, "output_size", None)
        return True if size in (1, (1, 1), [1, 1]) else None
    if name == "mean" and "dtype" not in node.kwargs:
        dims = argument(node, 1, "dim", None)
        if isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]:
            return bool(argument(node, 2, "keepdim", False))
    return None


def zero_pad_of(gm: fx.GraphModule, node: fx.Node) -> list[int] | None:
    """The amounts (left, right, top, bottom) of zero padding of height and width."""
    module = module_of(gm, node)
    amounts: Any = None
    if type(module) is nn.ZeroPad2d:
        amounts = module.padding
    elif name_of(node) == "pad" and argument(node, 2, "mode", "constant") == "constant":
        amounts = argument(node, 1, "pad", None) if not argument(node, 3, "value", 0) else None
    fits = isinstance(amounts, list | tuple) and len(amounts) == 4 == len(shape_of(node) or ())
    return list(amounts) if fits and all(isinstance(a, int) and a >= 0 for a in amounts) else None


def is_flatten(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(gm, node)
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    ends = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    return name_of(node) == "flatten" and ends == (1, -1)


def is_cat(node: fx.Node) -> bool:
    return name_of(node) in ("cat", "concat", "concatenate") and argument(node, 1, "dim", 0) in (
        1,
        -3,
    )


def is_identity(gm: fx.GraphModule, node: fx.Node) -> bool:
    module, name = module_of(gm, node), name_of(node)
    if module is not None:
        return isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
    return name == "contiguous" or (
        "dropout" in name and argument(node, 2, "training", True) is False
    )
