"""Post-training quantizers in plain torch, and what every quantizer's result is checked and counted by.

Round to nearest and AdaRound follow their papers and share nothing with cora's own quantizers, so that
a row of theirs is a second opinion. `benchmarks/accuracy_peers.py` lists them with the other libraries.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import cora
from cora.batches import Batch, float_tensors, required_inputs
from cora.calibration import quantizable_layers
from cora.lowrank import FloatLayer, LayerShape, fold, rank_bits, unfold
from cora.moments import input_rows
from cora.quantizer import QParams, packed_bytes, weight_bits
from cora.report import float_state_bits

Weights = Mapping[str, "Stored"]


# --- What is stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A quantized weight matrix as a file would hold it, with what the file would take.

    Args:
        matrix: float32 [N, K], decoded.
        groups: scales a row.
        bits: width of a code.
        stored_bits: codes, scales and zero-points, counted as `cora.quantizer.weight_bits` does.
        bias: the layer's new bias [N] where the quantizer shifts it, else None.
        adapter: a low-rank term float32 [N, K] that is added to the matrix.
        adapter_bits: stored bits of the adapter.
    """

    matrix: Tensor
    groups: int
    bits: int
    stored_bits: int
    bias: Tensor | None = None
    adapter: Tensor | None = None
    adapter_bits: int = 0


@dataclass(frozen=True)
class PeerResult:
    """What a quantizer made of a model, and what it stores.

    Args:
        model: runs in torch, with decoded weights in the float model's layers.
        weight_bits: of all quantized weights: codes, scales, zero-points; of layers left float, their
            float weights.
        adapter_bits: of low-rank terms.
        bits_per_weight, total_bits: as in a row of `cora.compare`.
        float_layers: layers that cora would quantize and this quantizer left float.
        seconds: wall time of the quantizer.
    """

    model: nn.Module
    weight_bits: int
    adapter_bits: int
    bits_per_weight: float
    total_bits: int
    float_layers: tuple[str, ...]
    seconds: float


def matrix_of(layer: FloatLayer) -> Tensor:
    """A layer's weight as float32 [N, K], a copy."""
    weight = layer.weight.detach().float()
    transposed = getattr(layer, "transposed", False)
    return unfold(weight, transposed, getattr(layer, "groups", 1)).clone()


def put_weight(layer: FloatLayer, stored: Stored) -> None:
    """Give a float layer the decoded weight, its adapter in it."""
    matrix = stored.matrix if stored.adapter is None else stored.matrix + stored.adapter
    transposed = getattr(layer, "transposed", False)
    weight = fold(matrix, layer.weight.shape, transposed, getattr(layer, "groups", 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    if stored.bias is not None:
        layer.bias = nn.Parameter(stored.bias.to(layer.weight.dtype), requires_grad=False)


def adapter_rank(shape: LayerShape, share: float, bits: int = 16) -> int:
    """The rank whose adapter takes such a share of the layer's float weights, at most full rank."""
    float_bits = 32 * shape.rows * shape.columns
    return min(shape.full_rank, int(share * float_bits / rank_bits(shape, bits)))


def stored_scale(scale: Tensor) -> Tensor:
    """Rounded to float16 where that is a normal number, as cora stores it."""
    half = scale.half().float()
    return torch.where((half >= 2.0**-14) & half.isfinite(), half, scale.float())


def affine(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool = False
) -> Stored:
    """A weight scale * (code - zero_point), its scale rounded for storage.

    Args:
        codes: integers 0 .. 2**bits - 1 [N, K].
        scale: positive [N or 1, G].
        zero_point: the same shape. Whole numbers are stored as such; others as float16, as the scale is.
        symmetric: the zero-point is 2**(bits - 1) everywhere and is not stored.

    Raises:
        ValueError: a code out of range, or symmetric with another zero-point.
    """
    codes, zero_point = codes.round().to(torch.int32), zero_point.float()
    if int(codes.min()) < 0 or int(codes.max()) >= 2**bits:
        raise ValueError(
            f"codes: expected 0..{2**bits - 1}, got {int(codes.min())}..{int(codes.max())}"
        )
    if symmetric and not bool((zero_point == 2 ** (bits - 1)).all()):
        raise ValueError(f"zero_point: expected {2 ** (bits - 1)} of a symmetric weight")
    (rows, columns), (steps, groups) = codes.shape, scale.shape
    scale = stored_scale(scale)
    kind = torch.float16 if bool((scale == scale.half().float()).all()) else torch.float32
    if bool((zero_point == zero_point.round()).all()):
        qparams = QParams(scale, zero_point.to(torch.int32), bits, kind, symmetric)
        stored = weight_bits(rows, columns, qparams)
    else:
        # It is the offset, -scale * zero_point, that is a float16.
        zero_point = -stored_offset(-scale * zero_point) / scale
        stored = 8 * packed_bytes(rows, columns, bits) + scale.numel() * (kind.itemsize * 8 + 16)
    grouped = codes.reshape(rows, groups, -1)
    matrix = (grouped - zero_point.reshape(steps, groups, 1)) * scale.reshape(steps, groups, 1)
    return Stored(matrix.reshape(rows, columns), groups, bits, stored)


def stored_offset(offset: Tensor) -> Tensor:
    return offset.half().float()


def read_affine(
    matrix: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool = False
) -> Stored:
    """A weight that another library has quantized and decoded, with the scales it says it used.

    Args:
        matrix: decoded [N, K].
        scale, zero_point, symmetric: see `affine`.

    Raises:
        ValueError: the weight does not lie on the grid of these scales.
    """
    (rows, columns), (steps, groups) = matrix.shape, scale.shape
    scale, zero_point = scale.detach().float(), zero_point.detach().float()
    grouped = matrix.detach().float().reshape(rows, groups, -1)
    exact = grouped / scale.reshape(steps, groups, 1) + zero_point.reshape(steps, groups, 1)
    codes = exact.round()
    away = float((exact - codes).abs().max())
    if away > 0.01:
        raise ValueError(f"weight: expected multiples of its scale, got {away:.3f} steps off")
    return affine(codes.reshape(rows, columns), scale, zero_point, bits, symmetric)


def distinct_levels_ok(matrix: Tensor, groups: int, bits: int) -> bool:
    """Whether the weights that share a scale take at most 2**bits values.

    Args:
        matrix: decoded [N, K].
        groups: scales a row.
        bits: width of a code.
    """
    values = matrix.reshape(len(matrix) * groups, -1).sort(-1).values
    # Values of one code may differ by the rounding of the library's own arithmetic.
    span = values[:, -1:] - values[:, :1]
    steps = values.diff(dim=-1) > 1e-3 * span / 2**bits
    return bool((steps.sum(-1) < 2**bits).all())


def finish(
    model: nn.Module,
    weights: Weights,
    seconds: float = 0.0,
    activations: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    activation_bits: int = 8,
) -> PeerResult:
    """The model with quantized weights in it, checked and counted.

    Args:
        model: the folded float model; not touched.
        weights: by layer; layers without one stay float and are counted as such.
        activations: scale and zero-point of each layer's input, fake-quantized then.

    Raises:
        ValueError: a weight with more values a scale than its bits can tell apart.
    """
    quantized = copy.deepcopy(model).eval().requires_grad_(False)
    layers, _ = quantizable_layers(quantized)
    own = float_bits = count = 0
    for name, layer in layers.items():
        count += layer.weight.numel()
        if name not in weights:
            float_bits += layer.weight.numel() * layer.weight.element_size() * 8
            continue
        stored = weights[name]
        if not distinct_levels_ok(stored.matrix, stored.groups, stored.bits):
            raise ValueError(f"{name}: more than {2**stored.bits} values share a scale")
        put_weight(layer, stored)
        own += stored.stored_bits
    adapters = sum(stored.adapter_bits for stored in weights.values())
    ranges = 0
    for name, (scale, zero_point) in (activations or {}).items():
        ranges += 64  # float32 scale and int32 zero-point, as in a packed layer
        layers[name].register_forward_pre_hook(
            partial(_quantize_input, float(scale), int(zero_point), activation_bits)
        )
    own += float_bits
    rest = float_state_bits(quantized) - sum(
        layer.weight.numel() * layer.weight.element_size() * 8 for layer in layers.values()
    )
    return PeerResult(
        model=quantized,
        weight_bits=own,
        adapter_bits=adapters,
        bits_per_weight=(own + adapters + ranges) / count,
        total_bits=own + adapters + ranges + rest,
        float_layers=tuple(name for name in layers if name not in weights),
        seconds=seconds,
    )


def _quantize_input(
    scale: float, zero_point: int, bits: int, _layer: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    x = torch.fake_quantize_per_tensor_affine(args[0], scale, zero_point, 0, 2**bits - 1)
    return (x, *args[1:])


# --- What a quantizer is -------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A quantizer of whole models in one setting.

    Args:
        name: as in the tables.
        bits: of its weights.
        granularity: what it can give a scale of its own: "per_channel", "per_group".
        quantize: (model, batches, bits, generator's seed, group_size, iterations) -> weights by layer.
            It gets a copy of the model and may do with it as it likes.
        applies: whether it can quantize all that cora would in a model.
        needs: modules that must be importable.
        iterations: what it takes by default; None where it does not iterate.
    """

    name: str
    bits: tuple[int, ...]
    granularity: tuple[str, ...]
    quantize: Callable[..., Weights]
    applies: Callable[[nn.Module], bool] = lambda model: True
    needs: tuple[str, ...] = ()
    iterations: int | None = None

    def run(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        bits: int,
        seed: int,
        *,
        group_size: int | None = None,
        iterations: int | None = None,
        activation_bits: int | None = None,
    ) -> PeerResult:
        """Quantize the weight of every Linear and convolution, the first and last like the others.

        Args:
            model: float, in eval mode, with batch norms folded (`cora.Calibration(...).model`).
            batches: of calibration inputs, or (inputs, labels).
            bits: of the weights.
            seed: of everything that is drawn.
            group_size: weights that share a scale; a layer takes the largest divisor of its row that
                is no larger. None gives a scale to each output channel.
            iterations: of a quantizer that optimizes, a layer; its own default if None.
            activation_bits: quantize inputs of the layers too, with static ranges that cora chooses,
                the same for all peers; None leaves them float.

        Raises:
            ValueError: what the peer cannot do, or a result that is not what it should be.
        """
        if bits not in self.bits:
            raise ValueError(f"{self.name}: bits must be one of {self.bits}, got {bits}")
        granularity = "per_channel" if group_size is None else "per_group"
        if granularity not in self.granularity:
            raise ValueError(f"{self.name}: it does not quantize {granularity}")
        if not self.applies(model):
            raise ValueError(f"{self.name}: it does not quantize all layers of this model")
        taken = calibration_batches(model, batches)
        torch.manual_seed(seed)
        start = time.perf_counter()
        weights = self.quantize(
            copy.deepcopy(model).eval().requires_grad_(False),
            taken,
            bits=bits,
            seed=seed,
            group_size=group_size,
            iterations=self.iterations if iterations is None else iterations,
        )
        seconds = time.perf_counter() - start
        activations = None
        if activation_bits is not None:
            size = sum(len(batch) for batch in taken)
            calibration = cora.Calibration(model, batches, size, seed)
            activations = calibration.activation_qparams(activation_bits)
        return finish(model, weights, seconds, activations, activation_bits or 8)


def calibration_batches(model: nn.Module, batches: Sequence[Any]) -> list[Batch]:
    required = required_inputs(model)
    return [item if isinstance(item, Batch) else Batch(item, required) for item in batches]


def group_of(columns: int, group_size: int | None) -> int:
    """Weights of a row that share a scale: the largest divisor of the row up to `group_size`."""
    if group_size is None or group_size >= columns:
        return columns
    return next(size for size in range(group_size, 0, -1) if columns % size == 0)


# --- Round to nearest ----------------------------------------------------------------------------

_SHARES = [1.0 - 0.01 * i for i in range(80)]  # of the range, as in AdaRound's and BRECQ's code


def _grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and whole zero-point of an asymmetric range that holds 0."""
    scale = (high - low) / (2**bits - 1)
    scale = stored_scale(torch.where(scale > 0, scale, torch.ones_like(scale)))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def choose_grid(matrix: Tensor, bits: int, group: int, clip: str = "mse") -> tuple[Tensor, Tensor]:
    """Scale and zero-point [N, G] of a weight.

    Args:
        group: weights of a row that share a scale.
        clip: "minmax", or "mse": the share of the range with the least squared error.
    """
    grouped = matrix.reshape(len(matrix), -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if clip == "minmax":
        return _grid(low, high, bits)
    best = torch.full_like(low, math.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for share in _SHARES:
        s, z = _grid(share * low, share * high, bits)
        codes = ((grouped / s[..., None]).round() + z[..., None]).clamp(0, 2**bits - 1)
        error = ((codes - z[..., None]) * s[..., None] - grouped).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _nearest(matrix: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Stored:
    grouped = matrix.reshape(len(matrix), scale.shape[1], -1)
    codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    return affine(codes.reshape(matrix.shape), scale, zero, bits)


def round_to_nearest(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: int,
    clip: str = "mse",
    group_size: int | None = None,
    **_: Any,
) -> dict[str, Stored]:
    """Each weight by itself to the nearest code."""
    weights = {}
    for name, layer in quantizable_layers(model)[0].items():
        matrix = matrix_of(layer)
        group = group_of(matrix.shape[1], group_size)
        weights[name] = _nearest(matrix, *choose_grid(matrix, bits, group, clip), bits)
    return weights


# --- Low-rank terms ------------------------------------------------------------------------------


def loftq(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: int,
    group_size: int | None = None,
    iterations: int | None = 5,
    share: float = 0.05,
    **_: Any,
) -> dict[str, Stored]:
    """Quantizes what a low-rank term leaves, and makes the term of what the quantizer leaves, in turns.

    Args:
        share: of the float weights, for a layer's adapter.

    Source: Li et al. 2023, arXiv 2310.08659, algorithm 1, with an integer quantizer and float16 adapters.
    """
    weights = {}
    for name, layer in quantizable_layers(model)[0].items():
        matrix, shape = matrix_of(layer), LayerShape.of(layer)
        group = group_of(shape.columns, group_size)
        rank = adapter_rank(shape, share)
        adapter = torch.zeros_like(matrix)
        for _step in range(iterations or 1):
            rest = matrix - adapter
            stored = _nearest(rest, *choose_grid(rest, bits, group), bits)
            adapter = _low_rank(matrix - stored.matrix, shape, rank)
        weights[name] = replace(stored, adapter=adapter, adapter_bits=rank * rank_bits(shape, 16))
    return weights


def low_rank_first(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: int,
    group_size: int | None = None,
    share: float = 0.05,
    **_: Any,
) -> dict[str, Stored]:
    """The low-rank term is of the weight itself; what it leaves is quantized.

    Args:
        share: of the float weights, for a layer's adapter.

    Source: the order of Li et al. 2024, arXiv 2411.05007, with an integer quantizer and float16 adapters.
    """
    weights = {}
    for name, layer in quantizable_layers(model)[0].items():
        matrix, shape = matrix_of(layer), LayerShape.of(layer)
        rank = adapter_rank(shape, share)
        adapter = _low_rank(matrix, shape, rank)
        rest = matrix - adapter
        grid = choose_grid(rest, bits, group_of(shape.columns, group_size))
        stored = _nearest(rest, *grid, bits)
        weights[name] = replace(stored, adapter=adapter, adapter_bits=rank * rank_bits(shape, 16))
    return weights


def _low_rank(matrix: Tensor, shape: LayerShape, rank: int) -> Tensor:
    """Product of the float16 factors of a matrix, group by group."""
    u, s, v = torch.linalg.svd(matrix.reshape(shape.groups, -1, shape.columns), full_matrices=False)
    root = s[:, :rank].sqrt()
    b = (u[:, :, :rank] * root[:, None]).half().float()
    a = (root[:, :, None] * v[:, :rank]).half().float()
    return (b @ a).reshape(matrix.shape)


# --- AdaRound ------------------------------------------------------------------------------------

_ZETA, _GAMMA = 1.1, -0.1  # the stretched sigmoid's ends
_REGULARIZER, _WARM_START, _BETA = 0.01, 0.2, (20.0, 2.0)
_POSITIONS = 1024  # a step: draws from all images, where the paper takes whole outputs of 32
_ROWS = 2**26  # values of a layer's input held at once

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_": F.relu,
    "relu6": F.relu6,
}


def adaround(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    bits: int,
    seed: int,
    group_size: int | None = None,
    iterations: int | None = 10_000,
    **_: Any,
) -> dict[str, Stored]:
    """Rounds up or down so that a layer's output, after its activation, stays what it was.

    Layer by layer in the order they run; a layer sees what the quantized layers before it give, and is
    asked for what the float model gives ("asymmetric reconstruction").

    Source: Nagel et al. 2020, arXiv 2004.10568, sec. 3.2-3.4; scales by least squared error.
    """
    student = copy.deepcopy(model)
    layers, quantized = (quantizable_layers(m)[0] for m in (model, student))
    order, activations = trace_layers(model, batches[0])
    weights = round_to_nearest(model, batches, bits=bits, group_size=group_size)
    for name, calls in order.items():
        layer = layers[name]
        matrix = matrix_of(layer)
        group = group_of(matrix.shape[1], group_size)
        activation = activations.get(name, lambda y: y)
        with torch.no_grad():
            x, target = _reconstruction(
                layer, quantized[name], model, student, batches, calls, activation, seed
            )
        weights[name] = _learned_rounding(
            layer, x, target, bits, group, activation, seed, iterations or 0
        )
        put_weight(quantized[name], weights[name])
    return weights


def _reconstruction(
    layer: FloatLayer,
    quantized: FloatLayer,
    model: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    calls: int,
    activation: Callable[[Tensor], Tensor],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """What a layer sees in the quantized model [groups, P, K], what it gave in the float one."""
    shape = LayerShape.of(layer)
    limit = max(256, min(2**16, _ROWS // (shape.groups * shape.columns)) // (len(batches) * calls))
    draws = [torch.Generator().manual_seed(seed) for _ in range(2)]  # the same positions of both
    rows, targets = [], []
    weight, bias = _by_groups(layer, matrix_of(layer))
    for batch in batches:
        for x in layer_inputs(student, quantized, batch, calls):
            rows.append(input_rows(layer, x, limit, draws[0]))
        for x in layer_inputs(model, layer, batch, calls):
            seen = input_rows(layer, x, limit, draws[1])
            targets.append(activation(seen @ weight.transpose(1, 2) + bias))
    return torch.cat(rows, 1), torch.cat(targets, 1)


def _by_groups(layer: FloatLayer, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [groups, N / groups, K] and bias [groups, 1, N / groups] of a layer."""
    groups = LayerShape.of(layer).groups
    bias = matrix.new_zeros(len(matrix)) if layer.bias is None else layer.bias.detach().float()
    return matrix.reshape(groups, -1, matrix.shape[1]), bias.reshape(groups, 1, -1)


def rate(iterations: int) -> float:
    """Adam's default for the paper's 10 000 steps; fewer take longer ones, to arrive all the same."""
    return min(1e-2, 1e-3 * max(1.0, 10_000 / max(iterations, 1)))


def _learned_rounding(
    layer: FloatLayer,
    x: Tensor,
    target: Tensor,
    bits: int,
    group: int,
    activation: Callable[[Tensor], Tensor],
    seed: int,
    iterations: int,
) -> Stored:
    matrix = matrix_of(layer)
    scale, zero = choose_grid(matrix, bits, group)
    step, shift = scale[..., None], zero[..., None]
    exact = matrix.reshape(len(matrix), -1, group) / step
    floor = exact.floor()
    _, bias = _by_groups(layer, matrix)
    # Rounding starts where it leaves the weight as it was.
    start = -torch.log((_ZETA - _GAMMA) / (exact - floor - _GAMMA) - 1)
    v = start.requires_grad_(True)
    optimizer = torch.optim.Adam([v], lr=rate(iterations))
    generator = torch.Generator().manual_seed(seed)

    def up() -> Tensor:
        return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    warm = _WARM_START * iterations
    for i in range(iterations):
        drawn = torch.randint(x.shape[1], (min(_POSITIONS, x.shape[1]),), generator=generator)
        h = up()
        soft = ((floor + h + shift).clamp(0, 2**bits - 1) - shift) * step
        weight, _ = _by_groups(layer, soft.reshape(matrix.shape))
        y = activation(x[:, drawn] @ weight.transpose(1, 2) + bias)
        loss = (y - target[:, drawn]).square().sum((0, 2)).mean()
        if i >= warm:
            share = (i - warm) / (iterations - warm)
            beta = _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1 + math.cos(share * math.pi))
            loss = loss + _REGULARIZER * (1 - (2 * h - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        codes = (floor + (up() >= 0.5) + shift).clamp(0, 2**bits - 1)
    return affine(codes.reshape(matrix.shape), scale, zero, bits)


# --- Looking into a model ------------------------------------------------------------------------


class _Readers(TorchFunctionMode):
    """Which functions read the outputs of a model's layers."""

    def __init__(self, layers: Mapping[str, FloatLayer]) -> None:
        super().__init__()
        self.layers = layers
        self.calls: Counter[str] = Counter()
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor, held, keeps its id
        self.readers: dict[str, list[str]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        read = [t for t in float_tensors([*args, *(kwargs or {}).values()])]
        result = func(*args, **(kwargs or {}))
        if float_tensors(result):
            for tensor in read:
                name, _ = self.outputs.get(id(tensor), ("", tensor))
                if name:
                    self.readers[name].append(func.__name__)
                    if result is tensor:  # in place: later readers see what it became
                        del self.outputs[id(tensor)]
        return result

    def seen(self, name: str, _layer: nn.Module, _args: Any, output: Tensor) -> None:
        self.calls[name] += 1
        self.outputs[id(output)] = (name, output)
        self.readers.setdefault(name, [])


def trace_layers(
    model: nn.Module, batch: Batch
) -> tuple[dict[str, int], dict[str, Callable[[Tensor], Tensor]]]:
    """How often each layer runs, in the order they do, and the activation that alone reads its output."""
    layers, _ = quantizable_layers(model)
    readers = _Readers(layers)
    handles = [
        layer.register_forward_hook(partial(readers.seen, name)) for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), readers:
            batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    activations = {
        name: _ACTIVATIONS[functions[0]]
        for name, functions in readers.readers.items()
        if len(functions) == 1 and functions[0] in _ACTIVATIONS
    }
    return dict(readers.calls), activations


class _Enough(Exception):
    """The layer has run; the rest of the model need not."""


def layer_inputs(model: nn.Module, layer: nn.Module, batch: Batch, calls: int) -> list[Tensor]:
    """The inputs of one layer in a run of a model on a batch."""
    seen: list[Tensor] = []

    def see(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        if len(seen) == calls:
            raise _Enough

    with _hook(layer, see), torch.no_grad(), suppress(_Enough):
        batch.run(model)
    return seen


@contextmanager
def _hook(layer: nn.Module, see: Callable[..., None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


BASELINES = (
    Peer(
        "round to nearest, min and max",
        tuple(range(2, 9)),
        ("per_channel", "per_group"),
        partial(round_to_nearest, clip="minmax"),
    ),
    Peer(
        "round to nearest, least squared error",
        tuple(range(2, 9)),
        ("per_channel", "per_group"),
        round_to_nearest,
    ),
    Peer(
        "LoftQ, own",
        tuple(range(2, 9)),
        ("per_channel", "per_group"),
        loftq,
        iterations=5,
    ),
    Peer(
        "low rank first, own",
        tuple(range(2, 9)),
        ("per_channel", "per_group"),
        low_rank_first,
    ),
    Peer(
        "AdaRound, own",
        tuple(range(2, 9)),
        ("per_channel", "per_group"),
        adaround,
        iterations=10_000,
    ),
)
