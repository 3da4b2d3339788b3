"""A diagnosis as a web page: the advice, and where each layer's loss is and what wins it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .html import LABELLED_LAYERS, Section, figure, html_table, svg, write_page

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

__all__ = ["plot_energies", "plot_losses", "plot_spectra", "write_diagnosis"]

_COLOURS = {
    "adapter": "#2060a8",
    "more bits": "#d07818",
    "finer groups": "#208050",
    "leave float": "#a04080",
    "fine as it is": "#c3cad3",
}
_LEGEND = {"fontsize": 8, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}


def _layer_figure(diagnosis: Diagnosis) -> Any:
    """Two panels with a line a layer, the first layer on top."""
    layers = diagnosis.layers
    height = max(2.6, 1.1 + 0.21 * len(layers))
    drawn, (left, right) = figure(10.5, height, 2, sharey=True)
    left.invert_yaxis()
    left.margins(y=0.02)
    if len(layers) <= LABELLED_LAYERS:
        left.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    else:
        left.set_ylabel("layer, in the model's order")
    return drawn, left, right


def plot_losses(diagnosis: Diagnosis) -> Any:
    """Each layer's share of the predicted loss, coloured by its advice, and what options leave."""
    layers = diagnosis.layers
    drawn, left, right = _layer_figure(diagnosis)
    for advice, colour in _COLOURS.items():
        own = [row for row, layer in enumerate(layers) if layer.advice == advice]
        if own:
            shares = [100 * layers[row].loss_share for row in own]
            left.barh(own, shares, color=colour, label=advice)
    left.set_xlabel("share of the network's predicted loss, %")
    left.legend(ncols=3, **_LEGEND)
    for advice in ("adapter", "more bits", "finer groups"):
        points = [
            (option.extra_bits / layer.weights, row, 100 * (1 - layer.left(option)))
            for row, layer in enumerate(layers)
            for option in layer.options
            if option.advice == advice
        ]
        if points:
            right.scatter(
                [saved for _, _, saved in points],
                [row for _, row, _ in points],
                s=[10 + 30 * min(max(bits, 0.0), 2.0) for bits, _, _ in points],
                color=_COLOURS[advice],
                alpha=0.75,
                linewidths=0,
                label=advice,
            )
    right.set_xlabel("loss that an option saves, %; larger dots cost more bits")
    right.set_xlim(0, 102)
    right.grid(axis="x", alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(ncols=3, **_LEGEND)
    return drawn


def plot_energies(diagnosis: Diagnosis) -> Any:
    """Rounding and clipping in each residual, and the energy that adapters of each size recover."""
    layers = diagnosis.layers
    drawn, left, right = _layer_figure(diagnosis)
    rows = range(len(layers))
    rounding = [100 * layer.rounding for layer in layers]
    left.barh(rows, rounding, color=_COLOURS["fine as it is"], label="rounding")
    clipping = [100 * layer.clipping for layer in layers]
    left.barh(rows, clipping, left=rounding, color=_COLOURS["more bits"], label="clipping")
    left.set_xlabel("share of the residual's energy, %")
    left.set_xlim(0, 100)
    left.legend(ncols=2, **_LEGEND)
    shares = [recovery.share for recovery in layers[0].recovery]
    for index, share in enumerate(shares):
        size = 14 + 14 * index
        # An adapter of no rank recovers nothing: no dot.
        own = [row for row in rows if layers[row].recovery[index].rank]
        weighted = [100 * layers[row].recovery[index].weighted for row in own]
        plain = [100 * layers[row].recovery[index].plain for row in own]
        colour = _COLOURS["adapter"]
        label = f"{share:.0%}"
        right.scatter(weighted, own, s=size, color=colour, alpha=0.6, linewidths=0, label=label)
        right.scatter(plain, own, s=size, facecolors="none", edgecolors="#707880", linewidths=0.8)
    right.set_xlabel("energy recovered, %: filled at output, hollow of weights")
    right.set_xlim(-2, 102)
    right.grid(axis="x", alpha=0.3)
    right.legend(ncols=4, title="adapter, of the float bits", title_fontsize=8, **_LEGEND)
    return drawn


def plot_spectra(diagnosis: Diagnosis) -> Any:
    """Singular values of the residuals, of the weights and as the output sees them; None if all are 0."""
    layers = [layer for layer in diagnosis.layers if len(layer.spectrum) > 1]
    if not layers:
        return None
    from matplotlib import colormaps

    drawn, panels = figure(10.5, 4, 2, sharey=True)
    titles = "of the weights", "at the output (weighted by its input)"
    lowest = 1.0
    for axes, weighted, title in zip(panels, (False, True), titles, strict=True):
        for index, layer in enumerate(layers):
            values = layer.weighted_spectrum if weighted else layer.spectrum
            lowest = min([lowest, *(value for value in values if value > 0)])
            share = [100 * i * layer.spectrum_step / layer.full_rank for i in range(len(values))]
            colour = colormaps["viridis"](0.9 * index / max(len(layers) - 1, 1))
            axes.plot(share, values, color=colour, linewidth=1.1, label=layer.name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("singular direction, % of full rank")
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].set_ylim(bottom=max(1e-3, lowest / 2))
    panels[0].set_ylabel("singular value, relative")
    if len(layers) <= 24:
        panels[0].legend(fontsize=6, ncols=2)
    return drawn


def write_diagnosis(diagnosis: Diagnosis, path: str | Path) -> None:
    """Write a diagnosis as a self-contained page.

    Args:
        path: of the file, replaced if it exists.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    bits = diagnosis.settings["weight"]["bits"]
    lead = f"{bits}-bit weights: {diagnosis.summary()}."
    write_page(path, "cora: diagnosis", lead[0].upper() + lead[1:], diagnosis_sections(diagnosis))


def diagnosis_sections(diagnosis: Diagnosis) -> list[Section]:
    """The sections of the page: advice, losses, energies, spectra, settings."""
    head, cells = diagnosis.table()
    sections = [
        (
            "Advice",
            "<p>What an option leaves of a layer's loss stands with the bits a weight it costs.</p>"
            + html_table(head, cells, text_columns=(len(head) - 2, len(head) - 1)),
        ),
        (
            "Where the loss is",
            svg(plot_losses(diagnosis), "Predicted loss of each layer, and what options save"),
        ),
        (
            "What the residuals are made of",
            svg(plot_energies(diagnosis), "Rounding and clipping; energy that adapters recover"),
        ),
    ]
    spectra = plot_spectra(diagnosis)
    if spectra is not None:
        sections.append(("Spectra", svg(spectra, "Singular values of the residuals")))
    settings = {**diagnosis.settings["weight"], **diagnosis.settings}
    del settings["weight"]
    values = [[key, str(value)] for key, value in settings.items()]
    sections.append(("Settings", html_table(["setting", "value"], values, text_columns=(1,))))
    return sections
