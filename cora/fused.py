"""What a fused graph is made of: `cora.fuse` builds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .modules import QuantLayer
from .ops import steps
from .tracing import Traced, sizes_of

__all__ = ["Codes", "FusedLayer", "FusedModel", "FusedSteps", "MaxPoolCodes", "Mean", "MeanOfCodes"]


@dataclass(frozen=True, slots=True)
class Codes:
    """A tensor as uint8 codes: scale * (code - zero_point), and `halo` border pixels of zero_point."""

    scale: float
    zero_point: int
    bits: int
    halo: int = 0

    def __str__(self) -> str:
        return f"{self.bits}-bit codes" + (f", halo {self.halo}" if self.halo else "")


def _quantizer(scale: Tensor, zero_point: Tensor | None, bits: int) -> Codes:
    return Codes(float(scale), int(zero_point if zero_point is not None else 0), bits)


class FusedLayer(nn.Module):
    """A packed layer with what follows it: y = clamp(layer(x) + add, low, high), as float or codes."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer
        self.name = ""  # the layer's in the packed model
        self.low, self.high = -math.inf, math.inf
        self.adds = False
        self.merged = False  # the layer is one of `recode.merged`
        self.range = self.own_output = None  # quantizers of its input and output, if static
        if layer.activation_bits and layer.x_scale is not None:
            self.range = _quantizer(layer.x_scale, layer.x_zero_point, layer.activation_bits)
        if layer.activation_bits and layer.y_scale is not None:
            self.own_output = _quantizer(layer.y_scale, layer.y_zero_point, layer.activation_bits)
        self.set_codes(None, None, None)

    def set_codes(self, input: Codes | None, add: Codes | None, output: Codes | None) -> None:
        """Say which tensors are codes, and gather the constants of the call."""
        self.input, self.add, self.output = input, add, output
        high = self.high
        if output is not None and output.bits < 8:  # the largest code is below 255
            high = min(high, output.scale * (2**output.bits - 1 - output.zero_point))
        self.before_add = (
            self.range.scale if self.range else None,
            self.range.zero_point if self.range else 0,
            self.layer.activation_bits or 0,
            input.halo if input else 0,
        )
        self.after_add = (
            *((add.scale, add.zero_point, add.halo) if add else (1.0, 0, 0)),
            self.low,
            high,
            *((output.scale, output.zero_point, output.halo) if output else (None, 0, 0)),
        )

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        # Buffers and submodules as attributes cost half a microsecond each.
        layer: Any = self._modules["layer"]
        return ops.run_layer(
            x, layer._buffers["prepared"], layer.geometry, *self.before_add, add, *self.after_add
        )

    def step(self) -> tuple[steps.Step, steps.Numbers]:
        scale, zero_point, bits, halo = self.before_add
        add_scale, add_zero_point, add_halo, low, high, out_scale, *out = self.after_add
        step = steps.Step(
            steps.LAYER,
            x_given=scale is not None,
            x_zero_point=zero_point,
            x_bits=bits,
            x_halo=halo,
            add_zero_point=add_zero_point,
            add_halo=add_halo,
            out_given=out_scale is not None,
            out_zero_point=out[0],
            out_halo=out[1],
        )
        return step, steps.Numbers(scale or 1.0, add_scale, low, high, out_scale or 1.0)

    def describe(self) -> str:
        """What it does, in words."""
        words = [type(self.layer).float_type.__name__]
        if self.input is None and self.range is not None:
            words.insert(0, "quantize")
        if self.merged:
            words[-1] += f" (merged, {self.layer.bits}-bit)"
        if self.adds:
            words.append("add" if self.add is None else "add codes")
        if (self.low, self.high) != (-math.inf, math.inf):
            words.append("relu" if self.high == math.inf else f"clamp({self.low:g}, {self.high:g})")
        return " + ".join(words)

    def extra_repr(self) -> str:
        return f"{self.describe()} -> {self.output or 'float'}"


class MaxPoolCodes(nn.Module):
    """`nn.MaxPool2d` on codes."""

    def __init__(self, window: dict[str, Any], codes: Codes, out_halo: int) -> None:
        super().__init__()
        self.window, self.codes, self.out_halo = window, codes, out_halo

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes
        return ops.max_pool2d_codes(
            x, codes.zero_point, codes.halo, **self.window, out_halo=self.out_halo
        )

    def step(self) -> tuple[steps.Step, steps.Numbers]:
        step = steps.Step(steps.MAX_POOL, **self.window)
        codes = self.codes
        step = step._replace(
            x_zero_point=codes.zero_point, x_halo=codes.halo, out_halo=self.out_halo
        )
        return step, steps.Numbers()


class MeanOfCodes(nn.Module):
    """The mean over height and width of codes, float32."""

    def __init__(self, codes: Codes, keepdim: bool) -> None:
        super().__init__()
        self.codes, self.keepdim = codes, keepdim

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes
        y = ops.mean_codes(x, codes.scale, codes.zero_point, codes.halo)
        return y[:, :, None, None] if self.keepdim else y

    def step(self) -> tuple[steps.Step, steps.Numbers]:  # without keepdim
        codes = self.codes
        step = steps.Step(steps.MEAN, x_zero_point=codes.zero_point, x_halo=codes.halo)
        return step, steps.Numbers(codes.scale)


class Mean(nn.Module):
    """The mean over height and width of floats."""

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        y = ops.mean_pixels(x)
        return y[:, :, None, None] if self.keepdim else y

    def step(self) -> tuple[steps.Step, steps.Numbers]:  # without keepdim
        return steps.Step(steps.MEAN_PIXELS), steps.Numbers()


class FusedSteps(nn.Module):
    """A stretch of a fused graph that the native library runs in one call.

    What Python and the dispatcher do between two layers costs as much as a third of a small network. Where
    it has to be visible (while it is compiled or exported, with hooks on its steps, with gradients), and
    on a GPU, the modules run one by one; results are the same.

    Args:
        modules: the steps, in order.
        reads: of each, the numbers of the values it reads: of the stretch's inputs, then of the steps' results.
        inputs: how many inputs the stretch has.
        outputs: the numbers of the values it gives.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        reads: Sequence[Sequence[int]],
        inputs: int,
        outputs: Sequence[int],
    ) -> None:
        super().__init__()
        self.steps, self.reads, self.outputs = nn.ModuleList(modules), list(reads), list(outputs)
        self.list = list(modules)  # the same, quicker to walk through
        self.layers = [module.layer for module in modules if isinstance(module, FusedLayer)]
        readers = {value: i for i, values in enumerate(reads) for value in values}  # the last ones

        def dies(value: int, i: int) -> bool:
            return value >= inputs and value not in outputs and readers[value] == i

        table: list[tuple[steps.Step, steps.Numbers]] = []
        for i, (module, (x, *add)) in enumerate(zip(modules, reads, strict=True)):
            step, numbers = module.step()  # type: ignore[operator]
            before = sum(isinstance(m, FusedLayer) for m in self.list[:i])
            step = step._replace(x=x, x_dies=dies(x, i), layer=before)
            if add:
                step = step._replace(add=add[0], add_dies=dies(add[0], i))
            table.append((step, numbers))
        self.program, self.numbers = steps.pack_steps(table)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self._runs_at_once(inputs):
            layers: Any = [layer._buffers["prepared"] for layer in self.layers]
            results = steps.run_steps(inputs, layers, self.program, self.numbers, self.outputs)
        else:
            values = list(inputs)
            for step, reads in zip(self.list, self.reads, strict=True):
                values.append(step(*(values[i] for i in reads)))
            results = [values[i] for i in self.outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _runs_at_once(self, inputs: Sequence[Tensor]) -> bool:
        if torch.compiler.is_compiling():
            return False
        for x in inputs:
            if type(x) is not Tensor or x.device.type != "cpu" or x.requires_grad:
                return False
        return not any(step._forward_hooks or step._forward_pre_hooks for step in self.list)


class FusedModel(nn.Module):
    """What `fuse` returns: an inference model that takes and gives what the packed model did.

    `graph_module`, the torch.fx module that it runs, is what to give to `torch.export` where inputs have
    dynamic sizes: it has the packed model's own arguments, but for options that the example left out.
    """

    def __init__(self, traced: Traced, rows: list[tuple[str, str, str]], qmodel: nn.Module) -> None:
        super().__init__()
        self.graph_module, self.rows = traced.graph_module, rows
        self.sizes, self.arguments, self.options = traced[1:]
        # Runs what the graph is not for.
        self.unfused = qmodel if self.options or self.sizes is not None else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        unfused: Any = self.unfused
        if unfused is None:
            return self.graph_module(*args, **kwargs)
        if self.sizes is not None and sizes_of([*args, *kwargs.values()]) != self.sizes:
            return unfused(*args, **kwargs)
        if not self.options:
            return self.graph_module(*args, **kwargs)
        named = dict(zip(self.arguments, args, strict=False)) | kwargs
        other = len(named) < len(args) + len(kwargs)  # the model says what is wrong
        for name, option in self.options.items():
            other |= not option.is_held(named.get(name, option.default))
            if option.held is not ...:
                named.pop(name, None)
        return unfused(*args, **kwargs) if other else self.graph_module(**named)

    def summary(self) -> str:
        """A line for each step: what it reads, what was fused into it, what it gives."""
        widths = [max(len(row[i]) for row in self.rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in self.rows]
        if self.sizes is not None:
            sizes = ", ".join("x".join(map(str, ("batch", *size))) for size in self.sizes)
            lines.append(f"for inputs of {sizes}; others run unfused: the model branches on sizes")
        if self.options:
            options = ", ".join(f"{name}{option}" for name, option in self.options.items())
            lines.append(
                f"for calls with {options}; others run unfused: the model branches on them"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()
