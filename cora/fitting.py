"""Layers quantized one by one, or in the order they run, each fitted to what it will really see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .allocation import LayerFit
from .calibration import Calibration
from .drift import Drift
from .evaluation import Evaluator, is_better
from .lowrank import Adapter, LayerShape, factors, quantize_adapter, rank_bits, truncate
from .modules import copied
from .moments import lowest, output_energy, regularized
from .quantizer import QuantSpec, weight_bits
from .rounding import Feedback, Rounded, descend, quantize_matrix

__all__ = ["Fit", "FittedLayers", "QuantizedLayer", "Way", "fit_layers", "quantize_layer"]

Fit = Literal["weighted", "plain"]

# Shares of the mean second moment: how hard a layer is held to its own weights.
_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_RIDGE_WORK = (
    2e9  # multiply-adds of a trial; a larger layer's are of a share of the rows, in float32
)
_FITS = 3  # rounds in which codes and adapter are fitted to each other


@dataclass(frozen=True, slots=True)
class Way:
    """How a layer is to be stored: its quantizer, the rank of its adapter and the bits of its elements."""

    spec: QuantSpec
    rank: int
    adapter_bits: int


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer after quantization.

    Args:
        spec: its quantizer.
        rounded: codes and their values.
        fit: the same as a weight, with the factors of the residual.
    """

    spec: QuantSpec
    rounded: Rounded
    fit: LayerFit


def quantize_layer(
    name: str, calibration: Calibration, spec: QuantSpec, fit: Fit | None
) -> QuantizedLayer:
    """Codes of a layer and the factors of its residual, none where no adapter is wanted (fit=None)."""
    matrix = calibration.matrix(name)
    moment = calibration.moment(name) if fit == "weighted" or spec.needs_moment else None
    feedback = Feedback.of(moment) if moment is not None and spec.needs_moment else None
    rounded = quantize_matrix(matrix, spec, name, feedback)
    weighted = moment if fit == "weighted" else None
    return _fitted(name, calibration, spec, rounded, matrix, bool(fit), weighted)


def _fitted(
    name: str,
    calibration: Calibration,
    spec: QuantSpec,
    rounded: Rounded,
    matrix: Tensor,
    adapted: bool,
    moment: Tensor | None,
) -> QuantizedLayer:
    """With the factors of the residual weighted by `moment`, if there is to be an adapter."""
    layer = calibration.layers[name]
    shape = LayerShape.of(layer)
    if not adapted:
        a, b = matrix.new_zeros(0, shape.columns), matrix.new_zeros(shape.rows, 0)
        singular_values = matrix.new_zeros(shape.groups, 0)
    else:
        a, b, singular_values = factors(matrix - rounded.dequantized, shape.groups, moment)
    transposed = getattr(layer, "transposed", False)
    fitted = LayerFit(
        rounded.dequantized, a, b, singular_values, shape, layer.weight.shape, transposed
    )
    return QuantizedLayer(spec, rounded, fitted)


@dataclass(frozen=True, slots=True)
class FittedLayers:
    """All quantized layers of a model, ready to be packed.

    Args:
        layers: their codes and residuals.
        adapters: what is stored of the residuals.
        network: a float model of their structure, whose biases are theirs; the float model itself where
            each layer is fitted by itself.
        in_order: each layer is fitted to what the quantized layers before it give.
        rivals: error at the output, over that of `layers`, of those that were fitted in another way too.
    """

    layers: Mapping[str, QuantizedLayer]
    adapters: Mapping[str, Adapter]
    network: nn.Module
    in_order: bool
    rivals: Mapping[str, float] = field(default_factory=dict)

    def matrices(self) -> dict[str, Tensor]:
        """The layers' weights as they are stored, adapters in them."""
        found = {}
        for name, quantized in self.layers.items():
            stored = quantized.fit.dequantized + self.adapters[name].matrix()
            found[name] = quantized.fit.weight(stored)
        return found

    @property
    def stored(self) -> int:
        """Bits of codes, scales, zero-points and adapters."""
        total = 0
        for name, quantized in self.layers.items():
            shape, adapter = quantized.fit.shape, self.adapters[name]
            total += weight_bits(shape.rows, shape.columns, quantized.rounded.qparams)
            total += adapter.rank * rank_bits(shape, adapter.bits)
        return total

    def losses(self, evaluator: Evaluator) -> Tensor:
        """Loss of each held-out sample: float32 [n]."""
        return evaluator.score(evaluator.weights(self.matrices()), self.network)

    def changed(self, evaluator: Evaluator) -> float:
        """Share of the held-out answers that are not the float model's."""
        return evaluator.changed(evaluator.weights(self.matrices()), self.network)


def fit_layers(
    calibration: Calibration,
    layers: Mapping[str, QuantizedLayer],
    ways: Mapping[str, Way],
    fit: Fit,
    evaluator: Evaluator,
    in_order: bool = True,
    correct_means: bool = True,
    others: Mapping[str, Way] | None = None,
    progress: bool = True,
) -> FittedLayers:
    """Adapters of quantized layers; and all of them once more in order, unless that is farther from float.

    Args:
        layers: each quantized by itself.
        ways: how they are stored.
        evaluator: of the float model, says what is closer.
        in_order: whether to try.
        correct_means: whether layers fitted in order get biases that keep the means of their outputs.
        others: other ways to store some layers, whose errors on the same inputs are measured in order.
    """
    adapters = {}
    for name, quantized in layers.items():
        # Rank 0 where an adapter's own rounding costs more than it wins.
        way = ways[name]
        moment = calibration.moment(name) if way.rank and fit == "weighted" else None
        matrix = calibration.matrix(name)
        adapters[name] = _useful(quantized.fit, matrix, way.rank, way.adapter_bits, moment)
    alone = FittedLayers(layers, adapters, calibration.model, False)
    if not in_order:
        return alone
    ordered = _fit_in_order(
        calibration, ways, others or {}, fit, correct_means, evaluator.simulate, progress
    )
    # A few samples weigh more than all others: their mean alone has taken the worse one.
    gain = ordered.losses(evaluator) - alone.losses(evaluator)
    return alone if is_better(gain) else ordered


def _useful(fit: LayerFit, matrix: Tensor, rank: int, bits: int, moment: Tensor | None) -> Adapter:
    """An adapter of a rank, or of rank 0 where its own rounding costs more than it wins.

    Args:
        matrix: what was quantized.
        moment: of the layer's input; None: the error of the weights counts.
    """
    shape = fit.shape

    def truncated(rank: int) -> Adapter:
        a, b = truncate(fit.a, fit.b, rank, shape.groups)
        return quantize_adapter(a, b, bits, shape.groups)

    if rank:
        adapter, residual = truncated(rank), matrix - fit.dequantized
        if _error(residual - adapter.matrix(), shape, moment) < _error(residual, shape, moment):
            return adapter
    return truncated(0)


def _error(residual: Tensor, shape: LayerShape, moment: Tensor | None) -> float:
    """Energy of a residual at the layer's output, or of its weights where no moment is given."""
    if moment is None:
        return float(residual.square().sum(dtype=torch.float64))
    return output_energy(residual, shape, moment)


def _fit_in_order(
    calibration: Calibration,
    ways: Mapping[str, Way],
    others: Mapping[str, Way],
    fit: Fit,
    correct_means: bool,
    simulate: Callable[[nn.Module], Any],
    progress: bool,
) -> FittedLayers:
    """Quantize the layers once more, in the order they run, each fitted to what it will really see.

    With x the float inputs and y those that the quantized layers before give, the weight that brings
    V y closest to W x is V = W (E[x y^T] + ridge) (E[y y^T] + ridge)^-1; V is quantized with the second
    moment of y. Codes and adapter are fitted to each other in turns. The bias then brings the mean of the
    output to its float mean, unless `correct_means` is False.

    Source: the target of GPTAQ, arXiv 2504.02692, in one closed form a layer; with adapters and for
    k x k convolutions it is this project's.
    """
    model = copied(calibration.model)
    order = [name for name in calibration.order if name in ways]
    layers: dict[str, QuantizedLayer] = {}
    adapters: dict[str, Adapter] = {}
    rivals: dict[str, float] = {}
    bar = tqdm(order, desc="fitting layers in order", leave=False, disable=not progress)
    with simulate(model), closing(Drift(calibration, model, order)) as drift:
        for name in bar:
            matrix = calibration.matrix(name)
            inputs = drift.of(name)
            if inputs is None:
                target, moment = matrix, calibration.moment(name)
            else:
                target = _towards(matrix, inputs.moments, inputs.crosses)
                moment, _ = regularized(inputs.moments[0], inputs.moments[1], (1, 1))
            error, quantized, adapter = _fit_together(
                name, calibration, ways[name], target, moment, fit
            )
            if name in others:
                other, _, _ = _fit_together(name, calibration, others[name], target, moment, fit)
                rivals[name] = other / error
            layers[name], adapters[name] = quantized, adapter
            layer: Any = model.get_submodule(name)
            stored = quantized.fit.dequantized + adapter.matrix()
            weight = quantized.fit.weight(stored)
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
            if inputs is not None and correct_means:
                shift = _mean_output(matrix, inputs.mean_float)
                shift -= _mean_output(stored, inputs.mean_other)
                bias = shift if layer.bias is None else layer.bias + shift
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
            drift.release(name)
    return FittedLayers(
        {n: layers[n] for n in ways}, {n: adapters[n] for n in ways}, model, True, rivals
    )


def _mean_output(matrix: Tensor, mean: Tensor) -> Tensor:
    """Of a weight [N, K] without a bias, from the mean of its input [groups, K]: [N]."""
    return (matrix.reshape(len(mean), -1, matrix.shape[1]) @ mean[:, :, None]).flatten()


def _towards(matrix: Tensor, moments: Tensor, crosses: Tensor) -> Tensor:
    """The weight that makes up for the difference of the inputs: [N, K], see `_fit_in_order`.

    The ridge is the one with which what one half of the samples tells holds best for the other half.

    Args:
        moments, crosses: of each half, [2, groups, K, K].
    """
    groups = moments.shape[1]
    rows = matrix.double().reshape(groups, -1, matrix.shape[1])
    moments, crosses = moments.double(), crosses.double()
    # As a difference from W, so that inputs that are the float model's leave W as it is, to the bit.
    aims = rows @ (crosses - moments)
    mean = moments.diagonal(dim1=-2, dim2=-1).mean((0, 2))
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    share = math.ceil(rows.numel() * matrix.shape[1] / _RIDGE_WORK) or 1
    trial = torch.float32 if share > 1 else torch.float64
    tried, seen = aims[:, :, ::share].to(trial), moments.to(trial)

    def change(aim: Tensor, moment: Tensor, ridge: float) -> Tensor | None:
        ridged = moment.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(ridge * mean[:, None])
        lower, failed = torch.linalg.cholesky_ex(ridged)
        return None if failed.any() else torch.cholesky_solve(aim.mT, lower).mT

    def error(ridge: float) -> float:
        """At the output, on the half that was not fitted, beyond that of W."""
        total = 0.0
        for fitted, other in ((0, 1), (1, 0)):
            found = change(tried[fitted], seen[fitted], ridge)
            if found is None:
                return math.inf
            gain = found * (found @ seen[other] - 2 * tried[other])
            total += float(gain.sum())
        return total

    ridge, least = lowest(error, _RIDGES, 0.1)
    # Of twice the samples there is half the noise.
    found = change(aims.mean(0), moments.mean(0), ridge / 2) if least < 0 else None
    return matrix if found is None else (rows + found).float().reshape(matrix.shape).contiguous()


def _fit_together(
    name: str,
    calibration: Calibration,
    way: Way,
    target: Tensor,
    moment: Tensor,
    fit: Fit,
) -> tuple[float, QuantizedLayer, Adapter]:
    """Codes for what the adapter leaves, an adapter for what the codes leave; the best round, with its error."""
    spec = way.spec
    shape = LayerShape.of(calibration.layers[name])
    weighted = moment if fit == "weighted" else None
    product = torch.zeros_like(target)
    best: tuple[float, QuantizedLayer, Adapter] | None = None
    feedback = Feedback.of(moment) if spec.needs_moment else None
    for _ in range(_FITS):
        left = target - product
        rounded = quantize_matrix(left, spec, name, feedback)
        if feedback is not None:
            rounded = descend(rounded, left, moment)
        quantized = _fitted(name, calibration, spec, rounded, target, way.rank > 0, weighted)
        adapter = _useful(quantized.fit, target, way.rank, way.adapter_bits, weighted)
        product = adapter.matrix()
        error = output_energy(target - rounded.dequantized - product, shape, moment)
        if best is None or error < best[0]:
            best = error, quantized, adapter
        if not adapter.rank:  # another round would be the first one again
            break
    assert best is not None
    return best
