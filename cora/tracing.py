"""A model's forward as a torch.fx graph, every value's shape and type noted.

Code that branches on sizes ("same" padding, interpolation to a skip's size) cannot be traced with
symbols alone; it is traced once more beside a run of the example, with the example's sizes as plain
numbers (except the batch's), and the graph is then one for inputs of those sizes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .batches import Batch
from .embedding import QuantEmbedding
from .fold import FoldedBatchNorm
from .modules import QuantLayer
from .recurrent import QuantRecurrent

__all__ = ["Sizes", "TensorKind", "sizes_of", "trace"]

_LEAVES = (QuantLayer, QuantEmbedding, QuantRecurrent, FoldedBatchNorm)

Sizes = list[tuple[int, ...]]


def sizes_of(values: Iterable[Any]) -> Sizes:
    """Sizes of the tensors, without their first dimension."""
    return [tuple(value.shape[1:]) for value in values if isinstance(value, Tensor)]


def trace(model: nn.Module, batch: Batch) -> tuple[fx.GraphModule, Sizes | None]:
    """A graph of the model; `node.meta["tensor_meta"]` is a tensor's `TensorKind` on the batch.

    Returns:
        The graph, and the sizes of the inputs it is for, None if it is for all.

    Raises:
        ValueError: the model branches on its data, or does what torch.fx does not know.
    """
    sizes: Sizes | None = None
    try:
        try:
            graph = _Tracer().trace(model)
        except Exception:  # whatever the model's own code raises on a symbol
            graph = _TracerWithSizes(batch).trace(model)
            graph._tracer_cls = _Tracer  # a pickle traces again, without an example
            sizes = sizes_of([*batch.args, *batch.kwargs.values()])
    except Exception as error:
        raise ValueError(
            f"qmodel: torch.fx cannot trace {type(model).__name__} ({error}); fuse a part of it "
            "that has no control flow on its data"
        ) from error
    for node in graph.nodes:
        node.type = None  # an annotation of the model's code, which a pickle could not name
        node.meta.pop("value", None)
    gm = fx.GraphModule(model, graph)
    unread = (getattr, operator.getitem)  # sizes that were asked for and came as numbers
    graph.eliminate_dead_code(lambda node: node.target not in unread)
    names = [node.target for node in graph.find_nodes(op="placeholder")]
    args = [*batch.args, *(batch.kwargs[name] for name in names if name in batch.kwargs)]
    with torch.no_grad():
        _Shapes(gm).run(*copy.deepcopy(args))
    return gm, sizes


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

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.args = list(copy.deepcopy(batch.args))
        self.kwargs = copy.deepcopy(batch.kwargs)
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
        args: Any = fx.node.map_arg(node.args, lambda other: other.meta["value"])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda other: other.meta["value"])
        if node.op == "placeholder":
            if target in self.kwargs:
                return self.kwargs[target]
            return self.args.pop(0) if self.args else args[0]
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
