"""The rows that stand beside a result: float, plain, same bits without adapters, uniform ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .calibration import Calibration
from .convert import quantize
from .lowrank import LayerShape
from .modules import copied
from .quantizer import SUPPORTED_BITS, QuantSpec, choose_qparams, packed_bytes, weight_bits
from .report import Report, float_state_bits, report_of
from .search import SearchConfig
from .tuning import TuneConfig

__all__ = ["compare", "same_bits_specs"]

_GROUPS = (512, 384, 256, 192, 128, 96, 80, 64, 56, 48, 40, 36, 32, 28, 24, 20, 18, 16, 12, 8)


def compare(
    model: nn.Module,
    calibration: Calibration,
    qmodel: nn.Module,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Put a quantized model beside what the same bits buy otherwise, on the same data.

    The rows: the float model; rounding to nearest and error feedback with the same bits in every layer (where
    bits were chosen, as many as fit and one more), nothing tuned; the best without adapters that takes no more
    stored bits; with one quantizer also uniform ranks; and `qmodel`.

    Args:
        model: the float model.
        calibration: the `Calibration` that qmodel was made with.
        qmodel: a result of `cora.quantize`, but not with a dict of quantizers.
        evaluate: model -> metrics; by default the divergence from the float model on the calibration data.

    Returns:
        One dict a row: "row", "bits_per_weight", "total_bits", and the metrics. Also kept in
        `qmodel.report.comparison`.
    """
    report = report_of(qmodel)
    settings = report.settings
    if "bits" not in settings["weight"]:
        raise ValueError("qmodel: compare needs one QuantSpec for all layers, got several")
    spec = QuantSpec(**settings["weight"])
    joint = report.search["method"] == "joint"
    measure = evaluate or (lambda m: {"kl": calibration.divergence(m)})

    def metrics(candidate: nn.Module) -> dict[str, float]:
        found = measure(candidate)
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            raise TypeError(f"evaluate must return a dict of metrics, got {kind}")
        return {name: float(value) for name, value in found.items()}

    options: dict[str, Any] = {
        key: settings[key]
        for key in (
            "activation_bits",
            "adapter_bits",
            "fit",
            "first_last",
            "skip",
            "fold_bn",
            "bias_correction",
            "propagate",
            "embedding_bits",
            "recurrent_bits",
        )
    }
    options["tune"] = TuneConfig(**settings["tune"])
    options["search"] = SearchConfig(**settings["search"])
    if settings["activation_bits"]:
        options["activation"] = settings["activation"]
        options["activation_range"] = settings["activation_range"] or "mse"

    def make(weight: QuantSpec | dict[str, QuantSpec], **changes: Any) -> nn.Module:
        if isinstance(weight, dict):
            changes["first_last"] = "same"
        return quantize(
            model,
            calibration,
            weight,
            progress=progress,
            **{**options, "rank_budget": 0, **changes},
        )

    rows: list[dict[str, Any]] = [
        {
            "row": "float",
            "bits_per_weight": 32.0,
            "total_bits": float_state_bits(model),
            **metrics(copied(model)),
        }
    ]

    def add(label: str, candidate: nn.Module) -> None:
        totals = report_of(candidate).totals
        rows.append(
            {
                "row": label,
                "bits_per_weight": totals["bits_per_weight"],
                "total_bits": totals["total_bits"],
                **metrics(candidate),
            }
        )

    stored = report.totals["bits_per_weight"]
    plain = {"tune": None, "propagate": False}
    for uniform in _uniform(spec, report) if joint else [spec]:
        add(f"{uniform.bits}-bit, nearest", make(uniform.replace(rounding="nearest"), **plain))
        add(f"{uniform.bits}-bit, error feedback", make(uniform.replace(rounding="gptq"), **plain))
    if joint:
        if any(layer.rank for layer in report.layers):
            add("same bits, no adapters", make(spec, target_bits=stored))
        add("cora, bits and ranks chosen", qmodel)
    else:
        best, best_loss, best_label = None, float("inf"), ""
        for label, specs in same_bits_specs(calibration, report, spec):
            loss = calibration.divergence(make(specs, **plain))
            if loss < best_loss:
                best, best_loss, best_label = specs, loss, label
        if best is not None:
            add(f"same bits, no adapters ({best_label})", make(best))
        if settings["rank_budget"]:
            with contextlib.suppress(ValueError):  # fewer bits than the cheapest mixture takes
                mixed = make(spec, target_bits=stored)
                add("same bits, no adapters (bits chosen)", mixed)
            budget = {"rank_budget": settings["rank_budget"], "search": None}
            add(f"{spec.bits}-bit + adapters, uniform ranks", make(spec, **budget))
            method = settings["search"]["method"]
            ranks = "searched" if method == "gate" else method
            add(f"{spec.bits}-bit + adapters, {ranks} ranks", qmodel)
    report.comparison = rows
    return rows


def _uniform(spec: QuantSpec, report: Report) -> list[QuantSpec]:
    """The same bits a channel in every layer: the most within a report's stored bits, and the next ones."""
    allowed = sum(row.stored_bits["weight"] + row.stored_bits["adapter"] for row in report.layers)
    channel = spec.replace(granularity="per_channel", group_size=None)
    shapes = [
        LayerShape(row.weight_shape[0], row.weights // row.weight_shape[0], 1)
        for row in report.layers
    ]
    widths = [channel.replace(bits=bits) for bits in SUPPORTED_BITS]
    fitting = sum(sum(_least_bits(width, shape) for shape in shapes) <= allowed for width in widths)
    return widths[max(fitting - 1, 0) : fitting + 1]


def same_bits_specs(
    calibration: Calibration, report: Report, spec: QuantSpec
) -> Iterator[tuple[str, dict[str, QuantSpec]]]:
    """Quantizers without adapters whose stored bits come closest to a report's, from below.

    For each number of bits, the finest groups that fit; a layer takes the largest divisor of its row
    that is no larger than the group.

    Yields:
        A label, and the quantizer of every layer in the report.
    """
    rows = report.layers
    allowed = sum(row.stored_bits["weight"] + row.stored_bits["adapter"] for row in rows)
    shapes = {row.name: LayerShape.of(calibration.layers[row.name]) for row in rows}
    for bits in SUPPORTED_BITS:
        if bits < spec.bits:
            continue
        fitting: list[tuple[int, str, dict[str, QuantSpec]]] = []
        for label, base, group in _ladder(spec):
            specs = {}
            for row in rows:  # a layer with bits of its own (first, last) keeps them
                own = base.replace(bits=bits if row.bits == spec.bits else row.bits)
                specs[row.name] = _grouped(own, group, shapes[row.name])
            least = sum(_least_bits(specs[name], shape) for name, shape in shapes.items())
            if least <= allowed:
                fitting.append((least, f"{bits}-bit{label}", specs))
        for _, label, specs in sorted(fitting, key=lambda entry: -entry[0]):
            if sum(_bits(specs[name], calibration, name) for name in specs) <= allowed:
                yield label, specs
                break


def _ladder(spec: QuantSpec) -> Iterator[tuple[str, QuantSpec, int | None]]:
    """The quantizer as it is, then per channel and in groups: label, quantizer, group."""
    yield "", spec, None
    channel = spec.replace(granularity="per_channel", group_size=None)
    if spec != channel:
        yield ", per channel", channel, None
    for group in _GROUPS:
        yield f", groups of {group}", channel, group


def _grouped(spec: QuantSpec, group: int | None, shape: LayerShape) -> QuantSpec:
    if group is None or group >= shape.columns:
        return spec
    size = next(n for n in range(group, 0, -1) if shape.columns % n == 0)
    return spec.replace(granularity="per_group", group_size=size)


def _least_bits(spec: QuantSpec, shape: LayerShape) -> int:
    """Stored bits of a weight if its scales fit float16 and its zero-points fit a code."""
    scales = 1 if spec.granularity == "per_tensor" else shape.rows * spec.groups_of(shape.columns)
    zero = 0 if spec.symmetric else 8 * packed_bytes(1, scales, spec.bits)
    return 8 * packed_bytes(shape.rows, shape.columns, spec.bits) + 16 * scales + zero


def _bits(spec: QuantSpec, calibration: Calibration, name: str) -> int:
    """Stored bits of a layer's weight."""
    matrix = calibration.matrix(name)
    return weight_bits(matrix.shape[0], matrix.shape[1], choose_qparams(matrix, spec))
