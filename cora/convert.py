"""From a float model to a packed one, and back to float."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .activation_ranges import ActivationRange
from .allocation import check_rank_budget
from .batches import float_tensors
from .biases import correct_biases
from .calibration import Calibration
from .choose import Chooser
from .embedding import QuantEmbedding, pack_embeddings
from .evaluation import activation_simulator
from .fitting import Fit, FittedLayers
from .fold import FoldedBatchNorm
from .joint import DEFAULT_TARGET_BITS
from .lowrank import LayerShape, check_adapter_bits
from .modules import (
    QUANT_LAYERS,
    QuantLayer,
    QuantWeight,
    copied,
    replace_layers,
)
from .quantizer import QuantSpec, check_bits
from .recurrent import QuantRecurrent, pack_recurrent
from .report import (
    Report,
    make_report,
    versions,
)
from .restructure import restructure
from .search import SearchConfig
from .tuning import TuneConfig
from .tuning import tune as tune_layers

__all__ = ["DEFAULT_TARGET_BITS", "dequantize", "quantize"]

FirstLast = Literal["same", "8bit", "float"]
Activation = Literal["static", "dynamic"]


def quantize(
    model: nn.Module,
    calibration: Iterable[Any] | Calibration,
    weight: QuantSpec | Mapping[str, QuantSpec] | None = None,
    activation_bits: int | None = None,
    rank_budget: float = 0.05,
    adapter_bits: int | None = None,
    search: SearchConfig | None = SearchConfig(),  # noqa: B008  # frozen
    skip: Iterable[str] = (),
    progress: bool = True,
    *,
    target_bits: float | None = None,
    max_drop: float | None = None,
    tune: TuneConfig | None = TuneConfig(),  # noqa: B008  # frozen
    propagate: bool = True,
    fit: Fit = "weighted",
    first_last: FirstLast = "same",
    activation: Activation = "static",
    activation_range: ActivationRange = "mse",
    fold_bn: bool = True,
    bias_correction: bool = True,
    embedding_bits: int | None = 8,
    recurrent_bits: int | None = 8,
) -> nn.Module:
    """Quantize a model's weights to packed codes and win back the loss with low-rank adapters.

    Args:
        model: the float model; it is not changed. Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d layers
            are quantized (those of a MultiheadAttention too), embeddings and RNN, LSTM and GRU packed by
            rows, everything else stays float and is named in the report.
        calibration: iterable of batches, each a tensor, a tuple (inputs, labels) or a dict, with or
            without labels; or a `Calibration` of this model. A batch's first dimension is that of samples.
            How near a model's output is to the float one is judged by its classes, if it is a tensor
            [B, C], [B, T, C] or [B, C, H, W] or has such `logits`, else by the squared error; a regression
            of several values says so: `Calibration(model, batches, logits=lambda output: None)`.
        weight: one quantizer for all layers; or a dict from name patterns (fnmatch, the first that
            matches) to quantizers, layers that match none staying float. Without it each layer's bits,
            groups and rank are chosen together for `target_bits`. With it and a `target_bits` or
            `max_drop`, one quantizer says what they share: clip, symmetry and rounding.
        activation_bits: also quantize the inputs of quantized layers to 2..8 bits.
        rank_budget: with one quantizer, the stored adapter bits allowed, as a share of the stored bits of
            the float weights of the quantized layers: 0.05 of float32 weights are 1.6 bits a weight. 0:
            no adapters, here and where bits are chosen.
        adapter_bits: bits of an adapter's element: 2..8, 16 or 32. Without it 4, and where bits are
            chosen 4 or 8 in each layer.
        search: how ranks are chosen; None gives every layer the same share of its full rank.
        skip: names or patterns of layers that stay float.
        target_bits: stored bits a weight of the quantized layers, with scales, zero-points and adapters
            (if neither a quantizer nor `max_drop` is given 3.5, or the fewest that tiny layers can have).
        max_drop: instead, the fewest bits found at which at most so many points (0.5: half a percent) of
            the held-out calibration samples, half of all, change their answer.
        tune: how scales, biases and adapters are tuned at the end; None: not at all.
        propagate: quantize layers in their order, each fitted to the inputs that the quantized layers
            before it give (and to its quantized activations).
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
        embedding_bits: 2..8, width of the codes of embeddings, rounded to nearest with a scale a row; None:
            they stay float. `target_bits` does not count them.
        recurrent_bits: the same of the weights of RNN, LSTM and GRU, which compute with floats.

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
    joint = weight is None or target_bits is not None or max_drop is not None
    _check_target(weight, target_bits, max_drop)
    weight = QuantSpec() if weight is None else weight
    skip = _patterns(skip)
    search = SearchConfig(method="uniform") if search is None else search
    tune = TuneConfig(iterations=0) if tune is None else tune
    if not isinstance(tune, TuneConfig):
        raise TypeError(f"tune must be a TuneConfig or None, got {type(tune).__name__}")
    if hasattr(model, "report") and not isinstance(getattr(model, "report", None), Report):
        raise ValueError("model: it has something named `report`, where cora.quantize puts its own")
    check_rank_budget(rank_budget)
    _check_arguments(weight, activation_bits, adapter_bits, search, fit, first_last, activation)
    check_bits("embedding_bits", embedding_bits)
    check_bits("recurrent_bits", recurrent_bits)
    if isinstance(calibration, Calibration):
        calibration.check(model)
    else:
        calibration = Calibration(
            model, calibration, search.samples, search.seed, progress=progress, fold_bn=fold_bn
        )
    specs, reasons = _specs(calibration, weight, skip, first_last)
    by_rows: dict[str, QuantEmbedding | QuantRecurrent] = {
        **pack_embeddings(calibration.model, embedding_bits, partial(_matches, skip)),
        **pack_recurrent(calibration.model, recurrent_bits, partial(_matches, skip)),
    }
    reasons |= {n: "biases" for n, packed in by_rows.items() if isinstance(packed, QuantRecurrent)}
    inputs, outputs = _activation_ranges(calibration, activation_bits, activation, activation_range)
    inputs = {name: inputs[name] for name in specs if name in inputs}
    chooser = Chooser(
        calibration,
        specs,
        search,
        adapter_bits,
        fit,
        propagate,
        bias_correction,
        activation_simulator(activation_bits, set(specs), inputs, activation),
        progress,
    )
    if joint:
        ends = _ends(specs) if first_last == "8bit" else set()
        fitted, found = chooser.joint(target_bits, max_drop, bool(rank_budget), ends)
    else:
        fitted, found = chooser.fixed(rank_budget)

    layers = _pack(fitted, calibration, activation_bits, inputs, outputs)
    folded = {layer: norm for layer, norm in calibration.folded.items() if layer in layers}
    qmodel: Any = copied(model)
    if calibration.restructured:
        qmodel = restructure(qmodel)
    for name, layer in layers.items():
        layer.float_bias = qmodel.get_submodule(name).bias is not None
    places = {norm: FoldedBatchNorm() for norm in folded.values()}
    qmodel = replace_layers(qmodel, {**layers, **places, **by_rows})
    for module in qmodel.modules():
        module.training = False
    corrected = bias_correction and (fitted.in_order or correct_biases(qmodel, layers, calibration))
    # Input ranges of 8 bits cost nothing, and layers that share an input must share its range.
    tuned_ranges = inputs if inputs and activation_bits and activation_bits < 8 else None
    tuned = tune_layers(layers, chooser.evaluator(1), tune, tuned_ranges, progress)
    _check_runs(qmodel, calibration, chooser.simulate, activation_bits)
    settings = {
        "weight": _spec_settings(weight),
        "target_bits": found.get("target_bits"),
        "max_drop": max_drop,
        "activation_bits": activation_bits,
        "activation": activation if activation_bits else None,
        "activation_range": activation_range if inputs else None,
        "rank_budget": rank_budget,
        "adapter_bits": adapter_bits,
        "fit": fit,
        "first_last": first_last,
        "fold_bn": calibration.fold_bn,
        "folded": folded,
        "embedding_bits": embedding_bits,
        "recurrent_bits": recurrent_bits,
        "propagate": propagate,
        "propagated": fitted.in_order,
        "bias_correction": bias_correction,
        "biases_corrected": corrected,
        "tune": dataclasses.asdict(tune),
        "search": {
            key: value for key, value in dataclasses.asdict(search).items() if key != "label_loss"
        },
        "skip": skip,
        "calibration_samples": calibration.samples,
        "versions": versions(),
    }
    found |= {
        "ranks": {name: adapter.rank for name, adapter in fitted.adapters.items()},
        "adapter_bits": {n: a.bits for n, a in fitted.adapters.items() if a.rank},
        "interrupted": found["interrupted"] or tuned.interrupted,
        # nan where nothing was measured
        "tuning": {key: v for key, v in dataclasses.asdict(tuned).items() if v == v},
    }
    qmodel.report = make_report(
        qmodel, model, calibration, fitted.layers, layers, by_rows, found, reasons, settings
    )
    return qmodel


Ranges = dict[str, tuple[Tensor, Tensor]]
"""Layer -> scale and zero-point of a quantizer of its input or output."""


def _activation_ranges(
    calibration: Calibration, bits: int | None, activation: Activation, method: ActivationRange
) -> tuple[Ranges, Ranges]:
    """Static quantizers of all layers' inputs and outputs, none where they are float or dynamic."""
    if bits is None or activation != "static":
        return {}, {}
    return (
        calibration.activation_qparams(bits, method),
        calibration.activation_qparams(bits, method, "output"),
    )


def _pack(
    fitted: FittedLayers,
    calibration: Calibration,
    activation_bits: int | None,
    inputs: Ranges,
    outputs: Ranges,
) -> dict[str, QuantLayer]:
    """The packed layers."""
    layers: dict[str, QuantLayer] = {}
    for name, quantized in fitted.layers.items():
        float_layer: Any = fitted.network.get_submodule(name)
        rounded, shape = quantized.rounded, LayerShape.of(calibration.layers[name])
        packed = QuantWeight(rounded.packed(), rounded.qparams, fitted.adapters[name], shape)
        layers[name] = QUANT_LAYERS[type(float_layer)](float_layer, packed, activation_bits)
        if name in inputs:
            layers[name].set_activation_range(*inputs[name])
            layers[name].set_output_range(*outputs[name])
    return layers


# Of an output's size: what kernels and 16-bit types may differ by, and codes that fell on the other side.
_DIFFERENCE = {True: 0.2, False: 0.5}


def _check_runs(
    qmodel: nn.Module,
    calibration: Calibration,
    simulate: Callable[[nn.Module], Any],
    activation_bits: int | None,
) -> None:
    """Warn unless a packed model runs the layers that the float one runs, to the output of their weights.

    A model's own code may keep a layer where no module is looked for, or ask for its type.

    Raises:
        ValueError: it does not run at all.
    """
    batch = calibration.batches[0][:1]
    ran: set[str] = set()
    packed = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    handles = [
        module.register_forward_pre_hook(lambda _m, _x, name=name: ran.add(name))
        for name, module in packed.items()
    ]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(0)
            got = batch.run(qmodel)
        except Exception as error:
            raise ValueError(
                "model: it does not run with packed layers, which have no float parameters and are of "
                f"types of their own: {type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        reference = dequantize(qmodel).float()  # merged layers are of single precision
        with simulate(reference):
            torch.manual_seed(0)
            expected = batch.float().run(reference)
    idle = [name for name in packed if calibration.seen(name) and name not in ran]
    if idle:
        warnings.warn(
            f"model: {', '.join(idle[:3])} ran in the float model, but not in the packed one: its code does "
            "not find them by their names, and runs float layers instead",
            stacklevel=3,
        )
    for a, b in zip(float_tensors(expected), float_tensors(got), strict=False):
        gap = float((a - b).float().norm() / a.float().norm().clamp(min=1e-30))
        if not gap < _DIFFERENCE[activation_bits is None]:
            warnings.warn(
                f"model: the packed copy's output is {gap:.0%} from that of the same weights in float "
                "layers: its code may ask for a layer's type, attributes or weight",
                stacklevel=3,
            )
            return


def dequantize(qmodel: nn.Module) -> nn.Module:
    """A plain float model with weights and adapters merged: the oracle of the packed one.

    Activations are not quantized in it. The packed model is not changed.
    """
    kinds = (QuantLayer, QuantEmbedding, QuantRecurrent)
    layers = {n: m.to_float() for n, m in qmodel.named_modules() if isinstance(m, kinds)}
    if not any(isinstance(m, QuantLayer) for m in qmodel.modules()):
        raise ValueError("qmodel: expected a model with packed layers, found none")
    report = qmodel.__dict__.pop("report", None)
    try:
        model = copy.deepcopy(qmodel)
    finally:
        if report is not None:
            qmodel.report = report
    return replace_layers(model, layers)


def _patterns(skip: Any) -> list[str]:
    several = isinstance(skip, Iterable) and not isinstance(skip, str)
    names = list(skip) if several else [skip]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"skip must be names or patterns of layers, got {skip!r}")
    return sorted(set(names))


def _check_target(weight: Any, target_bits: Any, max_drop: Any) -> None:
    for name, value in (("target_bits", target_bits), ("max_drop", max_drop)):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            raise ValueError(f"{name} must be a positive number or None, got {value!r}")
    if target_bits is not None and max_drop is not None:
        raise ValueError("target_bits and max_drop: give one of them, got both")
    if isinstance(weight, Mapping) and (target_bits is not None or max_drop is not None):
        raise ValueError(
            "weight must be one QuantSpec or None where target_bits or max_drop is given, got a dict"
        )


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
    check_bits("activation_bits", activation_bits)
    if adapter_bits is not None:
        check_adapter_bits(adapter_bits)
    if not isinstance(search, SearchConfig):
        raise TypeError(f"search must be a SearchConfig or None, got {type(search).__name__}")
    for name, value, choices in (
        ("fit", fit, Fit),
        ("first_last", first_last, FirstLast),
        ("activation", activation, Activation),
    ):
        allowed = get_args(choices)
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
    reasons = {
        name: "named in skip" if _matches(skip, name) else reason
        for name, reason in calibration.kept_float.items()
    }
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
        if _matches(skip, name):
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
        for name in _ends(specs):
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


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _ends(specs: Mapping[str, QuantSpec]) -> set[str]:
    """The first and the last layer."""
    names = list(specs)
    return {names[0], names[-1]}


def _spec_settings(weight: QuantSpec | Mapping[str, QuantSpec]) -> dict[str, Any]:
    if isinstance(weight, QuantSpec):
        return dataclasses.asdict(weight)
    return {pattern: dataclasses.asdict(spec) for pattern, spec in weight.items()}
