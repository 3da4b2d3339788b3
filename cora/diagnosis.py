"""What quantization would lose in each layer, and what would win it back: nothing is changed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibration import Calibration
from .curvature import curvature
from .lowrank import (
    FloatLayer,
    LayerShape,
    check_adapter_bits,
    factors,
    fold,
    quantize_adapter,
    rank_bits,
    truncate,
)
from .quantizer import QParams, QuantSpec, weight_bits
from .report import SPECTRUM_POINTS, float_weight_bits
from .rounding import Feedback, quantize_matrix
from .tables import text_table

__all__ = ["Diagnosis", "LayerDiagnosis", "Option", "Recovery", "diagnose"]

Advice = Literal["adapter", "more bits", "finer groups", "leave float", "fine as it is"]

_SHARES = (0.01, 0.02, 0.05, 0.10)  # of a layer's float bits, spent on its adapter
_GROUP_SIZES = (64, 32)
# A layer with at most this share of the network's predicted loss is fine; one that even 8 bits
# leave with more should stay float, unless an adapter or finer groups leave less than a quarter of
# it: as much less as one bit usually does.
_NEGLIGIBLE_SHARE = 0.01
_RESCUED = 0.25
# A network whose whole predicted loss (nats, or relative squared error) is at most this is fine.
_NEGLIGIBLE_LOSS = 1e-3
# A layer is tiny when its float weights add at most this share to what the network's weights store.
_TINY_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Recovery:
    """What an adapter wins back, as it is stored: its own rounding is in the numbers.

    Args:
        share: of the layer's float bits that the adapter may take.
        rank: the largest within it; 0 where one rank is too much.
        stored_bits: of that rank.
        plain: share of the residual's energy ||R||^2 that the best adapter within the share removes.
        weighted: the same of the output error tr(R Sxx R^T), the adapter fitted to it.
    """

    share: float
    rank: int
    stored_bits: int
    plain: float
    weighted: float


@dataclass(frozen=True, slots=True)
class Option:
    """A way to lower a layer's predicted loss.

    Args:
        advice: its kind.
        detail: e.g. "rank 3", "4 bits", "groups of 32".
        extra_bits: stored bits on top of the quantized weight's.
        predicted_loss: what it leaves.
    """

    advice: Advice
    detail: str
    extra_bits: int
    predicted_loss: float


@dataclass(frozen=True, slots=True)
class LayerDiagnosis:
    """One layer. R is the residual W - What as a matrix, block-diagonal where the layer has groups.

    Args:
        name, kind, weight_shape: of the layer.
        weights: number of them.
        float_bits, stored_bits: of the float weight, and of the quantized one without adapter.
        full_rank: largest useful rank, a group.
        weight_error: ||R||^2 / ||W||^2.
        output_error: tr(R Sxx R^T) / tr(W Sxx W^T), Sxx the second moment of the layer's input.
        spectrum: every `spectrum_step`-th singular value of R, over all groups, first = 1; empty if
            R is zero.
        weighted_spectrum: the same of R Sxx^(1/2).
        stable_rank: ||R||_F^2 / ||R||_2^2: about how many directions hold the energy.
        weighted_stable_rank: the same of R Sxx^(1/2).
        clipped_weights: share of the weights whose code was clamped to 0..2^bits - 1.
        clipping: share of ||R||^2 in those weights.
        rounding: share of ||R||^2 in the others; the two sum to 1 (0 and 0 if R is zero).
        weighted_clipping: share of the output error. Clipping and rounding meet in a cross term
            there; half of it is counted with each, so the shares sum to 1 but may leave 0..1.
        recovery: by share of the float bits, ascending.
        sensitivity: predicted loss over the error at the layer's output, tr(R Sxx R^T).
        predicted_loss, loss_share: see `diagnose`; share of the network's.
        loss_at_8_bits: predicted loss with 8-bit codes.
        options: what was compared for the advice.
        advice, reason: in words.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    weights: int
    float_bits: int
    stored_bits: int
    full_rank: int
    weight_error: float
    output_error: float
    spectrum: tuple[float, ...]
    weighted_spectrum: tuple[float, ...]
    spectrum_step: int
    stable_rank: float
    weighted_stable_rank: float
    clipped_weights: float
    clipping: float
    rounding: float
    weighted_clipping: float
    recovery: tuple[Recovery, ...]
    sensitivity: float
    predicted_loss: float
    loss_at_8_bits: float
    options: tuple[Option, ...]
    loss_share: float = 0.0
    advice: Advice = "fine as it is"
    reason: str = ""

    def left(self, option: Option) -> float:
        """The share of the layer's predicted loss that an option leaves."""
        return option.predicted_loss / self.predicted_loss if self.predicted_loss else 0.0

    def option(self, advice: Advice, detail: str = "") -> Option | None:
        """The option of a kind, by its detail where there are several."""
        return next(
            (o for o in self.options if o.advice == advice and detail in ("", o.detail)), None
        )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `diagnose` found; `str(diagnosis)` is a table, `to_html` a page with plots.

    Args:
        layers: in the model's order.
        loss: what losses are in: "KL, nats" or "relative squared error".
        predicted_loss: sum over the layers.
        measured_loss: of the network with all these layers quantized, on the calibration data; no
            adapters, biases not corrected. How far `predicted_loss` is to be believed.
        settings: the quantizer's fields, adapter_bits, calibration_samples.
    """

    layers: tuple[LayerDiagnosis, ...]
    loss: str
    predicted_loss: float
    measured_loss: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        plain: dict[str, Any] = _lists(dataclasses.asdict(self))
        return plain

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page: the advice, losses, spectra, energies. Needs matplotlib."""
        from .html_diagnosis import write_diagnosis  # matplotlib is optional

        write_diagnosis(self, path)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and cells; what an option leaves stands with the bits a weight that it costs."""
        head = ["layer", "weight", "loss", "of it", "clipped", "stable rank", "adapter 5 %"]
        head += ["+1 bit", *[f"groups {size}" for size in _GROUP_SIZES], "advice", "because"]
        cells = []
        for layer in self.layers:
            adapter = next(r for r in layer.recovery if r.share == 0.05)
            left = _left_text(1 - adapter.weighted, adapter.stored_bits / layer.weights)
            options = [layer.option("more bits")]
            options += [layer.option("finer groups", f"groups of {s}") for s in _GROUP_SIZES]
            cells.append(
                [
                    layer.name,
                    "x".join(map(str, layer.weight_shape)),
                    f"{layer.predicted_loss:.2g}",
                    f"{layer.loss_share:.1%}",
                    f"{layer.clipping:.0%}",
                    f"{layer.weighted_stable_rank:.1f}/{layer.full_rank}",
                    left if adapter.rank else "-",
                    *[
                        _left_text(layer.left(o), o.extra_bits / layer.weights) if o else "-"
                        for o in options
                    ],
                    layer.advice,
                    layer.reason,
                ]
            )
        return head, cells

    def summary(self) -> str:
        """The losses in a sentence."""
        return (
            f"predicted loss {self.predicted_loss:.3g} ({self.loss}), "
            f"measured {self.measured_loss:.3g} with every layer quantized and no adapters"
        )

    def __str__(self) -> str:
        head, cells = self.table()
        # The last two are prose: padded here, since `text_table` aligns numbers.
        for column in (-2, -1):
            width = max(len(row[column]) for row in [head, *cells])
            for row in [head, *cells]:
                row[column] = row[column].ljust(width)
        legend = (
            "loss: predicted, and its share of the network's; clipped: share of the residual's energy; "
            "stable rank: of the residual\nas the output sees it; adapter, bit, groups: share of the "
            "loss that is left, and the bits a weight that it costs"
        )
        return f"{text_table(head, cells)}\n{legend}\n{self.summary()}"


def _left_text(share: float, bits: float) -> str:
    return f"{share:.0%} {bits:+.2f}"


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


# --- Measuring -----------------------------------------------------------------------------------


def diagnose(
    model: nn.Module,
    calibration: Iterable[Any] | Calibration,
    weight: QuantSpec | None = None,
    adapter_bits: int = 4,
    progress: bool = True,
) -> Diagnosis:
    """Where a quantizer would hurt a model, layer by layer, and what would help at what cost.

    The predicted loss of a layer is the second-order estimate of the divergence from the float model when
    its weight alone is quantized: 1/2 E[<g, R>^2] over samples, R the residual and g the gradient of a random
    projection of the output whose covariance is the divergence's Hessian (`Calibration.curvature`). What else
    could be done to the layer is predicted in proportion to the error at its output,

        tr(R Sxx R^T) = ||R Sxx^(1/2)||_F^2,   Sxx = `Calibration.moment`.

    The sum over the layers takes their errors to be uncorrelated and losses to be small. It ranks layers and
    options; `measured_loss` is the size of the whole.

    Advice: "fine as it is" at 1 % or less of the network's loss (or when that is at most 0.001);
    "leave float" when even 8 bits leave it more than that and no option leaves less than a quarter of
    it, when float weights add at most 0.5 % to the network's stored weights, or when nothing helps;
    else the option with the largest predicted loss saved a stored bit: an adapter of 1, 2, 5 or 10 %
    of the float bits, one more bit, groups of 64 or 32 (or a scale a channel, for one a tensor).

    Args:
        model: the float model; it is not changed.
        calibration: batches, or a `Calibration` of this model.
        weight: the weight quantizer, `QuantSpec()` by default.
        adapter_bits: bits of an adapter's element: 2..8, 16 or 32.
        progress: show progress bars.

    Raises:
        ValueError: adapter_bits out of range, group_size that does not divide a layer's rows, data or
            weights that are not finite.
        TypeError: weight is no QuantSpec.

    Example:
        >>> print(cora.diagnose(model, batches, cora.QuantSpec(bits=3)))
    """
    weight = QuantSpec() if weight is None else weight
    if not isinstance(weight, QuantSpec):
        raise TypeError(f"weight must be a QuantSpec, got {weight!r}")
    check_adapter_bits(adapter_bits)
    if isinstance(calibration, Calibration):
        calibration.check(model)
    else:
        calibration = Calibration(model, calibration, progress=progress)
    for name, layer in calibration.layers.items():  # before anything is computed
        weight.groups_of(LayerShape.of(layer).columns, name)
    regression = calibration.logits(calibration.teacher()[0]) is None
    candidate = copy.deepcopy(calibration.model)
    measured, residuals = [], {}
    names = tqdm(calibration.layers, desc="diagnosis", leave=False, disable=not progress)
    for name in names:
        layer, residual = _measure(name, calibration, weight, adapter_bits)
        measured.append(layer)
        residuals[name] = [residual]
        quantized: FloatLayer = candidate.get_submodule(name)
        quantized.weight.data.sub_(residual.to(quantized.weight.dtype))
    losses = curvature(calibration, residuals)
    if any(loss for (loss,) in losses.values()):  # else the model has no gradients
        measured = [_scaled(layer, losses[layer.name][0]) for layer in measured]
    total = sum(layer.predicted_loss for layer in measured)
    stored = sum(layer.stored_bits for layer in measured)
    return Diagnosis(
        layers=tuple(_advised(layer, total, stored) for layer in measured),
        loss="relative squared error" if regression else "KL, nats",
        predicted_loss=total,
        measured_loss=calibration.divergence(candidate),
        settings={
            "weight": dataclasses.asdict(weight),
            "adapter_bits": adapter_bits,
            "calibration_samples": calibration.samples,
        },
    )


def _measure(
    name: str,
    calibration: Calibration,
    spec: QuantSpec,
    adapter_bits: int,
) -> tuple[LayerDiagnosis, Tensor]:
    """A layer but for its share and advice, its losses those at its own output; and the residual in the
    weight's shape."""
    layer: FloatLayer = calibration.layers[name]
    shape = LayerShape.of(layer)
    transposed = getattr(layer, "transposed", False)
    matrix = calibration.matrix(name)
    moment = calibration.moment(name)

    feedback = Feedback.of(moment) if spec.needs_moment else None

    def quantized(changed: QuantSpec) -> tuple[QParams, Tensor, float]:
        rounded = quantize_matrix(matrix, changed, name, feedback)
        qparams, residual = rounded.qparams, matrix - rounded.dequantized
        return qparams, residual, _inner(residual, residual, shape, moment)

    qparams, residual, loss = quantized(spec)
    bits = weight_bits(shape.rows, shape.columns, qparams)
    energy, error = _square(residual), _inner(residual, residual, shape, moment)
    clipped = _clipped(matrix, qparams)
    clip = residual * clipped
    clipping = _square(clip) / energy if energy else 0.0
    plain_fit = factors(residual, shape.groups)
    weighted_fit = factors(residual, shape.groups, moment)
    float_bits = float_weight_bits([layer])
    recovery = _recovery(
        residual, plain_fit[:2], weighted_fit[:2], shape, moment, float_bits, adapter_bits
    )

    options = []
    for before, adapter in zip([None, *recovery[:-1]], recovery, strict=True):
        # A larger adapter that wins nothing more is the smaller one.
        if adapter.weighted > (before.weighted if before else 0.0):
            left = loss * (1 - adapter.weighted)
            options.append(Option("adapter", f"rank {adapter.rank}", adapter.stored_bits, left))
    for advice, detail, changed in _changed(spec, shape):
        other, _, left = quantized(changed)
        extra = weight_bits(shape.rows, shape.columns, other) - bits
        options.append(Option(advice, detail, extra, left))
    step = max(1, -(-shape.full_rank // SPECTRUM_POINTS))
    signal = _inner(matrix, matrix, shape, moment)
    measured = LayerDiagnosis(
        name=name,
        kind=type(layer).__name__,
        weight_shape=tuple(layer.weight.shape),
        weights=matrix.numel(),
        float_bits=float_bits,
        stored_bits=bits,
        full_rank=shape.full_rank,
        weight_error=energy / (_square(matrix) or 1.0),
        output_error=error / (signal or 1.0),
        spectrum=_spectrum(plain_fit[2], step),
        weighted_spectrum=_spectrum(weighted_fit[2], step),
        spectrum_step=step,
        stable_rank=_stable_rank(plain_fit[2]),
        weighted_stable_rank=_stable_rank(weighted_fit[2]),
        clipped_weights=float(clipped.float().mean()),
        clipping=clipping,
        rounding=1.0 - clipping if energy else 0.0,
        weighted_clipping=_inner(clip, residual, shape, moment) / error if error else 0.0,
        recovery=tuple(recovery),
        sensitivity=1.0,
        predicted_loss=loss,
        loss_at_8_bits=loss if spec.bits == 8 else quantized(spec.replace(bits=8))[2],
        options=tuple(options),
    )
    return measured, fold(residual, layer.weight.shape, transposed, shape.groups)


def _scaled(layer: LayerDiagnosis, loss: float) -> LayerDiagnosis:
    """Losses at the layer's output as losses at the model's, where the quantizer's is `loss`."""
    factor = loss / layer.predicted_loss if layer.predicted_loss else 0.0
    return dataclasses.replace(
        layer,
        sensitivity=factor,
        predicted_loss=loss,
        loss_at_8_bits=factor * layer.loss_at_8_bits,
        options=tuple(
            dataclasses.replace(option, predicted_loss=factor * option.predicted_loss)
            for option in layer.options
        ),
    )


def _changed(spec: QuantSpec, shape: LayerShape) -> list[tuple[Advice, str, QuantSpec]]:
    """The finer quantizers that suit a layer: kind, words, quantizer."""
    found: list[tuple[Advice, str, QuantSpec]] = []
    if spec.bits < 8:
        found.append(("more bits", f"{spec.bits + 1} bits", spec.replace(bits=spec.bits + 1)))
    if spec.granularity == "per_tensor":
        # Its scales may be shared by many rows: a scale a row is a step of its own.
        rows = spec.replace(granularity="per_channel")
        found.append(("finer groups", "a scale a channel", rows))
    length = shape.columns if spec.group_size is None else spec.group_size
    for size in _GROUP_SIZES:
        if size < length and shape.columns % size == 0:
            groups = spec.replace(granularity="per_group", group_size=size)
            found.append(("finer groups", f"groups of {size}", groups))
    return found


def _recovery(
    residual: Tensor,
    plain: tuple[Tensor, Tensor],
    weighted: tuple[Tensor, Tensor],
    shape: LayerShape,
    moment: Tensor,
    float_bits: int,
    adapter_bits: int,
) -> list[Recovery]:
    """What adapters of `_SHARES` win back; `plain` and `weighted` are the residual's factors A, B."""
    cost = rank_bits(shape, adapter_bits)
    energy, error = _square(residual), _inner(residual, residual, shape, moment)
    found: list[Recovery] = []
    best_plain = best_weighted = 0.0
    for share in _SHARES:
        rank = min(shape.full_rank, math.floor(share * float_bits / cost))
        if rank and energy:
            left = [
                residual - quantize_adapter(*kept, adapter_bits, shape.groups).matrix()
                for kept in (truncate(a, b, rank, shape.groups) for a, b in (plain, weighted))
            ]
            # A direction whose rounding costs more than it wins would be left out.
            best_plain = max(best_plain, 1 - _square(left[0]) / energy)
            if error:
                after = _inner(left[1], left[1], shape, moment)
                best_weighted = max(best_weighted, 1 - after / error)
        found.append(Recovery(share, rank, rank * cost, best_plain, best_weighted))
    return found


def _clipped(matrix: Tensor, qparams: QParams) -> Tensor:
    """Which weights' codes fall outside 0..2^bits - 1 before they are clamped: bool [N, K]."""
    grouped = matrix.reshape(len(matrix), qparams.scale.shape[1], -1)
    code = torch.round(grouped / qparams.scale.unsqueeze(-1)) + qparams.zero_point.unsqueeze(-1)
    return ((code < 0) | (code > 2**qparams.bits - 1)).reshape(matrix.shape)


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _inner(left: Tensor, right: Tensor, shape: LayerShape, moment: Tensor) -> float:
    """tr(L Sxx R^T), over all groups: of a matrix with itself its output energy a sample."""
    a, b = (m.reshape(shape.groups, -1, shape.columns) for m in (left, right))
    value = float(((a @ moment) * b).sum(dtype=torch.float64))
    return max(value, 0.0) if left is right else value


def _spectrum(singular_values: Tensor, step: int) -> tuple[float, ...]:
    """Every `step`-th singular value over all groups [groups, R], relative to the first."""
    values = singular_values.double().square().sum(0).sqrt()
    if not float(values[0]) > 0:
        return ()
    return tuple(round(v, 6) for v in (values / values[0])[::step].tolist())


def _stable_rank(singular_values: Tensor) -> float:
    energies = singular_values.double().square()
    largest = float(energies.max())
    return float(energies.sum()) / largest if largest > 0 else 0.0


# --- Advice --------------------------------------------------------------------------------------


def _advised(layer: LayerDiagnosis, total: float, stored_bits: int) -> LayerDiagnosis:
    """The layer with its share of the network's `total` predicted loss, and advice.

    Args:
        stored_bits: of all the network's quantized weights.
    """
    share = layer.predicted_loss / total if total else 0.0
    advice, reason = _advice(layer, share, total, stored_bits)
    return dataclasses.replace(layer, loss_share=share, advice=advice, reason=reason)


def _advice(
    layer: LayerDiagnosis, share: float, total: float, stored_bits: int
) -> tuple[Advice, str]:
    if total <= _NEGLIGIBLE_LOSS:
        return "fine as it is", f"the whole network loses only {total:.1g}"
    if share <= _NEGLIGIBLE_SHARE:
        return "fine as it is", f"{share:.1%} of the network's loss"
    at_8_bits = layer.loss_at_8_bits / total
    least = min((option.predicted_loss for option in layer.options), default=math.inf)
    if at_8_bits > _NEGLIGIBLE_SHARE and least > _RESCUED * layer.loss_at_8_bits:
        return "leave float", f"8 bits would still leave {at_8_bits:.1%} of the network's loss"
    grown = (layer.float_bits - layer.stored_bits) / stored_bits
    if grown <= _TINY_SHARE:
        return "leave float", f"tiny: float adds {grown:.2%} to the stored weights"
    options = sorted(
        (option for option in layer.options if option.predicted_loss < layer.predicted_loss),
        # An option that costs nothing (a narrower zero-point) counts as one bit.
        key=lambda o: (o.predicted_loss - layer.predicted_loss) / max(o.extra_bits, 1),
    )
    if not options:
        return "leave float", "no adapter, bit or finer groups lower its loss"
    best = options[0]
    reason = f"{_words(layer, best, ' bits a weight')} off"
    other = next((option for option in options if option.advice != best.advice), None)
    if other is not None:
        reason += f"; next: {_words(layer, other)}"
    return best.advice, reason


def _words(layer: LayerDiagnosis, option: Option, unit: str = "") -> str:
    bits = option.extra_bits / layer.weights
    return f"{option.detail} ({bits:+.2f}{unit}) {1 - layer.left(option):.0%}"
