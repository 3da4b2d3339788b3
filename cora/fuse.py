"""A packed model as one fused graph: layers hand each other 8-bit codes.

`fuse` traces a packed model and rewrites it in three passes:

1. *Layers.* A packed layer takes what follows it into its epilogue: an addition and a ReLU (ReLU6,
   Hardtanh); zero padding before it becomes its own. A small one's adapter and scale groups are merged
   into 8-bit codes (recode.py).
2. *Codes.* A tensor that only packed layers of one static input range read (or additions, max pools,
   global averages, concatenations on the way to such layers) is quantized once, by the layer that
   makes it: uint8, channels last, with the border that its readers pad by. A shortcut that only an
   addition reads is quantized in the range its layer's output had on the calibration data. Maximum,
   concatenation, padding and flattening work on codes as they are.
3. *Steps.* Neighbouring layers and pools become one call of the native library.

Everything else stays float and runs as it did. A code is rounded from the same float number as in the
unfused model; what differs is that an addition reads the codes of its other operand, and merged codes.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .batches import Batch, required_inputs
from .fused import Codes, FusedLayer, FusedModel, FusedSteps, MaxPoolCodes, Mean, MeanOfCodes
from .modules import QuantConv2d, QuantLayer, QuantLinear
from .nodes import (
    clamp_of,
    is_cat,
    is_flatten,
    is_identity,
    max_pool_of,
    mean_of,
    module_of,
    name_of,
    shape_of,
    zero_pad_of,
)
from .recode import evenly_padded, is_worth_merging, merged, merging_is_faster
from .tracing import trace

__all__ = ["fuse"]

_MAX_HALO = 3  # a layer that pads by more copies its input


def fuse(qmodel: nn.Module, example: Any, merge: bool | None = None) -> FusedModel:
    """Rewrite a packed model so that its layers hand each other codes.

    Args:
        qmodel: what `cora.quantize` or `cora.load` returned; its packed layers are shared, but for merged
            ones; it is not changed.
        example: a batch of inputs (as for calibration); it tells types and ranks. Other sizes run too;
            of a model that branches on sizes only the example's run fused (any batch size does), and of
            one with options (a mask that may be None) only those that the example has.
        merge: whether small layers (at most 5 bits, 8-bit inputs) run on 8-bit codes of their weight and
            adapter, faster than beside it and in up to half a megabyte more memory each; by default where this CPU
            multiplies such codes as fast as narrow ones, which AVX2 does not.

    Returns:
        The fused model; `print` it to see what was fused and what stays float.

    Raises:
        ValueError: no packed layers, in training mode, or torch.fx cannot trace the model.
    """
    if not any(isinstance(module, QuantLayer) for module in qmodel.modules()):
        raise ValueError("qmodel: expected a model with packed layers, found none")
    if any(module.training for module in qmodel.modules()):
        raise ValueError("qmodel: expected a model in eval mode; call qmodel.eval()")
    if isinstance(qmodel, QuantLayer):
        qmodel = nn.Sequential(qmodel)
    traced = trace(qmodel, Batch(example, required_inputs(qmodel), "example"))
    gm = traced.graph_module
    merge = merging_is_faster() if merge is None else merge
    _make_functional(gm)
    _even_padding(gm, merge)
    _fuse_layers(gm, merge)
    codes = _annotate(gm)
    _set_codes(gm, codes)
    rows = _rows(gm, codes)
    _join_steps(gm)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return FusedModel(traced, rows, qmodel)


_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _function(name: str) -> Any:
    return getattr(torch, name, None) or getattr(F, name)


# fmt: off
_VIEWS = frozenset((
    "getitem", "view", "view_as", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze",
    "transpose", "permute", "movedim", "swapaxes", "t", "narrow", "select", "diagonal", "expand",
    "chunk", "split", "tensor_split", "unbind",
))
# fmt: on


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a node's result may share; the node itself if it has its own."""
    while name_of(node) in _VIEWS and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _make_functional(gm: fx.GraphModule) -> None:
    """Remove identities, and turn in-place operations into ones that leave their input."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source, module, name = node.args[0], module_of(gm, node), name_of(node)
        if is_identity(gm, node):
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            continue
        base = _base(source)
        if base is not source and any(order[user] > order[node] for user in base.users):
            continue  # what changes a view is read through its base later on
        inplace = True
        if getattr(module, "inplace", False):
            module = copy.copy(module)
            module.inplace = False
            gm.add_submodule(str(node.target), module)
        elif node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        elif name.endswith("_") and not name.startswith("_"):
            target = name[:-1]
            node.target = target if node.op == "call_method" else _function(target)
        else:
            inplace = False
        if inplace:
            for user in [user for user in source.users if order[user] > order[node]]:
                user.replace_input_with(source, node)


def _even_padding(gm: fx.GraphModule, merge: bool) -> None:
    """Take zero padding before a layer, and its own where it is uneven, into one that pads both sides alike."""
    calls = Counter(node.target for node in gm.graph.nodes if node.op == "call_module")
    for node in list(gm.graph.nodes):
        layer = module_of(gm, node)
        if type(layer) is not QuantConv2d or calls[node.target] > 1:
            continue
        if layer.padding_mode != "zeros" or len(shape_of(node) or ()) != 4:
            continue
        before = node.args[0]
        amounts = zero_pad_of(gm, before) if len(before.users) == 1 else None
        left, right, top, bottom = (
            a + b
            for a, b in zip(amounts or [0] * 4, layer._reversed_padding_repeated_twice, strict=True)
        )
        if not amounts and (left, top) == (right, bottom):
            continue
        sides = [(top, bottom), (left, right)]
        even = evenly_padded(layer, sides)
        if even is None and merge and layer.activation_bits:
            even = evenly_padded(merged(layer), sides)
        if even is None:
            continue
        gm.add_submodule(str(node.target), even)
        if amounts:
            node.args = (before.args[0],)
            gm.graph.erase_node(before)


def _fuse_layers(gm: fx.GraphModule, merge: bool) -> None:
    """Pass 1: replace each packed layer, with what follows it, by a `FusedLayer`."""
    layers = {node: module_of(gm, node) for node in gm.graph.nodes}
    names: Counter[str] = Counter()
    mergers: dict[QuantLayer, QuantLayer] = {}  # a layer may run more than once
    # Backwards: where both operands of an addition are layers, the later one takes it.
    for node, layer in reversed(layers.items()):
        if not _is_fusible(layer, node):
            continue
        fused = FusedLayer(layer)
        if merge and is_worth_merging(layer, shape_of(node) or ()):
            if layer not in mergers:
                mergers[layer] = merged(layer)
            fused.layer, fused.merged = mergers[layer], True
        chain, args = [node], [node.args[0]]
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            if (bounds := clamp_of(gm, user)) is not None:
                fused.low, fused.high = bounds
            elif len(args) == 1 and (other := _other_operand(user, chain[-1])) is not None:
                args.append(other)
                fused.adds = True
            else:
                break
            chain.append(user)
            if bounds is not None:
                break
        if len(chain) > 1:
            fused.own_output = None  # it is no longer the output
        fused.name = str(node.target)
        # One name deep: found faster.
        name = f"fused_{fused.name.replace('.', '_')}"
        names[name] += 1
        name += f"_{names[name]}" if names[name] > 1 else ""
        gm.add_submodule(name, fused)
        with gm.graph.inserting_after(chain[-1]):
            call = gm.graph.call_module(name, tuple(args))
        call.meta = chain[-1].meta
        chain[-1].replace_all_uses_with(call)
        for gone in reversed(chain):
            gm.graph.erase_node(gone)


def _is_fusible(layer: nn.Module | None, node: fx.Node) -> bool:
    """Whether the op can run a layer: all linear ones, 2-d convolutions padded evenly by zeros."""
    if isinstance(layer, QuantLinear):
        return True
    if not isinstance(layer, QuantConv2d) or len(shape_of(node) or ()) != 4:
        return False
    both = layer._reversed_padding_repeated_twice
    return layer.padding_mode == "zeros" and both[0::2] == both[1::2]


def _padding(layer: QuantConv2d) -> tuple[int, int]:
    return layer._reversed_padding_repeated_twice[2], layer._reversed_padding_repeated_twice[0]


def _other_operand(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """What an addition adds to `operand`: another tensor of its shape."""
    if name_of(node) != "add" or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    others = [arg for arg in node.args if arg is not operand]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    same = shape_of(others[0]) is not None and shape_of(others[0]) == shape_of(operand)
    return others[0] if same else None


def _annotate(gm: fx.GraphModule) -> dict[fx.Node, Codes]:
    """Pass 2: the values that are codes. All that could be are assumed to be until a reader objects."""
    nodes = list(gm.graph.nodes)
    moved = {n for n in nodes if max_pool_of(gm, n) or is_flatten(gm, n) or is_cat(n)}
    moved |= {n for n in nodes if zero_pad_of(gm, n)}
    able = moved | {n for n in nodes if isinstance(module_of(gm, n), FusedLayer)}
    able = {n for n in able if getattr(n.meta.get("tensor_meta"), "dtype", None) == torch.float32}
    while True:
        codes: dict[fx.Node, Codes] = {}
        for node in reversed(nodes):  # readers come first
            if node in able and (demand := _demand(gm, node, codes)) is not None:
                codes[node] = demand
        for node in moved & codes.keys():  # its codes are those of its inputs
            if any(codes.get(source) != codes[node] for source in node.all_input_nodes):
                del codes[node]
        if codes.keys() == able:
            return _with_halos(gm, codes)
        able = set(codes)


def _demand(gm: fx.GraphModule, node: fx.Node, codes: dict[fx.Node, Codes]) -> Codes | None:
    """The one quantizer that all readers of a value take; None if there is none or a reader objects.

    Where all of them take any, as additions do, it is that of the layer's output as calibrated.
    """
    found: set[Codes] = set()
    for user in node.users:
        fused = module_of(gm, user)
        if isinstance(fused, FusedLayer):
            if user.args[0] is node:
                if fused.range is None:
                    return None
                found.add(fused.range)
        elif user in codes:
            found.add(codes[user])
        elif mean_of(gm, user) is None:
            return None
    if not found:
        return getattr(module_of(gm, node), "own_output", None)
    return found.pop() if len(found) == 1 else None


def _with_halos(gm: fx.GraphModule, codes: dict[fx.Node, Codes]) -> dict[fx.Node, Codes]:
    """Give each value the border that its readers pad by; a concatenation's inputs have its own."""
    halos = dict.fromkeys(codes, 0)
    plain = {n for n in codes if len(shape_of(n) or ()) != 4}
    for node in codes:
        for user in node.users:
            fused = module_of(gm, user)
            if isinstance(fused, FusedLayer) and isinstance(fused.layer, QuantConv2d):
                if user.args[0] is node and max(_padding(fused.layer)) <= _MAX_HALO:
                    halos[node] = max(halos[node], *_padding(fused.layer))
            elif isinstance(fused, FusedLayer) or is_flatten(gm, user):
                plain.add(node)
            elif (amounts := zero_pad_of(gm, user)) and len(set(amounts)) == 1:
                border = amounts[0] + halos[user]  # the padding is the border
                halos[node] = max(halos[node], border if border <= _MAX_HALO else 0)
    changed = True
    while changed:
        changed = False
        for node in codes:
            if not is_cat(node):
                continue
            group = {node, *node.all_input_nodes}
            halo = 0 if group & plain else max(halos[member] for member in group)
            plain |= group if group & plain else set()
            changed |= any(halos[member] != halo for member in group)
            halos.update(dict.fromkeys(group, halo))
    return {n: replace(codes[n], halo=0 if n in plain else halos[n]) for n in codes}


def _set_codes(gm: fx.GraphModule, codes: dict[fx.Node, Codes]) -> None:
    """Tell the modules of the graph what they read and give."""
    reads = {
        node: [
            codes.get(arg) if isinstance(arg, fx.Node) else None for arg in (*node.args, None, None)
        ]
        for node in gm.graph.nodes
    }
    for node, (x, add, *_) in reads.items():
        module, window, keepdim = module_of(gm, node), max_pool_of(gm, node), mean_of(gm, node)
        pool: nn.Module | None = None
        if isinstance(module, FusedLayer):
            module.set_codes(x, add, codes.get(node))
        elif keepdim is not None and (x is not None or _is_layer_of_pixels(gm, node.args[0])):
            flat = [user for user in node.users if is_flatten(gm, user)]
            if (
                keepdim and flat and len(flat) == len(node.users)
            ):  # as means without those dimensions are
                keepdim, node.meta = False, flat[0].meta
                for user in flat:
                    user.replace_all_uses_with(node)
                    gm.graph.erase_node(user)
            pool = Mean(keepdim) if x is None else MeanOfCodes(x, keepdim)
        elif x is None:
            continue
        elif window is not None and node in codes:
            pool = MaxPoolCodes(window, x, codes[node].halo)
        elif (amounts := zero_pad_of(gm, node)) and node in codes:
            more = codes[node].halo - x.halo  # a border is padding that is there already
            node.op, node.target = "call_function", F.pad
            node.args = (node.args[0], [amount + more for amount in amounts])
            node.kwargs = {"value": float(codes[node].zero_point)}
            if not any(node.args[1]):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        if pool is not None:
            name = f"pooled_{node.name}"
            gm.add_submodule(name, pool)
            node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}


def _is_layer_of_pixels(gm: fx.GraphModule, node: Any) -> bool:
    module = module_of(gm, node) if isinstance(node, fx.Node) else None
    return isinstance(module, FusedLayer) and len(shape_of(node) or ()) == 4


def _join_steps(gm: fx.GraphModule) -> None:
    """Pass 3: make neighbouring steps that the native library knows one call."""
    stretch: list[fx.Node] = []
    count = 0
    for node in list(gm.graph.nodes):
        module = module_of(gm, node)
        native = isinstance(module, FusedLayer | MaxPoolCodes) or (
            isinstance(module, Mean | MeanOfCodes) and not module.keepdim
        )
        if native:
            stretch.append(node)
            continue
        if len(stretch) > 1:
            _join(gm, stretch, f"steps_{count}")
            count += 1
        stretch = []


def _join(gm: fx.GraphModule, stretch: list[fx.Node], name: str) -> None:
    """Replace nodes, each a module on nodes, by one `FusedSteps`."""
    inputs = list(dict.fromkeys(arg for node in stretch for arg in node.all_input_nodes))
    inputs = [node for node in inputs if node not in stretch]
    number = {node: i for i, node in enumerate((*inputs, *stretch))}
    outputs = [node for node in stretch if any(user not in number for user in node.users)]
    steps = FusedSteps(
        [gm.get_submodule(str(node.target)) for node in stretch],
        [[number[arg] for arg in node.args] for node in stretch],  # type: ignore[index]
        len(inputs),
        [number[node] for node in outputs],
    )
    gm.add_submodule(name, steps)
    with gm.graph.inserting_after(stretch[-1]):
        call = gm.graph.call_module(name, tuple(inputs))
    after = call
    for i, node in enumerate(outputs):
        result = call
        if len(outputs) > 1:
            with gm.graph.inserting_after(after):
                result = after = gm.graph.call_function(operator.getitem, (call, i))
        result.meta = node.meta
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in number)
    for node in reversed(stretch):
        gm.graph.erase_node(node)


def _rows(gm: fx.GraphModule, codes: dict[fx.Node, Codes]) -> list[tuple[str, str, str]]:
    """The summary's lines: what, with what fused into it, giving what."""
    rows = []
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        if node.op not in ("call_module", "call_function", "call_method") or shape_of(node) is None:
            continue
        what = module.name if isinstance(module, FusedLayer) else node.name
        if isinstance(module, FusedLayer):
            does = module.describe()
        elif module is not None:
            does = type(module).__name__
        else:
            does = name_of(node)
        rows.append((what, does, f"-> {codes.get(node, 'float')}"))
    return rows
