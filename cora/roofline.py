"""How fast a packed model's layers could run on this machine, and how fast they do.

A layer cannot be faster than its bytes through the memory or its operations through the arithmetic units.
Both speeds are measured here, in the same process: the floor is what this machine allows, not what its data
sheet says.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .fused import FusedLayer
from .modules import QuantLayer

__all__ = ["LayerTime", "Roof", "measure_roof", "time_layers", "wait"]

_SIDE = 1024  # of the product that arithmetic is measured on
_LEAST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Roof:
    """Speeds of this machine at the present number of threads.

    Args:
        integer: operations a second of the fastest product of 8-bit codes that torch has here (a
            multiply-add is two).
        floating: the same of float numbers, the faster of float32 and bfloat16.
        bandwidth: bytes a second read from an array of the size asked for.
    """

    integer: float
    floating: float
    bandwidth: float

    def floor(self, operations: float, bytes: float, integer: bool) -> tuple[float, str]:
        """The least seconds, and which of "operations" and "bytes" takes them."""
        arithmetic = operations / (self.integer if integer else self.floating)
        memory = bytes / self.bandwidth
        return (arithmetic, "operations") if arithmetic > memory else (memory, "bytes")


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A layer's time inside of the running model.

    Args:
        name: of the layer.
        ms: median over the runs.
        operations: multiplications and additions of its weight and its adapter.
        bytes: packed weight, adapter, inputs and output.
        floor_ms: what `Roof` allows.
        bound: "operations" or "bytes", what the floor comes from.
    """

    name: str
    ms: float
    operations: float
    bytes: float
    floor_ms: float
    bound: str

    @property
    def reached(self) -> float:
        """Share of the attainable speed."""
        return self.floor_ms / self.ms


def measure_roof(bytes: int, device: torch.device) -> Roof:
    """Measure this machine.

    Args:
        bytes: size of the array that bandwidth is measured on: a model that fits into a cache reads its
            weights from there.
    """
    numbers = torch.rand(_SIDE, _SIDE, device=device)
    half = numbers.bfloat16()
    operations = 2.0 * _SIDE**3
    floating = operations / min(
        _best(lambda: numbers @ numbers, device), _best(lambda: half @ half, device)
    )
    products = [done / _best(run, device) for run, done in _integer_products(device)]
    integer = max([floating, *products])
    array = torch.ones(max(bytes, _LEAST_BYTES) // 4, device=device)
    bandwidth = 4 * array.numel() / _best(array.sum, device)
    return Roof(integer, floating, bandwidth)


def _integer_products(device: torch.device) -> Iterator[tuple[Callable[[], Any], float]]:
    """Products of codes that torch is fast at, and their operations."""
    codes = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8, device=device)
    try:
        torch._int_mm(codes, codes)
    except RuntimeError:  # a device or a torch without it
        return
    yield lambda: torch._int_mm(codes, codes), 2.0 * _SIDE**3
    engine = torch.backends.quantized.engine
    if device.type != "cpu" or "onednn" not in torch.backends.quantized.supported_engines:
        return
    # A convolution with its weight rearranged once: the fastest that oneDNN gives.
    side, channels, batch = 14, 256, 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of these types
        x = torch.rand(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        x = torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8)
        torch.backends.quantized.engine = "onednn"
        try:
            layer = torch.ao.nn.quantized.Conv2d(channels, channels, 3, padding=1)
        finally:
            torch.backends.quantized.engine = engine
    yield lambda: layer(x), 2.0 * batch * side**2 * 9 * channels**2


def time_layers(model: nn.Module, batch: Batch, roof: Roof, seconds: float) -> list[LayerTime]:
    """Time every packed layer of a model while the model runs, in the order of their first calls.

    A fused model runs its layers one by one meanwhile: together they take longer than in one call.

    Args:
        model: packed or fused, in eval mode.
        seconds: spent on it, at least; and at least 5 runs.
    """
    names: dict[nn.Module, str] = {
        m: n for n, m in model.named_modules() if isinstance(m, FusedLayer | QuantLayer)
    }
    times: dict[str, list[float]] = {}
    calls: dict[str, tuple[nn.Module, list[Tensor], Tensor]] = {}
    begun: dict[nn.Module, float] = {}
    device = batch.tensors()[0].device

    def before(module: nn.Module, _: Any) -> None:
        wait(device)
        begun[module] = time.perf_counter()

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        wait(device)
        name = getattr(module, "name", "") or names[module]
        times.setdefault(name, []).append(time.perf_counter() - begun[module])
        calls[name] = (module, [t for t in inputs if isinstance(t, Tensor)], output)

    handles = [m.register_forward_pre_hook(before) for m in names]
    handles += [m.register_forward_hook(after) for m in names]
    try:
        with torch.inference_mode():
            batch.run(model)
            times.clear()
            end, runs = time.perf_counter() + seconds, 0
            while runs < 5 or time.perf_counter() < end:
                batch.run(model)
                runs += 1
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, (module, inputs, output) in calls.items():
        operations, moved, integer = _cost(module, inputs, output)
        floor, bound = roof.floor(operations, moved, integer)
        # A layer that the model calls more than once a run is counted at each call.
        count = len(times[name]) // runs
        ms = 1e3 * count * statistics.median(times[name])
        found.append(
            LayerTime(name, ms, count * operations, count * moved, 1e3 * count * floor, bound)
        )
    return found


def _cost(module: nn.Module, inputs: list[Tensor], output: Tensor) -> tuple[float, float, bool]:
    """(operations, bytes, on codes) of one call."""
    layer: Any = module.layer if isinstance(module, FusedLayer) else module
    halo = module.output.halo if isinstance(module, FusedLayer) and module.output else 0
    rows, columns = layer.shape.rows, layer.shape.columns
    if getattr(layer, "transposed", False):  # each input position meets the whole weight
        positions = inputs[0].numel() / layer.in_channels
        columns = layer.weight_shape.numel() / rows
    elif halo:
        positions = output.shape[0] * (output.shape[2] - 2 * halo) * (output.shape[3] - 2 * halo)
    else:
        positions = output.numel() / rows
    weights = (layer.codes, layer.scale, layer.zero_point, layer.bias)
    adapter = (layer.adapter_a, layer.adapter_b, layer.adapter_scale)
    moved = sum(t.numel() * t.element_size() for t in (*inputs, output))
    moved += sum(t.numel() * t.element_size() for t in (*weights, *adapter) if t is not None)
    operations = (
        2.0 * positions * (rows * columns + layer.rank * (rows + layer.shape.groups * columns))
    )
    return operations, float(moved), layer.activation_bits is not None


def _best(run: Callable[[], Any], device: torch.device, seconds: float = 0.02) -> float:
    """Seconds of the fastest run: a roof is what the machine can do."""
    best = float("inf")
    run()
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def wait(device: torch.device) -> None:
    """Until all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
