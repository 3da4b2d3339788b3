"""Latency of a user's model: packed against float, in turns in one process, and its roofline."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import Batch, required_inputs
from .modules import copied
from .roofline import measure_roof, time_layers, wait

__all__ = ["bench", "in_memory_bytes"]

_WARM_UP = 2
_ROUNDS = 8  # at least, however slow the model


def bench(
    model: nn.Module,
    qmodel: nn.Module,
    example: Any,
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    seconds: float = 2.0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Time the float model (contiguous and channels_last) and the packed one.

    The candidates run in turns, one call each a round, so that what else the machine does falls on
    all of them alike.

    Args:
        model: the float model.
        qmodel: the packed one.
        example: a batch (see `cora.calibration.Batch`), its samples repeated to each batch size.
        batch_sizes: samples a call.
        threads: numbers of CPU threads.
        seconds: time spent on each combination, at least; and at least 8 rounds.
        progress: show a bar.

    Returns:
        A dict a combination: "batch", "threads", then for each candidate "NAME_ms" (median) and
        "NAME_iqr_ms" (interquartile range), and "speedup": the faster float median over the packed.
        "layers" has a dict for each packed layer: its "name", "ms" inside of the running model,
        "operations", "bytes", the "floor_ms" that this machine allows and what "bound" it, and the share
        "reached" of that speed; "floor_ms" and "reached" are those of all packed layers together, "roof"
        the measured speeds.
    """
    for name, values in (("batch_sizes", batch_sizes), ("threads", threads)):
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be positive integers, got {list(values)}")
    device = next(model.parameters()).device
    batch = Batch(example, required_inputs(model), "example").to(device)
    candidates = {"float": (copied(model), False)}
    if any(tensor.dim() == 4 for tensor in batch.tensors()):
        last = copied(model)
        last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        candidates["float_channels_last"] = (last, True)
    candidates["packed"] = (qmodel.eval(), False)

    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    plan = [(size, count) for count in threads for size in batch_sizes]
    try:
        for size, count in tqdm(plan, desc="bench", disable=not progress, leave=False):
            torch.set_num_threads(count)
            samples = batch[torch.arange(size, device=device) % len(batch)]
            calls = {
                name: _call(candidate, _channels_last(samples) if last else samples)
                for name, (candidate, last) in candidates.items()
            }
            times = _in_turns(calls, seconds, device)
            row: dict[str, Any] = {"batch": size, "threads": count}
            quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
            for name, milliseconds in times.items():
                low, middle, high = torch.quantile(milliseconds, quartiles).tolist()
                row[f"{name}_ms"], row[f"{name}_iqr_ms"] = middle, high - low
            fastest = min(row[f"{name}_ms"] for name in calls if name != "packed")
            row["speedup"] = fastest / row["packed_ms"]
            roof = measure_roof(in_memory_bytes(qmodel), device)
            layers = time_layers(qmodel, samples, roof, seconds / 4)
            row["layers"] = [{**dataclasses.asdict(t), "reached": t.reached} for t in layers]
            row["floor_ms"] = sum(t.floor_ms for t in layers)
            row["reached"] = row["floor_ms"] / sum(t.ms for t in layers) if layers else None
            row["roof"] = dataclasses.asdict(roof)
            rows.append(row)
    finally:
        torch.set_num_threads(before)
    return rows


def in_memory_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tensors that share storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def _channels_last(batch: Batch) -> Batch:
    def convert(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if whole else value

    part = copy.copy(batch)
    part.args = tuple(map(convert, batch.args))
    part.kwargs = {key: convert(argument) for key, argument in batch.kwargs.items()}
    return part


def _call(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    return lambda: batch.run(model)


def _in_turns(
    calls: dict[str, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, Tensor]:
    """Milliseconds of every call: name -> float64 [rounds]."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(_WARM_UP):
                call()
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < _ROUNDS or time.perf_counter() < end:
            for name, call in calls.items():
                wait(device)
                start = time.perf_counter()
                call()
                wait(device)
                times[name].append(1e3 * (time.perf_counter() - start))
            rounds += 1
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in times.items()}
