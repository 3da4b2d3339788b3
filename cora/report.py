"""What a quantization did: per layer, in total, and how the ranks were found."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .embedding import QuantEmbedding
from .fitting import QuantizedLayer
from .lowrank import FloatLayer
from .modules import QuantLayer
from .recurrent import QuantRecurrent

__all__ = [
    "SPECTRUM_POINTS",
    "FloatEntry",
    "LayerReport",
    "Report",
    "RowsReport",
    "float_state",
    "float_state_bits",
    "float_weight_bits",
    "make_report",
    "report_of",
]

SPECTRUM_POINTS = 64  # singular values kept of a layer, at most


def float_weight_bits(layers: Iterable[FloatLayer]) -> int:
    """Bits that the float weights of some layers take: what `rank_budget` is a share of.

    Only the layers that are quantized count: weights that stay float (an LSTM's, say) would lend their
    bits to adapters of other layers, where more bits for the weight itself would serve better.
    """
    return sum(layer.weight.numel() * layer.weight.element_size() * 8 for layer in layers)


def float_state_bits(model: nn.Module) -> int:
    """Bits of everything in a model's state dict, tensors that share storage counted once."""
    seen: set[tuple[int, int, Any]] = set()
    total = 0
    for tensor in model.state_dict().values():
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        total += tensor.numel() * tensor.element_size() * 8
    return total


@dataclass(slots=True)
class LayerReport:
    """One quantized layer. Energies are of the residual as seen at the layer's output, relative to it.

    Args:
        name, kind: of the layer.
        weight_shape: of the float weight.
        bits, granularity, group_size, clip: the quantizer.
        rank, full_rank: of the adapter, a group.
        weights: number of weights.
        stored_bits: in the file, by part: weight, adapter, bias, activation.
        residual_before, residual_after: residual energy over output energy, without and with adapter.
        sqnr_db: signal to quantization noise at the output, decibels, on calibration inputs.
        weight_error: squared error of the weight over its energy, without adapter.
        spectrum: leading singular values of the residual, group mean, relative to the first.
    """

    name: str
    kind: str
    weight_shape: list[int]
    bits: int
    granularity: str
    group_size: int | None
    clip: str
    rank: int
    full_rank: int
    weights: int
    stored_bits: dict[str, int]
    residual_before: float
    residual_after: float
    sqnr_db: float
    weight_error: float
    spectrum: list[float] = field(default_factory=list)

    @property
    def total_bits(self) -> int:
        return sum(self.stored_bits.values())


@dataclass(slots=True)
class RowsReport:
    """A weight [rows, columns] packed by rows, outside of the budget: an embedding's, a recurrent layer's.

    Args:
        name, kind: of the weight and its module.
        weight_error: squared error over its energy.
    """

    name: str
    kind: str
    rows: int
    columns: int
    bits: int
    stored_bits: int
    weight_error: float


@dataclass(slots=True)
class FloatEntry:
    """A module that keeps float parameters or buffers, and why."""

    name: str
    kind: str
    stored_bits: int
    reason: str


@dataclass(slots=True)
class Report:
    """The whole of it; `str(report)` is a table, `to_html` a page with plots.

    Args:
        layers: the quantized layers, in the model's order.
        float_entries: what stays float.
        totals: bits of everything (see `totals_of`).
        settings: the arguments of the quantization.
        search: method, ranks, history, losses of the candidates on held-out calibration samples; where
            bits were chosen the front of plans; what tuning did (see `cora.tuning.TuneResult`).
        comparison: rows put beside the result by `cora.compare`, empty otherwise.
        by_rows: what is packed by rows: embeddings, recurrent layers.
    """

    layers: list[LayerReport]
    float_entries: list[FloatEntry]
    totals: dict[str, float]
    settings: dict[str, Any]
    search: dict[str, Any]
    comparison: list[dict[str, Any]] = field(default_factory=list)
    by_rows: list[RowsReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        return Report(
            layers=[LayerReport(**layer) for layer in values["layers"]],
            float_entries=[FloatEntry(**entry) for entry in values["float_entries"]],
            totals=values["totals"],
            settings=values["settings"],
            search=values["search"],
            comparison=values["comparison"],
            by_rows=[RowsReport(**entry) for entry in values["by_rows"]],
        )

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page: totals, comparison, plots of ranks, spectra and search.

        Needs matplotlib.
        """
        from .html import write_html  # matplotlib is optional

        write_html(self, path)

    def __str__(self) -> str:
        head = f"{'layer':<28} {'shape':<18} {'bits':>4} {'rank':>9} {'stored':>10} {'SQNR':>8}"
        lines = [head, "-" * len(head)]
        for layer in self.layers:
            shape = "x".join(map(str, layer.weight_shape))
            rank = f"{layer.rank}/{layer.full_rank}"
            kib = layer.total_bits / 8192
            lines.append(
                f"{layer.name:<28} {shape:<18} {layer.bits:>4} {rank:>9} {kib:>6.1f} KiB "
                f"{layer.sqnr_db:>5.1f} dB"
            )
        for packed in self.by_rows:
            kib, decibels = (
                packed.stored_bits / 8192,
                -10 * math.log10(packed.weight_error or 1e-99),
            )
            lines.append(
                f"{packed.name:<28} {f'{packed.rows}x{packed.columns}':<18} {packed.bits:>4} {'':>9} "
                f"{kib:>6.1f} KiB {decibels:>5.1f} dB"
            )
        for entry in self.float_entries:
            kib = entry.stored_bits / 8192
            lines.append(
                f"{entry.name:<28} {'float':<18} {'':>4} {'':>9} {kib:>6.1f} KiB  {entry.reason}"
            )
        t = self.totals
        lines += [
            "-" * len(head),
            f"stored {t['total_bits'] / 8192:.1f} KiB of {t['float_total_bits'] / 8192:.1f} KiB float "
            f"({t['compression']:.2f}x); {t['bits_per_weight']:.2f} bits a quantized weight, "
            f"adapters {t['adapter_share']:.2%} of the float weights",
        ]
        changed = self.search.get("changed")
        if changed is not None:
            lines.append(
                f"{changed:.2%} of the held-out answers changed before tuning, "
                f"{self.settings['max_drop']:g} % were allowed"
            )
            answers = self.search.get("answers")
            if answers and answers * self.settings["max_drop"] < 100:
                lines.append(
                    f"with {answers} held-out answers that allows none to change: more calibration samples "
                    "would allow fewer bits"
                )
        tuning = self.search.get("tuning", {})
        if tuning.get("step"):
            lines.append(
                f"tuned {tuning['step']} steps: loss on held-out samples {tuning['before']:.4g} -> "
                f"{tuning['after']:.4g} ({tuning['train']:.4g} on those it was tuned with)"
            )
        if tuning.get("alarm"):
            lines.append(
                "tuning raised the held-out loss on its way: try a lower learning rate"
                if tuning["step"]
                else "tuning did not bring held-out samples closer: nothing of it was kept"
            )
        return "\n".join(lines)


def report_of(qmodel: nn.Module) -> Report:
    """The report of a model that `cora.quantize` or `cora.load` returned.

    Raises:
        ValueError: there is none.
    """
    report = qmodel.__dict__.get("report")
    if not isinstance(report, Report):
        raise ValueError("qmodel: expected a result of cora.quantize with its report, found none")
    return report


def totals_of(
    layers: list[LayerReport],
    by_rows: list[RowsReport],
    entries: list[FloatEntry],
    float_weights: int,
    float_total: int,
) -> dict[str, float]:
    """Sums over a quantized model, in bits; total_bits is the file without its header.

    Args:
        float_weights: bits of the quantized layers' float weights, what the budget is a share of.
        float_total: bits of the float model with everything in it.

    `bits_per_weight` counts what stores weights (codes, scales, zero-points, adapters) over the layers' weights;
    biases and input ranges are in the other sums.
    """
    codes = sum(layer.stored_bits["weight"] for layer in layers)
    adapter = sum(layer.stored_bits["adapter"] for layer in layers)
    weights = sum(layer.weights for layer in layers)
    quantized = sum(layer.total_bits for layer in layers)
    packed_rows = sum(row.stored_bits for row in by_rows)
    rest = sum(entry.stored_bits for entry in entries)
    total = quantized + packed_rows + rest
    return {
        "total_bits": total,
        "weight_bits": codes,
        "adapter_bits": adapter,
        "bias_bits": sum(layer.stored_bits["bias"] for layer in layers),
        "activation_bits": sum(layer.stored_bits["activation"] for layer in layers),
        "row_bits": packed_rows,
        "float_bits": rest,
        "float_total_bits": float_total,
        "float_weight_bits": float_weights,
        "quantized_weights": weights,
        "bits_per_weight": (codes + adapter) / weights,
        "adapter_share": adapter / float_weights,
        "compression": float_total / total,
    }


def float_state(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(module's name, module, key, tensor) of every parameter and persistent buffer outside packed weights,
    once each."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer | QuantEmbedding):
            continue
        held = {**module._parameters, **module._buffers}
        if isinstance(module, QuantRecurrent):
            held = dict(module._parameters)  # its buffers are codes
        for key, tensor in held.items():
            if tensor is None or key in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield name, module, key, tensor


def float_entries(qmodel: nn.Module, reasons: dict[str, str]) -> list[FloatEntry]:
    """Modules outside the packed layers that store tensors of their own."""
    entries: dict[str, FloatEntry] = {}
    for name, module, _, tensor in float_state(qmodel):
        if name not in entries:
            reason = next(
                (
                    why
                    for prefix, why in reasons.items()
                    if name == prefix or name.startswith(prefix + ".")
                ),
                "not a weight matrix",
            )
            entries[name] = FloatEntry(name, type(module).__name__, 0, reason)
        entries[name].stored_bits += tensor.numel() * tensor.element_size() * 8
    return [entry for entry in entries.values() if entry.stored_bits]


def make_report(
    qmodel: nn.Module,
    model: nn.Module,
    calibration: Calibration,
    quantized: Mapping[str, QuantizedLayer],
    layers: Mapping[str, QuantLayer],
    by_rows: Mapping[str, QuantEmbedding | QuantRecurrent],
    found: dict[str, Any],
    reasons: dict[str, str],
    settings: dict[str, Any],
) -> Report:
    """The report of a quantization.

    Args:
        qmodel, model: packed and float.
        quantized, layers: each quantized layer, as fitted and as packed.
        by_rows: packed embeddings and recurrent layers.
        found, reasons, settings: `Report.search`, why modules stay float, `Report.settings`.
    """
    rows = []
    for name, q in quantized.items():
        packed, float_layer = layers[name], calibration.layers[name]
        shape = q.fit.shape
        original = calibration.matrix(name)
        signal = calibration.energy(name, original) if original.any() else 1.0
        before = calibration.energy(name, original - q.fit.dequantized)
        after = calibration.energy(name, original - packed.matrix())
        singular = q.fit.energies().sqrt()  # none where no adapter was wanted
        spectrum = (singular / singular[:1].clamp(min=1e-30)).tolist()
        step = max(1, -(-len(spectrum) // SPECTRUM_POINTS))
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
    held = {name for name, _ in qmodel.named_modules()}  # embeddings that share rows: once
    rows_packed = [
        row
        for name, packed in by_rows.items()
        if name in held
        for row in _rows_reports(name, packed, calibration.model.get_submodule(name))
    ]
    entries = float_entries(qmodel, reasons)
    float_bits = float_weight_bits(calibration.layers[name] for name in quantized)
    return Report(
        layers=rows,
        float_entries=entries,
        totals=totals_of(rows, rows_packed, entries, float_bits, float_state_bits(model)),
        settings=settings,
        search=found,
        by_rows=rows_packed,
    )


def _rows_reports(
    name: str, packed: QuantEmbedding | QuantRecurrent, original: nn.Module
) -> list[RowsReport]:
    if isinstance(packed, QuantEmbedding):
        parts = {"weight": (name, packed.stored_bits())}
    else:
        parts = {key: (f"{name}.{key}", packed.stored_bits(key)) for key in packed.scale_dtypes}
    reports = []
    for key, (label, stored) in parts.items():
        weight = original.get_parameter(key).detach().float()
        error = _relative_error(weight, getattr(packed, key).float())
        kind = type(original).__name__
        rows, columns = weight.shape
        reports.append(RowsReport(label, kind, rows, columns, packed.bits, stored, error))
    return reports


def _relative_error(original: Tensor, dequantized: Tensor) -> float:
    energy = float(original.square().sum(dtype=torch.float64)) or 1.0
    return float((original - dequantized).square().sum(dtype=torch.float64)) / energy


def _decibels(ratio: float) -> float:
    return 10 * float(torch.log10(torch.tensor(ratio, dtype=torch.float64)))


def versions() -> dict[str, str]:
    """What the result depends on."""
    from . import __version__, ops

    return {
        "cora": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "isa": ops.isa()["level"],
    }
