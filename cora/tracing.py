"""A model's forward as a torch.fx graph, every value's shape and type noted.

Code that branches on sizes ("same" padding, interpolation to a skip's size) cannot be traced with
symbols alone; it is traced once more beside a run of the example, with the example's sizes as plain
numbers (except the batch's), and the graph is then one for inputs of those sizes. Likewise options, which
are None, a bool or a string: code branches on them, and the graph is one for their values on the example.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .batches import Batch
from .embedding import QuantEmbedding
from .fold import FoldedBatchNorm
from .modules import QuantLayer
from .recurrent import QuantRecurrent

__all__ = ["Sizes", "TensorKind", "Traced", "sizes_of", "trace"]

_LEAVES = (QuantLayer, QuantEmbedding, QuantRecurrent, FoldedBatchNorm)

Sizes = list[tuple[int, ...]]


def sizes_of(values: Iterable[Any]) -> Sizes:
    """Sizes of the tensors, without their first dimension."""
    return [tuple(value.shape[1:]) for value in values if isinstance(value, Tensor)]


@dataclass(frozen=True, slots=True)
class Option:
    """An argument that is None, a bool or a string, by default or on the example: code branches on it.

    Args:
        default: of the model.
        held: its value in the graph, or ... where the graph takes an input.
    """

    default: Any
    held: Any

    def __str__(self) -> str:
        return " given" if self.held is ... else f" = {self.held!r}"

    def is_held(self, value: Any) -> bool:
        """Whether the graph is for this value."""
        if self.held is ...:
            return not _is_option(value)
        return type(value) is type(self.held) and value == self.held


def _is_option(value: Any) -> bool:
    return value is None or isinstance(value, bool | str)


class Traced(NamedTuple):
    """A model's graph, and the calls it is for.

    Args:
        graph_module: its arguments are the model's own but for the options it holds.
        sizes: of its inputs; None: any.
        arguments: that the model takes by position.
        options: of the model, by name.
    """

    graph_module: fx.GraphModule
    sizes: Sizes | None
    arguments: list[str]
    options: dict[str, Option]


def trace(model: nn.Module, batch: Batch) -> Traced:
    """A graph of the model; `node.meta["tensor_meta"]` is a tensor's `TensorKind` on the batch.

    Raises:
        ValueError: the model branches on its data, or does what torch.fx does not know.
    """
    sizes: Sizes | None = None
    arguments, values, options = _arguments(model, batch)
    held = {name: option.held for name, option in options.items() if option.held is not ...}
    as_traced = {f"{name}_1": value for name, value in held.items()}  # torch.fx calls them so
    before = set(vars(model))
    try:
        try:
            graph = _Tracer().trace(model, held)
        except Exception:  # whatever the model's own code raises on a symbol
            graph = _TracerWithSizes(batch.args, values | as_traced).trace(model, held)
            graph._tracer_cls = _Tracer  # a pickle traces again, without an example
            sizes = sizes_of([*batch.args, *batch.kwargs.values()])
        _without(graph, as_traced)
        for node in graph.nodes:
            node.type = None  # an annotation of the model's code, which a pickle could not name
            node.meta.pop("value", None)
        gm = fx.GraphModule(model, graph)
    except Exception as error:
        raise ValueError(
            f"qmodel: torch.fx cannot trace {type(model).__name__} ({error}); fuse a part of it "
            "that has no control flow on its data"
        ) from error
    finally:
        for name in vars(model).keys() - before:  # constants of the graph, which torch.fx put there
            delattr(model, name)
    unread = (getattr, operator.getitem)  # sizes that were asked for and came as numbers
    graph.eliminate_dead_code(lambda node: node.target not in unread)
    apart = [] if arguments else batch.args
    inputs = [node.target for node in graph.find_nodes(op="placeholder")][len(apart) :]
    args = [*apart, *(values[name] for name in inputs if not name.startswith("*"))]
    with torch.no_grad():
        _Shapes(gm).run(*copy.deepcopy(args))
    return Traced(gm, sizes, arguments, options)


def _arguments(
    model: nn.Module, batch: Batch
) -> tuple[list[str], dict[str, Any], dict[str, Option]]:
    """Arguments of a model that go by position, what all are on a batch, and which are options."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return [], defaults | batch.kwargs, {}
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    values = defaults | dict(zip(names, batch.args, strict=False)) | batch.kwargs
    options = {}
    for name, default in defaults.items():
        held = values[name] if _is_option(values[name]) else ...
        if held is not ... or _is_option(default):
            options[name] = Option(default, held)
    return names, values, options


def _without(graph: fx.Graph, names: Collection[str]) -> None:
    """Take out arguments that were traced at a value, and the checks of that value."""

    def erase(node: fx.Node) -> None:
        for user in list(node.users):
            erase(user)
        graph.erase_node(node)

    for node in graph.find_nodes(op="placeholder"):
        if node.target in names:
            erase(node)


class TensorKind(NamedTuple):
    """What a value of the graph is."""

    shape: torch.Size
    dtype: torch.dtype


class _Shapes(fx.Interpreter):
    """Notes what each value is. (torch's own ShapeProp does too, and loads a computer algebra system: 40 MB
    that a process would keep.)"""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["tensor_meta"] = TensorKind(value.shape, value.dtype)
        return value


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class _SizedProxy(fx.Proxy):
    """A symbol whose sizes are those of its value on the example, but for the first."""

    @property
    def shape(self) -> Any:
        value = self.node.meta.get("value")
        if not isinstance(value, Tensor):
            return super().__getattr__("shape")
        batch: Any = super().__getattr__("shape")
        return (batch[0], *value.shape[1:]) if value.dim() else ()

    def size(self, dim: int | None = None) -> Any:
        value = self.node.meta.get("value")
        if not isinstance(value, Tensor):
            return self.tracer.create_proxy("call_method", "size", (self, dim), {})
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> Any:
        value = self.node.meta.get("value")
        return value.dim() if isinstance(value, Tensor) else super().__getattr__("dim")()

    @property
    def ndim(self) -> Any:
        return self.dim()


class _TracerWithSizes(_Tracer):
    """Runs each operation on the example as it is traced."""

    def __init__(self, args: Iterable[Any], values: dict[str, Any]) -> None:
        super().__init__()
        self.args, self.values = copy.deepcopy((list(args), values))
        self.running = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        self.running = True
        try:
            with torch.no_grad():
                proxy.node.meta["value"] = self._value(proxy.node)
        finally:
            self.running = False
        return proxy

    def _value(self, node: fx.Node) -> Any:
        target: Any = node.target

        def known(other: fx.Node) -> Any:
            if "value" not in other.meta:  # a tensor that no symbol went into
                other.meta["value"] = self._value(other)
            return other.meta["value"]

        args: Any = fx.node.map_arg(node.args, known)
        kwargs: Any = fx.node.map_arg(node.kwargs, known)
        if node.op == "placeholder":
            return self.values[target] if target in self.values else self.args.pop(0)
        if node.op == "get_attr":
            value: Any = self.root
            for name in target.split("."):
                value = getattr(value, name)
            return value
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return (
            self.root.get_submodule(target)(*args, **kwargs) if node.op == "call_module" else None
        )

    # While the example runs, modules are called and read as ever.

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return (
            forward(*args, **kwargs)
            if self.running
            else super().call_module(m, forward, args, kwargs)
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)
