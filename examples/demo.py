"""Quantize a real OCR pipeline to 4, 3 and 2.2 stored bits a weight, and read a page with it.

    python examples/demo.py [--output demo-output]

The recogniser's bits, groups and ranks are chosen for each budget, and the result is put beside the same
bits in every layer, rounded to nearest and with error feedback; the detector, which is far
larger, gets one width everywhere, adapters with closed-form ranks, and stands beside plain quantization.
Written into the output folder: the packed files, results.json, result.png, the pages as the float and the packed
pipeline read them, and report.html with everything. Needs `pip install '.[demo]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

import cora
from cora import html
from cora.report import float_state_bits
from cora.tables import comparison_table, text_table
from cora.tasks import Page, Task, draw_page, read_page, render_page, resolve_task

Row = dict[str, Any]

_SECONDS: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say what is being done, and remember how long it took."""
    print(f"... {name}", flush=True)
    start = time.perf_counter()
    yield
    _SECONDS[name] = _SECONDS.get(name, 0.0) + time.perf_counter() - start


def evaluator(task: Task, model: nn.Module, limit: int) -> Callable[[nn.Module], dict[str, float]]:
    """model -> metrics, also against the float model's outputs; each model is evaluated once."""
    reference = task.outputs(model, limit)
    known: dict[int, tuple[nn.Module, dict[str, float]]] = {}

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        if id(candidate) not in known:
            known[id(candidate)] = candidate, task.evaluate(candidate, limit, reference)
        return dict(known[id(candidate)][1])

    return evaluate


def quantize(
    task: Task,
    model: nn.Module,
    calibration: cora.Calibration,
    evaluate: Callable[[nn.Module], dict[str, float]],
    bits: float,
    args: argparse.Namespace,
    **options: Any,
) -> nn.Module:
    """Quantize, save, and put the result beside the alternatives."""
    with stage(f"{task.name}: {bits:g} bits"):
        qmodel = cora.quantize(model, calibration, progress=args.bars, **options)
    with stage(f"{task.name}: {bits:g} bits, alternatives and evaluation"):
        if "target_bits" in options:
            rows = cora.compare(model, calibration, qmodel, evaluate, args.bars)
        else:
            rows = beside_plain(model, calibration, qmodel, evaluate, options)
    cora.save(qmodel, packed_path(task, bits, args))
    print(f"\n{task.name} at {bits:g} bits\n{text_table(*comparison_table(rows))}\n", flush=True)
    return qmodel


def beside_plain(
    model: nn.Module,
    calibration: cora.Calibration,
    qmodel: nn.Module,
    evaluate: Callable[[nn.Module], dict[str, float]],
    options: dict[str, Any],
) -> list[Row]:
    """The rows that cost least: float, no adapters, and the result."""
    spec = options["weight"]
    plain = cora.quantize(model, calibration, progress=False, **{**options, "rank_budget": 0})
    rows: list[Row] = [
        {"row": "float", "bits_per_weight": 32.0, "total_bits": float_state_bits(model)}
    ]
    for label, candidate in ((", no adapters", plain), (" + adapters", qmodel)):
        sizes = {key: candidate.report.totals[key] for key in ("bits_per_weight", "total_bits")}
        rows.append({"row": f"{spec.bits}-bit{label}", **sizes})
    for row, candidate in zip(rows, (model, plain, qmodel), strict=True):
        row.update(evaluate(candidate))
    qmodel.report.comparison = rows
    return rows


def packed_path(task: Task, bits: float, args: argparse.Namespace) -> Path:
    return Path(args.output) / f"{task.name}-{bits:g}bit.safetensors"


def words_right(read: list[Any], page: Page) -> tuple[int, int]:
    """How many of a page's words occur in what was read."""
    left = [text for _, text in read]
    right = 0
    for text in page.texts:
        if text in left:
            left.remove(text)
            right += 1
    return right, len(page.texts)


def series(results: dict[float, list[Row]], metric: str, scale: float = 1.0) -> dict[str, Any]:
    """Lines of the plots: each alternative's (bits a weight, metric) over the widths."""
    lines: dict[str, set[tuple[float, float]]] = {}  # neighbouring widths share alternatives
    for rows in results.values():
        for row in rows[1:]:
            label = row["row"]
            label = label.split("-bit", 1)[1].lstrip(", +") if "-bit" in label[:6] else label
            lines.setdefault(label, set()).add((row["bits_per_weight"], scale * row[metric]))
    return lines


def result_figure(results: dict[float, list[Row]], metric: str) -> Any:
    """Accuracy and divergence against the stored bits of a quantized weight."""
    drawn, (left, right) = html.figure(10.5, 4.2, 2)
    first = next(iter(results.values()))
    left.axhline(100 * first[0][metric], color="#707880", linestyle="--", label="float")
    colours = ("#9aa4b0", "#d07818", "#208050", "#2060a8")
    for axes, name, scale in ((left, metric, 100.0), (right, "kl", 1.0)):
        for (label, points), colour in zip(
            series(results, name, scale).items(), colours, strict=False
        ):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, "o-", color=colour, label=label)
        axes.set_xlabel("stored bits a quantized weight, adapters and scales included")
        axes.grid(alpha=0.3)
    left.set_ylabel(metric.replace("_", " ") + ", %")
    right.set_ylabel("KL to the float model, nats a frame")
    right.set_yscale("log")
    left.legend(fontsize=8)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", default="demo-output", help="folder for what is written")
    add("--data", help="data folder, searched before the installed packages")
    add("--bits", type=float, nargs="+", default=[4, 3, 2.2], help="stored bits a weight")
    add("--samples", type=int, default=256, help="calibration lines")
    add("--lines", type=int, default=500, help="validation lines")
    add("--iterations", type=int, default=60, help="steps of the recogniser's tuning")
    add("--rank-budget", type=float, default=0.02, help="the detector's adapters over its floats")
    add("--detector-bits", type=int, default=3, help="width of the detector; 0 leaves it float")
    add("--pages", type=int, default=4, help="calibration pages")
    add("--validation-pages", type=int, default=8)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.bars = sys.stderr.isatty()
    start = time.perf_counter()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    with stage("ocr-recognition: model, data, float outputs"):
        recognition = resolve_task("ocr-recognition", args.data)
        recogniser = recognition.model()
        calibration = cora.Calibration(
            recogniser,
            recognition.calibration(args.samples, args.seed),
            args.samples,
            args.seed,
            logits=recognition.output_logits,
            progress=args.bars,
        )
        evaluate = evaluator(recognition, recogniser, args.lines)
    options: dict[str, Any] = {
        "search": cora.SearchConfig(samples=args.samples, seed=args.seed),
        "tune": cora.TuneConfig(iterations=args.iterations),
    }
    models = {
        bits: quantize(
            recognition, recogniser, calibration, evaluate, bits, args, target_bits=bits, **options
        )
        for bits in args.bits
    }
    results = {bits: qmodel.report.comparison for bits, qmodel in models.items()}

    detection = resolve_task("ocr-detection", args.data)
    detector = detection.model()
    packed_detector = None
    if args.detector_bits:
        with stage("ocr-detection: model, data, float outputs"):
            pages = cora.Calibration(
                detector,
                detection.calibration(args.pages, args.seed),
                args.pages,
                args.seed,
                logits=detection.output_logits,
                progress=args.bars,
            )
            evaluate = evaluator(detection, detector, args.validation_pages)
        # A page takes seconds to run: one pass of calibration, nothing that goes layer by layer.
        packed_detector = quantize(
            detection,
            detector,
            pages,
            evaluate,
            args.detector_bits,
            args,
            weight=cora.QuantSpec(bits=args.detector_bits),
            rank_budget=args.rank_budget,
            search=cora.SearchConfig(method="sensitivity", samples=args.pages, seed=args.seed),
            tune=None,
            propagate=False,
        )

    with stage("reading a page with both pipelines"):
        width = 3 if 3 in models else args.bits[0]
        page = render_page("validation", np.random.default_rng(args.seed))
        from_file = cora.load(packed_path(recognition, width, args), recogniser)
        boxes = detector
        if packed_detector is not None:
            boxes = cora.load(packed_path(detection, args.detector_bits, args), detector)
        pictures, counts = {}, {}
        for name, pair in (("float", (detector, recogniser)), ("packed", (boxes, from_file))):
            read = read_page(*pair, page.image)
            counts[name] = words_right(read, page)
            pictures[name] = draw_page(page.image, read, page)
            pictures[name].save(folder / f"page-{name}.png")

    with stage("figures and report"):
        figure = result_figure(results, "word_accuracy")
        figure.savefig(folder / "result.png", dpi=110, metadata={"Software": None})
        titles = {
            name: f"{name} pipeline: {right} of {total} words right"
            for name, (right, total) in counts.items()
        }
        write_report(
            folder / "report.html", models, packed_detector, figure, pictures, titles, width
        )
        values = {
            "recognition": results,
            "detection": packed_detector.report.comparison if packed_detector else None,
            "pages": counts,
            "seconds": _SECONDS,
            "arguments": vars(args),
        }
        (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")

    print("\nwhere the time went")
    for name, seconds in _SECONDS.items():
        print(f"  {seconds:6.1f} s  {name}")
    print(f"  {time.perf_counter() - start:6.1f} s  in all\n")
    for name, title in titles.items():
        print(f"{title}: {folder / f'page-{name}.png'}")
    print(f"open {folder / 'report.html'}")


def write_report(
    path: Path,
    models: dict[float, nn.Module],
    detector: nn.Module | None,
    figure: Any,
    pictures: dict[str, Image.Image],
    titles: dict[str, str],
    width: int,
) -> None:
    """One page: the comparison tables, accuracy against size, the pages read, and each report."""
    caption = "The recogniser at each width: accuracy and divergence against stored bits"
    sections = [("Accuracy against size", html.svg(figure, caption))]
    for bits, qmodel in models.items():
        head, cells = comparison_table(qmodel.report.comparison)
        table = html.html_table(head, cells, best=len(cells) - 1)
        sections.append((f"Recogniser at {bits:g} bits", table))
    if detector is not None:
        head, cells = comparison_table(detector.report.comparison)
        table = html.html_table(head, cells, best=len(cells) - 1)
        sections.append((f"Detector at {detector.report.settings['weight']['bits']} bits", table))
    read = "".join(html.image(picture, titles[name]) for name, picture in pictures.items())
    sections.append(("A page of words that calibration never saw", read))
    sections += [
        (f"Recogniser at {bits:g} bits: {title.lower()}", content)
        for bits, qmodel in models.items()
        for title, content in html.report_sections(qmodel.report)
        if title in ("Bits", "Ranks", "Tuning") or (bits == width and title == "Layers")
    ]
    if detector is not None:
        sections += [
            (f"Detector: {title.lower()}", content)
            for title, content in html.report_sections(detector.report)
            if title in ("Ranks", "Residual spectra")
        ]
    lead = (
        "EasyOCR's English recogniser and the CRAFT text detector, quantized to packed low-bit "
        "weights: bits, scale groups and low-rank adapters chosen for a budget of stored bits."
    )
    html.write_page(path, "cora: a real OCR pipeline at low bits", lead, sections)


if __name__ == "__main__":
    main()
