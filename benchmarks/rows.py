"""What is timed against what: the rows of docs/performance.md, each a list of cases.

A case is one piece of work. `build(threads)` makes its contestants: cora's own (names that begin with
"cora") and every peer that is present; those that are not are named with their reasons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from images import images
from layers import (
    CONVS_1X1,
    CONVS_3X3,
    LINEARS,
    Conv,
    Linear,
    packed,
    prepared,
    rank_at,
    rank_of,
)
from resnet import fused, random_network
from timing import Seconds
from torch import Tensor, nn

import cora
from cora import ops
from cora.lowrank import Adapter, LayerShape
from cora.modules import QUANT_LAYERS, QuantLayer, QuantWeight, replace_layers
from cora.recode import is_worth_merging, merged, merging_is_faster
from cora.rounding import Rounded, quantize_matrix

Call = Callable[[], object]
RANK = 32  # of linear layers
SHARE = 0.05  # of the full rank of a convolution
MERGED = "cora, adapter merged"


@dataclass
class Contest:
    """Contestants, peers that are absent and why, and what cora's first contestant has to do."""

    calls: dict[str, Call]
    absent: dict[str, str] = field(default_factory=dict)
    operations: float = 0
    bytes: float = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One line of a row.

    Args:
        row: key of `ROWS`.
        name: of the work.
        build: threads -> contest.
        flush: weights must come from memory: caches are emptied before each turn, and a turn's calls
            read different copies of the weight.
        once: each call is timed once only (it takes seconds).
    """

    row: str
    name: str
    build: Callable[[int], Contest]
    flush: bool = False
    once: bool = False

    def __str__(self) -> str:
        return f"{self.row}: {self.name}"


def _with_peers(
    ours: dict[str, Call], listed: Sequence[peers.Peer], work: Any, threads: int, **facts: Any
) -> Contest:
    contest = Contest(dict(ours), **facts)
    for peer in listed:
        reason = peer.absent()
        if reason is None:
            try:
                call = peer.make(work, threads)
                call()
            except Exception as error:
                reason = (
                    f"fails here: {type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
                )
            else:
                contest.calls[peer.name] = call
        if reason is not None:
            contest.absent[peer.name] = reason
    return contest


# --- Linear layers -------------------------------------------------------------------------------

COPIES = 3  # of a weight; a turn is one call that is not timed and two that are


@lru_cache(maxsize=3)
def _weights(n: int, k: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n + k)
    return tuple(torch.randn(n, k, generator=generator) * 0.02 for _ in range(COPIES))


def linear_bytes(shape: Linear, bits: int, rank: int) -> float:
    """Bytes of a weight with its scales, zero-points and 8-bit adapter: what one call must read."""
    return shape.n * shape.k * bits / 8 + 8 * shape.n + rank * (shape.n + shape.k + 4)


def _our_linear(shape: Linear, bits: int, rank: int, x: Tensor, x_bits: int, copies: int) -> Call:
    layers = [prepared(shape.n, shape.k, bits, rank, shape.k) for _ in range(copies)]
    return peers.turns(
        [partial(ops.run_layer, x, layer, [shape.n], None, 0, x_bits) for layer in layers]
    )


READING = "reading as many bytes"


def _reading(shape: Linear, copies: int) -> Call:
    """A sum over what a call of the first contestant has to read."""
    count = int(linear_bytes(shape, 4, RANK)) // 8
    blocks = [torch.ones(count, dtype=torch.int64) for _ in range(copies)]
    return peers.turns([block.sum for block in blocks])


def _linear(shape: Linear, threads: int) -> Contest:
    copies = COPIES if shape.m <= 4 else 1
    x = torch.randn(shape.m, shape.k)
    ours = {
        f"cora W{bits}{'A8' if x_bits else ''}{f' rank {rank}' if rank else ' no adapter'}": _our_linear(
            shape, bits, rank, x, x_bits, copies
        )
        for bits, x_bits, rank in (
            (4, 8, RANK), (4, 0, RANK), (4, 8, 0), (3, 8, RANK), (2, 8, RANK),
        )
    }  # fmt: skip
    if shape.m <= 4:
        ours[READING] = _reading(shape, copies)
    work = peers.LinearWork(shape, x, _weights(shape.n, shape.k)[:copies])
    return _with_peers(
        ours,
        peers.LINEAR_PEERS,
        work,
        threads,
        operations=shape.operations,
        bytes=linear_bytes(shape, 4, RANK),
        facts={
            "m": shape.m,
            "read bytes": {
                f"cora W{bits}A8 rank {RANK}": linear_bytes(shape, bits, RANK) for bits in (4, 3, 2)
            },
        },
    )


def linear_cases() -> list[Case]:
    return [
        Case("linear" if s.m <= 4 else "gemm", str(s), partial(_linear, s), flush=s.m <= 4)
        for s in LINEARS
    ]


# --- Convolutions --------------------------------------------------------------------------------


def _our_conv(s: Conv, rank: int, x: Tensor, codes: bool) -> Call:
    return _run_conv(s, prepared(s.out, s.k, 4, rank, s.channels, *s.window), x, codes)


def _merged_conv(s: Conv, x: Tensor, codes: bool) -> Call | None:
    """As `cora.fuse` runs the layer with its adapter where it merges both: on 8-bit codes. None: it does not."""
    conv = nn.Conv2d(s.channels, s.out, s.kernel, s.stride, s.padding, groups=s.groups)
    layer = packed_layer(conv)
    if not (merging_is_faster() and is_worth_merging(layer, s.output)):
        return None
    return _run_conv(s, merged(layer).prepared, x, codes)


def _run_conv(s: Conv, layer: Tensor, x: Tensor, codes: bool) -> Call:
    geometry = [s.out, *(size for pair in s.window for size in pair)]
    if not codes:
        x = x.contiguous(memory_format=torch.channels_last)
        return partial(ops.run_layer, x, layer, geometry, 1 / 255, 0, 8)
    halo = s.padding
    x = ops.quantize_activation(x, 1 / 255, 0, 8, halo)
    return partial(
        ops.run_layer, x, layer, geometry, 1 / 255, 0, 8, halo,
        clamp_min=0.0, out_scale=peers.OUT_SCALE, out_halo=halo,
    )  # fmt: skip


def _unfused_conv(s: Conv, rank: int, x: Tensor) -> Call:
    """The adapter as a branch of its own: two float convolutions and an addition."""
    main = _our_conv(s, 0, x, False)
    x = x.contiguous(memory_format=torch.channels_last)
    a = torch.randn(rank, s.channels // s.groups, s.kernel, s.kernel) * 0.01
    b = torch.randn(s.out, rank, 1, 1) * 0.01
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))

    def call() -> Tensor:
        hidden = F.conv2d(x, a, None, s.stride, s.padding, 1, s.groups)
        return main().add_(F.conv2d(hidden, b))  # type: ignore[attr-defined]

    return call


def _conv(s: Conv, codes: bool, threads: int) -> Contest:
    rank, heavy = rank_of(SHARE, s.out, s.k), rank_at(SHARE, s.out, s.k)
    x = torch.rand(s.input)
    ours = {
        f"cora W4A8 rank {rank}": _our_conv(s, rank, x, codes),
        "cora no adapter": _our_conv(s, 0, x, codes),
        f"cora rank {heavy}, --rank-budget {SHARE}": _our_conv(s, heavy, x, codes),
    }
    if (call := _merged_conv(s, x, codes)) is not None:
        ours[MERGED] = call
    if not codes:
        ours[f"cora rank {rank} unfused"] = _unfused_conv(s, rank, x)
    weight = torch.randn(s.out, s.channels // s.groups, s.kernel, s.kernel) * 0.02
    work = peers.ConvWork(s, x, weight, torch.randn(s.out) * 0.1, codes)
    moved = 1 if codes else 4
    return _with_peers(
        ours,
        peers.CONV_PEERS,
        work,
        threads,
        operations=s.operations,
        bytes=s.out * s.k / 2 + moved * (_numel(s.input) + _numel(s.output)),
        facts={"rank": rank, "heavy rank": heavy},
    )


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def conv_cases() -> list[Case]:
    return [
        Case(
            f"conv{'3x3' if s.kernel == 3 else '1x1'}-{'codes' if codes else 'float'}",
            str(s),
            partial(_conv, s, codes),
        )
        for codes in (True, False)
        for s in [*CONVS_3X3, *CONVS_1X1]
    ]


# --- Whole networks ------------------------------------------------------------------------------

CALIBRATION = 32


@cache
def network(name: str) -> nn.Module:
    """The float network, its BatchNorm folded."""
    return fused(random_network(name, images(CALIBRATION)[0].split(16)))


@cache
def packed_network(name: str) -> nn.Module:
    """Every convolution and the last layer at 4 bits with 8-bit inputs and adapters of 5 % of the full
    rank; input ranges fixed from the calibration images (the largest and least values)."""
    model = network(name)
    ranges: dict[tuple[str, str], tuple[float, float]] = {}

    def widen(key: tuple[str, str], values: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(values))
        before = ranges.get(key, (0.0, 0.0))
        ranges[key] = (min(before[0], low), max(before[1], high))

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            widen((name, "input"), args[0])
            widen((name, "output"), output)

        return hook

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():  # the images may have been made in inference mode, by another row
        for batch in images(CALIBRATION)[0].split(8):
            model(batch)
    for handle in handles:
        handle.remove()
    replacements: dict[str, nn.Module] = {}
    for layer_name, layer in layers.items():
        packed_one = packed_layer(layer)
        packed_one.set_activation_range(*_qparams(*ranges[layer_name, "input"]))
        packed_one.set_output_range(*_qparams(*ranges[layer_name, "output"]))
        replacements[layer_name] = packed_one
    return replace_layers(copy.deepcopy(model), replacements).eval()


def _qparams(low: float, high: float) -> tuple[Tensor, Tensor]:
    scale = (high - low) / 255
    return torch.tensor([scale]), torch.tensor([round(-low / scale)])


def packed_layer(layer: nn.Conv2d | nn.Linear) -> QuantLayer:
    """4 bits, 8-bit inputs, and an adapter of 5 % of the full rank whose elements are random: the
    timings do not need the fit, which takes minutes for a ResNet-50."""
    shape = LayerShape.of(layer)
    rounded, residual = rounded_layer(layer)
    rank = rank_of(SHARE, shape.rows, shape.columns)
    scale = torch.full((rank,), 1e-4 * float(residual.std()))
    adapter = Adapter(
        torch.randint(-127, 128, (rank, shape.columns), dtype=torch.int8),
        torch.randint(-127, 128, (shape.rows, rank), dtype=torch.int8),
        scale,
        8,
    )
    weight = QuantWeight(rounded.packed(), rounded.qparams, adapter, shape)
    return QUANT_LAYERS[type(layer)](layer, weight, 8)


def rounded_layer(layer: nn.Conv2d | nn.Linear) -> tuple[Rounded, Tensor]:
    """A layer at 4 bits, and the residual."""
    matrix = layer.weight.detach().flatten(1)
    rounded = quantize_matrix(matrix, cora.QuantSpec(bits=4))
    return rounded, matrix - rounded.dequantized


def _network(name: str, batch: int, threads: int) -> Contest:
    pictures, source = images(CALIBRATION)
    model = network(name)
    x = pictures[:batch].clone()
    packed_model = packed_network(name)
    ours: dict[str, Call] = {}
    # As users get it, and with every adapter beside its codes.
    whole, beside = cora.fuse(packed_model, x), cora.fuse(packed_model, x, merge=False)
    ours["cora W4A8"] = lambda: whole(x)
    ours["cora W4A8, no adapter merged"] = lambda: beside(x)
    last = x.contiguous(memory_format=torch.channels_last)
    ours["cora W4A8, layer by layer"] = lambda: packed_model(last)
    work = peers.NetworkWork(name, model, x, pictures.split(8))
    operations, stored = network_cost(model, x)
    return _with_peers(
        ours,
        peers.NETWORK_PEERS,
        work,
        threads,
        operations=operations,
        bytes=stored / 2,
        facts={"images": source},
    )


def network_cost(model: nn.Module, x: Tensor) -> tuple[float, int]:
    """(operations of its convolutions and linear layers, number of their weights)."""
    total, weights, handles = 0.0, 0, []

    def count(layer: Any, _: Any, y: Tensor) -> None:
        nonlocal total
        rows = y.numel() / layer.weight.shape[0]
        total += 2.0 * rows * layer.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weights += module.weight.numel()
            handles.append(module.register_forward_hook(count))
    model(x)
    for handle in handles:
        handle.remove()
    return total, weights


def network_cases() -> list[Case]:
    return [
        Case("network", f"{name}, batch {batch}", partial(_network, name, batch))
        for name in ("ResNet-18", "ResNet-50")
        for batch in (1, 8)
    ]


# --- Quantization and adapters -------------------------------------------------------------------

ELEMENTS = 64 << 20


def _fake_quantize(_: int) -> Contest:
    rows = 4096
    x = torch.randn(rows, ELEMENTS // rows)
    scale = torch.rand(rows, 1) * 0.1 + 0.2
    zero_point = torch.full((rows, 1), 7, dtype=torch.int32)
    flat, zeros = scale[:, 0].contiguous(), zero_point[:, 0].contiguous()
    theirs = torch.fake_quantize_per_channel_affine
    into = tuple(torch.empty_like(x) for _ in range(2))

    def with_residual() -> tuple[Tensor, Tensor]:
        out = theirs(x, flat, zeros, 0, 0, 15)
        return out, x - out

    calls: dict[str, Call] = {}
    calls["cora, into given tensors"] = lambda: ops.fake_quantize_out(
        x, scale, zero_point, 4, *into
    )
    calls["cora, new tensors"] = lambda: ops.fake_quantize(x, scale, zero_point, 4, residual=True)
    calls["torch, residual subtracted"] = with_residual
    calls["torch, no residual"] = lambda: theirs(x, flat, zeros, 0, 0, 15)
    return Contest(calls, bytes=12.0 * ELEMENTS)


def _svd(_: int) -> Contest:
    """All layers of ResNet-50 as residuals of a 4-bit quantization."""
    residuals = []
    for layer in network("ResNet-50").modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            residuals.append(rounded_layer(layer)[1])
    worst: list[float] = []

    def ours() -> None:
        factors.clear()
        for residual in residuals:
            rank = rank_of(SHARE, *residual.shape)
            factors.append(ops.lowrank_factors(residual, rank))

    def theirs() -> None:
        exact.clear()
        for residual in residuals:
            exact.append(torch.linalg.svd(residual, full_matrices=False)[1])

    factors: list[tuple[Tensor, ...]] = []
    exact: list[Tensor] = []

    def energy() -> float:
        """Worst layer: share of the energy that the best adapter of this rank takes."""
        for residual, (a, b, _), values in zip(residuals, factors, exact, strict=True):
            left = (residual.double() - b.double() @ a.double()).square().sum()
            best = values[: b.shape[1]].double().square().sum()
            worst.append(float((residual.double().square().sum() - left) / best))
        return min(worst)

    return Contest({"cora": ours, "torch.linalg.svd": theirs}, facts={"energy": energy})


def quantization_cases() -> list[Case]:
    return [
        Case("fake_quantize", "4096 x 16384, 4 bits, with residual", _fake_quantize, once=True),
        Case("svd", "all layers of ResNet-50", _svd, once=True),
    ]


ROWS: dict[str, str] = {
    "linear": "Linear layers, few rows: weights from memory",
    "gemm": "Linear layers, 128 rows",
    "conv3x3-codes": "3 x 3 convolutions, uint8 in and out",
    "conv1x1-codes": "1 x 1 convolutions of ResNet-50, uint8 in and out",
    "conv3x3-float": "3 x 3 convolutions, float32 in and out",
    "conv1x1-float": "1 x 1 convolutions of ResNet-50, float32 in and out",
    "network": "Whole networks, 224 x 224, float32 in and out",
    "fake_quantize": "fake_quantize, 64 Mi elements",
    "svd": "Adapter factors of all layers",
    "memory": "Memory of the packed ResNet-50",
}


def cases() -> list[Case]:
    return [*linear_cases(), *conv_cases(), *network_cases(), *quantization_cases()]


__all__ = ["ROWS", "Case", "Contest", "Seconds", "cases", "packed"]
