"""The rows that stand beside a result: float, plain, same bits without adapters, uniform ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .calibration import Calibration, divergence
from .convert import quantize
from .lowrank import LayerShape
from .quantizer import SUPPORTED_BITS, QuantSpec, packed_bytes
from .report import Report, float_state_bits
from .search import SearchConfig

__all__ = ["compare", "same_bits_specs"]

_GROUPS = (None, 512, 256, 128, 96, 64, 48, 32, 24, 16, 12, 8)


def compare(
    model: nn.Module,
    calibration: Calibration,
    qmodel: nn.Module,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Put a quantized model beside what the same bits buy otherwise, on the same data.

    The rows: the float model; plain quantization with the same quantizer; the best quantization
    without adapters that takes no more stored bits (more bits, finer groups); the same adapters with
    uniform ranks; and `qmodel`.

    Args:
        model: the float model.
        calibration: the `Calibration` that qmodel was made with.
        qmodel: a result of `cora.quantize` with one QuantSpec for all layers.
        evaluate: model -> metrics; by default the divergence from the float model on the calibration data.

    Returns:
        One dict a row: "row", "bits_per_weight", "total_bits", and the metrics. Also kept in
        `qmodel.report.comparison`.
    """
    settings = qmodel.report.settings
    if "bits" not in settings["weight"]:
        raise ValueError("qmodel: compare needs one QuantSpec for all layers, got several")
    spec = QuantSpec(**settings["weight"])
    evaluate = evaluate or (lambda m: {"kl": calibration_divergence(m, calibration)})
    options = {
        key: settings[key]
        for key in ("activation_bits", "adapter_bits", "fit", "first_last", "skip", "reestimate_bn")
    }
    if settings["activation_bits"]:
        options["activation"] = settings["activation"]
        options["activation_range"] = settings["activation_range"] or "mse"

    def plain(other: QuantSpec | dict[str, QuantSpec]) -> nn.Module:
        return quantize(model, calibration, other, rank_budget=0, progress=progress, **options)

    rows = [
        {
            "row": "float",
            "bits_per_weight": 32.0,
            "total_bits": float_state_bits(model),
            **evaluate(model),
        }
    ]

    def add(label: str, candidate: nn.Module) -> None:
        totals = candidate.report.totals
        rows.append(
            {
                "row": label,
                "bits_per_weight": totals["bits_per_weight"],
                "total_bits": totals["total_bits"],
                **evaluate(candidate),
            }
        )

    add(f"{spec.bits}-bit, no adapters", plain(spec))
    best, best_loss, best_label = None, float("inf"), ""
    for label, specs in same_bits_specs(calibration, qmodel.report, spec):
        candidate = plain(specs)
        loss = calibration_divergence(candidate, calibration)
        if loss < best_loss:
            best, best_loss, best_label = candidate, loss, label
    if best is not None:
        add(f"same bits, no adapters ({best_label})", best)
    if settings["rank_budget"]:
        uniform = quantize(
            model,
            calibration,
            spec,
            rank_budget=settings["rank_budget"],
            search=None,
            progress=progress,
            **options,
        )
        add(f"{spec.bits}-bit + adapters, uniform ranks", uniform)
        method = settings["search"]["method"]
        add(
            f"{spec.bits}-bit + adapters, {'searched' if method == 'gate' else method} ranks",
            qmodel,
        )
    qmodel.report.comparison = rows
    return rows


def calibration_divergence(candidate: nn.Module, calibration: Calibration) -> float:
    """Mean divergence from the float model over the calibration samples (see `divergence`)."""
    total = 0.0
    with torch.no_grad():
        for batch, teacher in zip(calibration.batches, calibration.teacher(), strict=True):
            output = batch.run(candidate)
            total += float(divergence(output, teacher, calibration.logits)) * len(batch)
    return total / calibration.samples


def same_bits_specs(
    calibration: Calibration, report: Report, spec: QuantSpec
) -> Iterator[tuple[str, dict[str, QuantSpec]]]:
    """Quantizers without adapters whose stored bits come closest to a report's, from below.

    For each number of bits, the finest groups that fit; a layer takes the largest divisor of its row
    that is no larger than the group.
    """
    names = [layer.name for layer in report.layers]
    allowed = sum(
        layer.stored_bits["weight"] + layer.stored_bits["adapter"] for layer in report.layers
    )
    shapes = {name: LayerShape.of(calibration.layers[name]) for name in names}
    fixed = {layer.name: layer.bits for layer in report.layers if layer.bits != spec.bits}
    for bits in SUPPORTED_BITS:
        if bits < spec.bits:
            continue
        found: tuple[str, dict[str, QuantSpec]] | None = None
        for group in _GROUPS:
            specs = {}
            total = 0
            for name, shape in shapes.items():
                own = fixed.get(name, bits)
                specs[name] = _grouped(spec, own, group, shape)
                total += _bits(specs[name], shape)
            if total > allowed:
                break
            label = f"{bits}-bit" + (f", groups of {group}" if group else "")
            found = (label, specs)
        if found is not None:
            yield found


def _grouped(spec: QuantSpec, bits: int, group: int | None, shape: LayerShape) -> QuantSpec:
    if group is None or group >= shape.columns:
        return spec.replace(bits=bits)
    size = next(n for n in range(group, 0, -1) if shape.columns % n == 0)
    return spec.replace(bits=bits, granularity="per_group", group_size=size)


def _bits(spec: QuantSpec, shape: LayerShape) -> int:
    scales = 1 if spec.granularity == "per_tensor" else shape.rows * spec.groups_of(shape.columns)
    zero = 0 if spec.symmetric else spec.bits
    return 8 * packed_bytes(shape.rows, shape.columns, spec.bits) + scales * (16 + zero)
