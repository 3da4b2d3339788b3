"""Reports as web pages: self-contained HTML, plots drawn by matplotlib and embedded as SVG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_file
from .tables import comparison_table, kib, metrics_of

if TYPE_CHECKING:
    from .report import Report

__all__ = [
    "LABELLED_LAYERS",
    "Section",
    "figure",
    "html_table",
    "image",
    "plot_candidates",
    "plot_front",
    "plot_ranks",
    "plot_search",
    "plot_size",
    "plot_spectra",
    "plot_tuning",
    "report_sections",
    "svg",
    "write_html",
    "write_page",
]

Section = tuple[str, str]
"""A heading and the HTML below it."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff;
       max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #dde1e6;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; }
th { color: #5a6472; font-weight: 600; } tr.best td { background: #e8f3ec; font-weight: 600; }
img { max-width: 100%; height: auto; } p, figcaption { color: #3a424c; }
"""
_BLUE, _GREY, _ORANGE, _GREEN = "#2060a8", "#c3cad3", "#d07818", "#208050"
LABELLED_LAYERS = 60  # beyond it names under the bars could not be read


# --- Building blocks -----------------------------------------------------------------------------


def figure(width: float = 9.0, height: float = 4.0, columns: int = 1, **options: Any) -> Any:
    """A matplotlib figure and its axes, independent of any display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(1, columns, **options)


def svg(drawn: Any, caption: str) -> str:
    """A matplotlib figure as an <img> that holds the SVG; the same figure gives the same bytes."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "cora"}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    return _embed("image/svg+xml", stream.getvalue(), caption)


def image(picture: Any, caption: str) -> str:
    """A Pillow image as an <img> that holds the PNG."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return _embed("image/png", stream.getvalue(), caption)


def _embed(kind: str, content: bytes, caption: str) -> str:
    text = html.escape(caption)
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img src="data:{kind};base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def html_table(
    head: Sequence[str],
    cells: Sequence[Sequence[Any]],
    best: int | None = None,
    text_columns: Sequence[int] = (),
) -> str:
    """A table, everything in it escaped.

    Args:
        head, cells: texts.
        best: a row to mark.
        text_columns: columns of prose, aligned left.
    """
    lines = ["".join(f"<th>{html.escape(str(text))}</th>" for text in head)]
    for index, row in enumerate(cells):
        mark = ' class="best"' if index == best else ""
        line = "".join(
            f"<td{' class=text' if i in text_columns else ''}>{html.escape(str(text))}</td>"
            for i, text in enumerate(row)
        )
        lines.append(f"<tr{mark}>{line}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{lines[0]}</tr></thead>'
        f"<tbody>{''.join(lines[1:])}</tbody></table></div>"
    )


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page of sections. The file appears whole or not at all.

    Args:
        path: of the file.
        title, lead: texts at its head, escaped here.
        sections: headings (escaped here) and HTML (taken as it is).

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    body = "".join(f"<h2>{html.escape(head)}</h2>{content}" for head, content in sections)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{body}</body></html>\n"
    )
    write_file(path, page.encode())


# --- Plots of one report -------------------------------------------------------------------------


def plot_ranks(report: Report) -> Any:
    """Each layer's rank as a share of full rank, and its residual energy without and with it."""
    layers = report.layers
    drawn, (left, right) = figure(10.5, max(2.4, 0.9 + 0.21 * len(layers)), 2, sharey=True)
    rows = range(len(layers))
    left.barh(rows, [100.0] * len(layers), color="#eef1f4")
    left.barh(rows, [100 * layer.rank / layer.full_rank for layer in layers], color=_BLUE)
    left.set_xlabel("rank kept, % of full rank")
    left.set_xlim(0, 100)
    left.invert_yaxis()
    right.scatter(
        [100 * layer.residual_before for layer in layers],
        rows,
        s=22,
        facecolors="none",
        edgecolors=_ORANGE,
        label="quantized",
    )
    right.scatter(
        [100 * layer.residual_after for layer in layers],
        rows,
        s=22,
        color=_BLUE,
        label="with adapter",
    )
    right.set_xscale("log")
    right.set_xlabel("error at the layer's output, % of its energy")
    right.grid(axis="x", alpha=0.3)
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    if len(layers) <= LABELLED_LAYERS:
        left.set_yticks(list(rows), [layer.name for layer in layers], fontsize=7)
        for row, layer in zip(rows, layers, strict=True):
            colour = "white" if layer.rank > 0.9 * layer.full_rank else "black"
            text = f"{layer.rank}/{layer.full_rank}"
            left.text(99, row, text, ha="right", va="center", size=7, color=colour)
    else:
        left.set_ylabel("layer, in the model's order")
    return drawn


def plot_spectra(report: Report) -> Any:
    """Singular values of each layer's residual, a dot where its adapter ends; None if unknown."""
    layers = [layer for layer in report.layers if len(layer.spectrum) > 1]
    if not layers:
        return None
    from matplotlib import colormaps

    drawn, axes = figure(9, 4)
    for index, layer in enumerate(layers):
        colour = colormaps["viridis"](0.9 * index / max(len(layers) - 1, 1))
        points = len(layer.spectrum)
        # Every `step`-th value is kept.
        step = next(s for s in range(1, layer.full_rank + 1) if -(-layer.full_rank // s) <= points)
        share = [100 * i * step / layer.full_rank for i in range(points)]
        label = layer.name if len(layers) <= 16 else None
        axes.plot(share, layer.spectrum, color=colour, linewidth=1.1, label=label)
        if layer.rank:
            end = min(round(layer.rank / step), points - 1)
            axes.plot(share[end], layer.spectrum[end], "o", color=colour, markersize=5)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-4, min(v for la in layers for v in la.spectrum if v > 0) / 2))
    axes.set_xlabel("singular direction, % of full rank")
    axes.set_ylabel("singular value, relative")
    axes.grid(alpha=0.3)
    if len(layers) <= 16:
        axes.legend(fontsize=6.5, ncols=2)
    return drawn


def plot_search(report: Report) -> Any:
    """The search's loss: gradient steps, candidates on held-out samples, the best; or None."""
    history = report.search.get("history") or []
    if not history:
        return None
    gradient = [entry for entry in history if entry["kind"] == "gradient"]
    candidates = [entry for entry in history if entry["kind"] != "gradient"]
    drawn, axes = figure(9, 3.6)
    if gradient:
        axes.plot(
            [entry["step"] for entry in gradient],
            [entry["loss"] for entry in gradient],
            color=_GREY,
            linewidth=1,
            label="a batch, soft ranks",
        )
    kinds = list(dict.fromkeys(entry["kind"] for entry in candidates))
    colours = (_ORANGE, "#a04080", _GREEN, _BLUE, "#404040", "#8050c0")
    for kind, colour in zip(kinds, colours * (1 + len(kinds)), strict=False):
        own = [entry for entry in candidates if entry["kind"] == kind]
        axes.plot(
            [entry["step"] for entry in own],
            [entry["loss"] for entry in own],
            "o",
            color=colour,
            markersize=4,
            label=f"held-out: {kind}",
        )
    accepted = [entry for entry in candidates if entry["accepted"]]
    if accepted:
        end = max(entry["step"] for entry in history)
        axes.step(
            [*(entry["step"] for entry in accepted), end],
            [*(entry["loss"] for entry in accepted), accepted[-1]["loss"]],
            where="post",
            color="black",
            linewidth=1,
            label="best so far",
        )
    if all(entry["loss"] > 0 for entry in history):
        axes.set_yscale("log")
    axes.set_xlabel("step of the search")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return drawn


def plot_front(report: Report) -> Any:
    """Predicted loss against stored bits of the plans the chosen one lies among; None if bits were given."""
    front = report.search.get("front")
    if not front:
        return None
    drawn, axes = figure(9, 3.4)
    bits, losses = zip(
        *((plan["bits_per_weight"], plan["predicted"]) for plan in front), strict=True
    )
    axes.plot(bits, losses, "o-", color=_BLUE, markersize=3, linewidth=1)
    chosen = report.search["target_bits"]
    axes.axvline(chosen, color=_ORANGE, linestyle="--", linewidth=1, label=f"{chosen:.2f} bits")
    axes.set_yscale("log")
    axes.set_xlabel("stored bits a weight")
    axes.set_ylabel("predicted divergence, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn


def plot_tuning(report: Report) -> Any:
    """Loss of the tuning's steps and of its held-out samples; None if nothing was tuned."""
    tuning = report.search.get("tuning") or {}
    history = tuning.get("history")
    if not history:
        return None
    drawn, axes = figure(9, 3.2)
    for kind, style, colour in (("gradient", "-", _GREY), ("held out", "o-", _BLUE)):
        own = [entry for entry in history if entry["kind"] == kind]
        steps, losses = [entry["step"] for entry in own], [entry["loss"] for entry in own]
        if kind == "held out":
            steps, losses = [0, *steps], [tuning["before"], *losses]
        label = "a batch" if kind == "gradient" else kind
        axes.plot(steps, losses, style, color=colour, linewidth=1, markersize=4, label=label)
    axes.axvline(tuning["step"], color=_ORANGE, linestyle="--", linewidth=1, label="kept")
    if all(entry["loss"] > 0 for entry in history):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn


def plot_candidates(rows: Sequence[Mapping[str, Any]], metric: str) -> Any:
    """One metric of comparison rows, as bars."""
    drawn, axes = figure(9, 0.8 + 0.34 * len(rows))
    known = [row for row in rows if isinstance(row.get(metric), (int, float))]
    colours = [_GREY] * (len(known) - 1) + [_BLUE]
    bars = axes.barh(
        [str(row["row"]) for row in known], [row[metric] for row in known], color=colours
    )
    axes.bar_label(bars, fmt="%.4g", fontsize=8, padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel(metric.replace("_", " "))
    return drawn


def plot_size(
    series: Mapping[str, Sequence[tuple[float, float]]],
    metric: str,
    reference: float | None = None,
    size: str = "KiB stored",
) -> Any:
    """Accuracy against size.

    Args:
        series: label -> (size, value) points.
        metric: label of the values.
        reference: the float model's value, a dashed line.
        size: label of the sizes.
    """
    drawn, axes = figure(8, 4.2)
    if reference is not None:
        axes.axhline(reference, color="#707880", linestyle="--", linewidth=1, label="float")
    colours = (_GREY, _ORANGE, _GREEN, _BLUE, "#a04080", "#8050c0")
    for (label, points), colour in zip(series.items(), colours * (1 + len(series)), strict=False):
        ordered = sorted(points)
        axes.plot(
            [point[0] for point in ordered],
            [point[1] for point in ordered],
            "o-",
            color=colour,
            label=label,
        )
    axes.set_xlabel(size)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn


# --- One report ----------------------------------------------------------------------------------


def write_html(report: Report, path: str | Path) -> None:
    """Write a report as a self-contained page: totals, comparison, layers, plots.

    Args:
        report: of a quantized model.
        path: of the file, replaced if it exists.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    weight = report.settings.get("weight", {})
    bits = f"{weight['bits']}-bit " if "bits" in weight else ""
    totals = report.totals
    lead = (
        f"{kib(totals['total_bits'])} KiB stored of {kib(totals['float_total_bits'])} KiB float "
        f"({totals['compression']:.2f} times smaller), {totals['bits_per_weight']:.2f} bits a "
        f"quantized weight, adapters {totals['adapter_share']:.2%} of the float weights."
    )
    write_page(path, f"cora: {bits}quantization report", lead, report_sections(report))


def report_sections(report: Report) -> list[Section]:
    """The sections of a report: comparison, ranks, spectra, search, layers, settings."""
    sections: list[Section] = []
    if report.comparison:
        head, cells = comparison_table(report.comparison)
        content = html_table(head, cells, best=len(cells) - 1)
        metrics = metrics_of(report.comparison)
        if metrics:
            content += svg(plot_candidates(report.comparison, metrics[0]), metrics[0])
        sections.append(("Beside the alternatives", content))
    sections.append(
        ("Ranks", svg(plot_ranks(report), "Rank of each adapter and what it wins back"))
    )
    front = plot_front(report)
    if front is not None:
        caption = "Plans of bits, groups and ranks, the one for the target among them"
        sections.append(("Bits", svg(front, caption)))
    spectra = plot_spectra(report)
    if spectra is not None:
        caption = "Singular values of the residuals; a dot marks where an adapter ends"
        sections.append(("Residual spectra", svg(spectra, caption)))
    search = plot_search(report)
    if search is not None:
        caption = "Loss of the search" + (
            ", interrupted" if report.search.get("interrupted") else ""
        )
        sections.append(("Search", svg(search, caption)))
    tuning = plot_tuning(report)
    if tuning is not None:
        caption = "Tuning of scales, biases and adapters"
        sections.append(("Tuning", svg(tuning, caption)))
    sections.append(("Layers", _layer_table(report)))
    if report.by_rows:
        sections.append(("Packed by rows", _rows_table(report)))
    if report.float_entries:
        sections.append(("Kept float", _float_table(report)))
    sections.append(("Where the bits are", _totals_table(report)))
    sections.append(("Settings", _settings_table(report)))
    return sections


def _layer_table(report: Report) -> str:
    head = ["layer", "kind", "weight", "bits", "rank", "KiB", "of these adapter", "SQNR, dB"]
    cells = [
        [
            layer.name,
            layer.kind,
            " x ".join(map(str, layer.weight_shape)),
            layer.bits,
            f"{layer.rank}/{layer.full_rank}",
            kib(layer.total_bits),
            kib(layer.stored_bits["adapter"]),
            f"{layer.sqnr_db:.1f}",
        ]
        for layer in report.layers
    ]
    return html_table(head, cells)


def _rows_table(report: Report) -> str:
    cells = [
        [row.name, row.kind, f"{row.rows} x {row.columns}", row.bits, kib(row.stored_bits)]
        for row in report.by_rows
    ]
    return html_table(["weight", "kind", "rows", "bits", "KiB"], cells)


def _float_table(report: Report) -> str:
    cells = [
        [entry.name, entry.kind, kib(entry.stored_bits), entry.reason]
        for entry in report.float_entries
    ]
    return html_table(["module", "kind", "KiB", "reason"], cells, text_columns=(3,))


def _totals_table(report: Report) -> str:
    totals = report.totals
    parts = {
        "codes, scales, zero-points": "weight_bits",
        "adapters": "adapter_bits",
        "biases": "bias_bits",
        "activation ranges": "activation_bits",
        "packed by rows": "row_bits",
        "kept float": "float_bits",
        "total": "total_bits",
    }
    cells = [
        [name, kib(totals[key]), f"{totals[key] / totals['total_bits']:.1%}"]
        for name, key in parts.items()
    ]
    return html_table(["part", "KiB", "share"], cells, best=len(cells) - 1)


def _settings_table(report: Report) -> str:
    flat: list[list[str]] = []
    for key, value in report.settings.items():
        if isinstance(value, dict):
            flat += [[f"{key}: {inner}", str(item)] for inner, item in value.items()]
        else:
            flat.append([key, str(value)])
    return html_table(["setting", "value"], flat, text_columns=(1,))
