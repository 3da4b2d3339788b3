"""From a float model to a packed one, and back to float."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .allocation import Budget, LayerFit
from .calibration import (
    ActivationRange,
    Calibration,
    correct_biases,
)
from .fold import FoldedBatchNorm
from .lowrank import ADAPTER_BITS, LayerShape, factors, quantize_adapter, truncate, unfold
from .modules import (
    QUANT_LAYERS,
    QuantLayer,
    QuantWeight,
    check_activation_bits,
    fake_quantize_dynamic,
    quantize_matrix,
    replace_layers,
)
from .quantizer import QParams, QuantSpec
from .report import (
    LayerReport,
    Report,
    float_entries,
    float_state_bits,
    float_weight_bits,
    totals_of,
    versions,
)
from .search import SearchConfig, SearchResult, search_ranks

__all__ = ["dequantize", "quantize"]

FirstLast = Literal["same", "8bit", "float"]
Fit = Literal["weighted", "plain"]

_SPECTRUM_POINTS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class _Quantized:
    """A layer after quantization, before its rank is known."""

    spec: QuantSpec
    codes: Tensor
    qparams: QParams
    fit: LayerFit


def quantize(
    model: nn.Module,
    calibration: Iterable[Any] | Calibration,
    weight: QuantSpec | Mapping[str, QuantSpec] | None = None,
    activation_bits: int | None = None,
    rank_budget: float = 0.05,
    adapter_bits: int = 8,
    search: SearchConfig | None = SearchConfig(),  # noqa: B008  # frozen
    skip: Iterable[str] = (),
    progress: bool = True,
    *,
    fit: Fit = "weighted",
    first_last: FirstLast = "same",
    activation: Literal["static", "dynamic"] = "static",
    activation_range: ActivationRange = "mse",
    fold_bn: bool = True,
    bias_correction: bool = True,
) -> nn.Module:
    """Quantize a model's weights to packed codes and win back the loss with low-rank adapters.

    Args:
        model: the float model; it is not changed. Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d layers
            are quantized, everything else stays float and is named in the report.
        calibration: iterable of batches, each a tensor, a tuple (inputs, labels) or a dict, with or
            without labels; or a `Calibration` of this model.
        weight: the weight quantizer, `QuantSpec()` by default; or a dict from name patterns (fnmatch, the
            first that matches) to quantizers, layers that match none staying float.
        activation_bits: also quantize the inputs of quantized layers to 2..8 bits.
        rank_budget: stored adapter bits allowed, as a share of the stored bits of the float weights of
            the quantized layers: 0.05 of float32 weights are 1.6 bits a weight. 0 is plain quantization.
        adapter_bits: bits of an adapter's element: 2..8, 16 or 32.
        search: how ranks are chosen; None gives every layer the same share of its full rank.
        skip: names or patterns of layers that stay float.
        progress: show progress bars.
        fit: "weighted" fits adapters to the error at a layer's output (residual weighted by the second
            moment of its input), "plain" to the error of its weights (the paper's SVD).
        first_last: "same" treats the first and last quantized layers like the others, "8bit" gives
            them 8 bits, "float" leaves them.
        activation: "static" fixes input ranges from the calibration data, "dynamic" takes them anew
            from each call.
        activation_range: how a static range is chosen: "minmax", "percentile" or "mse".
        fold_bn: fold batch norms into the layers before them, before anything is quantized; a
            `Calibration` has its own.
        bias_correction: shift biases so that output channels keep their float means on the calibration
            data, if that lowers the divergence from the float model.

    Returns:
        A packed copy of the model in eval mode, with a `report` attribute.

    Raises:
        ValueError: an argument out of range, a weight or calibration value that is not finite, no layer
            to quantize, an unknown name in skip; the message names the argument.

    Example:
        >>> qmodel = cora.quantize(model, batches, cora.QuantSpec(bits=3))
        >>> print(qmodel.report)

    Source: CoRa, arXiv 2408.00923; the weighted fit for k x k convolutions is this project's.
    """
    weight = QuantSpec() if weight is None else weight
    skip = sorted({skip} if isinstance(skip, str) else set(skip))
    search = SearchConfig(method="uniform") if search is None else search
    _check_arguments(weight, activation_bits, adapter_bits, search, fit, first_last, activation)
    if isinstance(calibration, Calibration):
        calibration.check(model)
    else:
        calibration = Calibration(
            model, calibration, search.samples, search.seed, progress=progress, fold_bn=fold_bn
        )
    specs, reasons = _specs(calibration, weight, skip, first_last)
    shapes = {name: LayerShape.of(calibration.layers[name]) for name in specs}
    float_bits = float_weight_bits(calibration.layers[name] for name in specs)
    budget = Budget.of(shapes, rank_budget, float_bits, adapter_bits)

    quantized = {
        name: _quantize_layer(name, calibration, spec, fit if budget.bits else None)
        for name, spec in specs.items()
    }
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    if activation_bits and activation == "static":
        ranges = calibration.activation_qparams(activation_bits, activation_range)
        outputs = calibration.activation_qparams(activation_bits, activation_range, "output")
    plain_bits = sum(
        QuantWeight(
            q.codes, q.qparams, quantize_adapter(q.fit.a[:0], q.fit.b[:, :0], 8), shapes[n]
        ).stored_bits()["weight"]
        for n, q in quantized.items()
    )
    weights = sum(s.rows * s.columns for s in shapes.values())
    result = search_ranks(
        {name: q.fit for name, q in quantized.items()},
        budget,
        calibration,
        search,
        adapter_bits,
        _activation_simulator(activation_bits, set(specs), ranges, activation),
        lambda adapter: (plain_bits + adapter) / weights,
        progress,
    )

    qmodel: Any = copy.deepcopy(model).eval()
    layers: dict[str, QuantLayer] = {}
    for name, q in quantized.items():
        float_layer = calibration.layers[name]
        packed = QuantWeight(
            q.codes, q.qparams, _adapter(q.fit, result, name, adapter_bits), shapes[name]
        )
        layers[name] = QUANT_LAYERS[type(float_layer)](float_layer, packed, activation_bits)
        if name in ranges:
            layers[name].set_activation_range(*ranges[name])
            layers[name].set_output_range(*outputs[name])
        layers[name].float_bias = model.get_submodule(name).bias is not None
    folded = {layer: norm for layer, norm in calibration.folded.items() if layer in layers}
    places = {norm: FoldedBatchNorm() for norm in folded.values()}
    qmodel = replace_layers(qmodel, {**layers, **places}).eval()
    corrected = bias_correction and correct_biases(qmodel, layers, calibration)
    settings = {
        "weight": _spec_settings(weight),
        "activation_bits": activation_bits,
        "activation": activation if activation_bits else None,
        "activation_range": activation_range if ranges else None,
        "rank_budget": rank_budget,
        "adapter_bits": adapter_bits,
        "fit": fit,
        "first_last": first_last,
        "fold_bn": calibration.fold_bn,
        "folded": folded,
        "bias_correction": bias_correction,
        "biases_corrected": corrected,
        "search": {
            key: value for key, value in dataclasses.asdict(search).items() if key != "label_loss"
        },
        "skip": skip,
        "calibration_samples": calibration.samples,
        "versions": versions(),
    }
    qmodel.report = _report(
        qmodel, model, calibration, quantized, layers, result, reasons, settings
    )
    return qmodel


def dequantize(qmodel: nn.Module) -> nn.Module:
    """A plain float model with weights and adapters merged: the oracle of the packed one.

    Activations are not quantized in it. The packed model is not changed.
    """
    layers = {n: m.to_float() for n, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    if not layers:
        raise ValueError("qmodel: expected a model with packed layers, found none")
    report = qmodel.__dict__.pop("report", None)
    try:
        model = copy.deepcopy(qmodel)
    finally:
        if report is not None:
            qmodel.report = report
    return replace_layers(model, layers)


def _check_arguments(
    weight: Any,
    activation_bits: Any,
    adapter_bits: Any,
    search: Any,
    fit: str,
    first_last: str,
    activation: str,
) -> None:
    specs = list(weight.values()) if isinstance(weight, Mapping) else [weight]
    if not specs or not all(isinstance(spec, QuantSpec) for spec in specs):
        raise TypeError(f"weight must be a QuantSpec or a dict of them, got {weight!r}")
    check_activation_bits(activation_bits)
    if adapter_bits not in ADAPTER_BITS:
        raise ValueError(
            f"adapter_bits must be one of {', '.join(map(str, ADAPTER_BITS))}, got {adapter_bits!r}"
        )
    if not isinstance(search, SearchConfig):
        raise TypeError(f"search must be a SearchConfig or None, got {type(search).__name__}")
    for name, value, choices in (
        ("fit", fit, Fit),
        ("first_last", first_last, FirstLast),
        ("activation", activation, Literal["static", "dynamic"]),
    ):
        allowed = choices.__args__  # type: ignore[attr-defined]
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _specs(
    calibration: Calibration,
    weight: QuantSpec | Mapping[str, QuantSpec],
    skip: list[str],
    first_last: FirstLast,
) -> tuple[dict[str, QuantSpec], dict[str, str]]:
    """Each quantized layer's quantizer, and why other layers stay float."""
    names = list(calibration.layers)
    reasons = dict(calibration.kept_float)
    for pattern in skip:
        known = [*names, *calibration.kept_float, *calibration.folded.values()]
        if not fnmatch.filter(known, pattern):
            close = difflib.get_close_matches(pattern, known, 3) or known[:3]
            raise ValueError(
                f"skip: no layer is named {pattern!r}; did you mean {', '.join(close)}?"
            )
    for pattern in weight if isinstance(weight, Mapping) else ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"weight: no layer that can be quantized matches {pattern!r}")
    specs: dict[str, QuantSpec] = {}
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            reasons[name] = "named in skip"
        elif isinstance(weight, QuantSpec):
            specs[name] = weight
        else:
            match = (spec for pattern, spec in weight.items() if fnmatch.fnmatchcase(name, pattern))
            spec = next(match, None)
            if spec is None:
                reasons[name] = "no pattern in weight matches"
            else:
                specs[name] = spec
    if specs and first_last != "same":
        for name in {next(iter(specs)), next(reversed(specs))}:
            if first_last == "float":
                reasons[name] = "first or last layer (first_last='float')"
                del specs[name]
            else:
                specs[name] = specs[name].replace(bits=8)
    if not specs:
        raise ValueError("skip, weight: expected at least one layer to quantize, all stay float")
    for name, spec in specs.items():
        spec.groups_of(LayerShape.of(calibration.layers[name]).columns, name)
    return specs, reasons


def _quantize_layer(
    name: str, calibration: Calibration, spec: QuantSpec, fit: Fit | None
) -> _Quantized:
    """Codes of a layer and the factors of its residual, none where no adapter is wanted (fit=None)."""
    layer = calibration.layers[name]
    shape = LayerShape.of(layer)
    transposed = getattr(layer, "transposed", False)
    matrix = unfold(layer.weight.detach().float(), transposed, shape.groups).contiguous()
    qparams, packed, dequantized, residual = quantize_matrix(matrix, spec, name)
    if fit is None:
        a, b = matrix.new_zeros(0, shape.columns), matrix.new_zeros(shape.rows, 0)
        singular_values = matrix.new_zeros(shape.groups, 0)
    else:
        moment = calibration.moment(name) if fit == "weighted" else None
        a, b, singular_values = factors(residual, shape.groups, moment)
    return _Quantized(
        spec,
        packed,
        qparams,
        LayerFit(dequantized, a, b, singular_values, shape, layer.weight.shape, transposed),
    )


def _adapter(fit: LayerFit, result: SearchResult, name: str, bits: int) -> Any:
    a, b = truncate(fit.a, fit.b, result.ranks[name], fit.shape.groups)
    return quantize_adapter(a, b, bits, fit.shape.groups)


def _activation_simulator(
    bits: int | None,
    names: set[str],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    activation: str,
) -> Callable[[nn.Module], Any]:
    """A context manager in which a float model quantizes the inputs of the named layers."""

    if bits is None:
        return lambda _model: nullcontext()

    @contextmanager
    def simulate(model: nn.Module) -> Iterator[None]:
        handles = []
        for name in names:
            static = ranges.get(name)

            def quantize_input(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                static: Any = static,
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                x, *rest = (*args, *kwargs.values())
                if static is not None:
                    scale, zero = static[0].reshape(1, 1), static[1].reshape(1, 1)
                    y = ops.fake_quantize(x, scale, zero, bits)
                else:
                    rows = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else x
                    y = fake_quantize_dynamic(rows, bits).reshape(x.shape)
                values = [y, *rest]
                named = dict(zip(kwargs, values[len(args) :], strict=True))
                return tuple(values[: len(args)]), named

            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(quantize_input, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return simulate


def _spec_settings(weight: QuantSpec | Mapping[str, QuantSpec]) -> dict[str, Any]:
    if isinstance(weight, QuantSpec):
        return dataclasses.asdict(weight)
    return {pattern: dataclasses.asdict(spec) for pattern, spec in weight.items()}


def _report(
    qmodel: nn.Module,
    model: nn.Module,
    calibration: Calibration,
    quantized: Mapping[str, _Quantized],
    layers: Mapping[str, QuantLayer],
    result: SearchResult,
    reasons: dict[str, str],
    settings: dict[str, Any],
) -> Report:
    rows = []
    for name, q in quantized.items():
        packed, float_layer = layers[name], calibration.layers[name]
        shape = q.fit.shape
        original = unfold(float_layer.weight.detach().float(), q.fit.transposed, shape.groups)
        moment = calibration.moment(name)
        signal = _output_energy(original, shape, moment) if original.any() else 1.0
        before = _output_energy(original - q.fit.dequantized, shape, moment)
        after = _output_energy(original - packed.matrix(), shape, moment)
        singular = q.fit.energies().sqrt()
        spectrum = (singular / singular[:1].clamp(min=1e-30)).tolist()
        step = max(1, -(-len(spectrum) // _SPECTRUM_POINTS))
        rows.append(
            LayerReport(
                name=name,
                kind=type(float_layer).__name__,
                weight_shape=list(float_layer.weight.shape),
                bits=q.spec.bits,
                granularity=q.spec.granularity,
                group_size=q.spec.group_size,
                clip=q.spec.clip,
                rank=packed.rank,
                full_rank=shape.full_rank,
                weights=shape.rows * shape.columns,
                stored_bits=packed.stored_bits(),
                residual_before=before / signal,
                residual_after=after / signal,
                sqnr_db=_decibels(signal / after) if after > 0 else float("inf"),
                weight_error=_relative_error(original, q.fit.dequantized),
                spectrum=[round(v, 6) for v in spectrum[::step]],
            )
        )
    entries = float_entries(qmodel, reasons)
    float_bits = float_weight_bits(calibration.layers[name] for name in quantized)
    return Report(
        layers=rows,
        float_entries=entries,
        totals=totals_of(rows, entries, float_bits, float_state_bits(model)),
        settings=settings,
        search={
            "method": result.method,
            "ranks": result.ranks,
            "interrupted": result.interrupted,
            "candidates": result.candidates,
            "history": result.history,
        },
    )


def _output_energy(matrix: Tensor, shape: LayerShape, moment: Tensor) -> float:
    """Mean energy of a weight's output on the calibration inputs: trace(W Sxx W^T), at least tiny."""
    grouped = matrix.reshape(shape.groups, -1, shape.columns)
    energy = float(((grouped @ moment) * grouped).sum(dtype=torch.float64))
    return max(energy, 0.0) or 1e-30


def _relative_error(original: Tensor, dequantized: Tensor) -> float:
    energy = float(original.square().sum(dtype=torch.float64)) or 1.0
    return float((original - dequantized).square().sum(dtype=torch.float64)) / energy


def _decibels(ratio: float) -> float:
    return 10 * float(torch.log10(torch.tensor(ratio, dtype=torch.float64)))
