"""Accuracy beside stored bits, over seeds, beside other quantizers: the tables in docs/results.md.

    python benchmarks/accuracy.py --task cifar10-resnet20 --target 2.1 2.6 3.1 3.5 4.1 --seeds 0 1 2
    python benchmarks/accuracy.py --task cifar10-resnet20 --activations
    python benchmarks/accuracy.py --task cifar10-resnet20 --ablation steps ranks calibration_size
    python benchmarks/accuracy.py --task cifar10-resnet20 --peers --bits 2 3 --seeds 0
    python benchmarks/accuracy.py --table            # prints the tables, draws docs/result.png

One row a quantizer, task and calibration draw, written as soon as it is measured; rows that are in the output
already are not measured again. All rows of a task and seed share the float weights (batch norms folded), the
calibration samples and the treatment of first and last layer (like the others).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ablations import ABLATIONS, ONE, ablation_tables, ablation_ways, draw_ablations, quantized
from torch import nn

from cora import Calibration, QuantSpec, SearchConfig
from cora.html import plot_size
from cora.report import float_state_bits, versions
from cora.tables import format_metric, metrics_of
from cora.tasks import Task, resolve_task

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ("task", "samples", "limit", "seed", "method", "bits")

Row = dict[str, Any]
Maker = Callable[[], tuple[nn.Module, float, int]]
"""Gives a model with its bits a weight and all its stored bits."""
Way = tuple[str, float, Maker] | tuple[str, float, Maker, Row]
"""What it is called, its bits, and where it stands in the plot of an ablation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", nargs="+", default=["cifar10-resnet20", "ocr-recognition"])
    add("--target", nargs="*", type=float, default=[2.1, 2.6, 3.1, 3.5, 4.1])
    add(
        "--bits",
        nargs="*",
        type=int,
        default=[2, 3, 4],
        help="of the rows with the same everywhere",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--samples", type=int, default=1024)
    add("--limit", type=int, default=None, help="validation samples, all by default")
    add(
        "--ablation",
        nargs="+",
        default=[],
        choices=ABLATIONS,
        help="what one choice brings, instead of the main rows",
    )
    add("--activations", action="store_true", help="quantized inputs, instead of the main rows")
    add("--peers", action="store_true", help="other libraries, instead of the main rows")
    add("--only", nargs="+", default=[], help="ways whose names hold one of these")
    add(
        "--peer-activations",
        type=int,
        default=None,
        metavar="BITS",
        help="quantize their inputs too, with the ranges that cora chooses",
    )
    add("--peer-iterations", type=int, default=None, help="of their learned rounding")
    add("--data", default=None)
    add("--output", type=Path, default=ROOT / "docs" / "results.json")
    add("--table", action="store_true", help="print the tables of the output and draw its picture")
    args = parser.parse_args()
    results = _read(args.output)
    if args.table:
        main_rows = [row for row in results["rows"] if "ablation" not in row]
        print(tables(main_rows))
        print(ablation_tables(results["rows"]))
        draw(main_rows, ROOT / "docs" / "result.png")
        draw_ablations(results["rows"], ROOT / "docs" / "ablations.png")
        return
    for name in args.task:
        task = resolve_task(name, args.data)
        for seed in args.seeds:
            setting = {"task": name, "samples": args.samples, "limit": args.limit, "seed": seed}
            _measure(task, setting, args)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def _measure(task: Task, setting: Row, args: argparse.Namespace) -> None:
    model = task.model()
    reference = task.outputs(model, args.limit)
    batches = task.calibration(args.samples, setting["seed"])
    calibration = Calibration(
        model, batches, args.samples, setting["seed"], logits=task.output_logits
    )
    seed = setting["seed"]
    if args.ablation:
        ways: Iterable[Way] = ablation_ways(args.ablation, task, calibration, seed, args)
    else:
        chosen = _peer_ways if args.peers else _activation_ways if args.activations else _ways
        ways = chosen(task, model, calibration, batches, seed, args)
    for method, bits, make, *place in ways:
        if args.only and not any(part in method for part in args.only):
            continue
        key = {**setting, "method": method, "bits": bits}
        results = _read(args.output)  # anew: several measurements may write one file
        if any(all(row[k] == key[k] for k in COUNTED) for row in results["rows"]):
            continue
        start = time.perf_counter()
        try:
            candidate, per_weight, total = make()
        except Exception as error:
            if not args.peers:
                raise
            print(f"{method} at {bits} bits: {type(error).__name__}: {error}")
            continue
        seconds = time.perf_counter() - start
        metrics = task.evaluate(candidate, args.limit, reference)
        metrics.pop("samples", None)
        row = {
            **key,
            "seconds": round(seconds, 1),
            "bits_per_weight": per_weight,
            "total_bits": total,
            **metrics,
            **(place[0] if place else {}),
            "versions": versions(),
        }
        report = getattr(candidate, "report", None)
        if report is not None:
            found = report.search
            row |= {"ranks": found["ranks"], "layer_bits": [la.bits for la in report.layers]}
            tuning = found["tuning"]  # without losses where nothing was tuned
            row |= {k: tuning[k] for k in ("before", "after", "train", "step") if k in tuning}
        results = _read(args.output)
        results["rows"].append(row)
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(args.output)
        print({k: row[k] for k in (*COUNTED, "seconds", *metrics_of([_metrics(row)]))}, flush=True)


def _ways(
    task: Task,
    model: nn.Module,
    calibration: Calibration,
    _batches: Any,
    seed: int,
    args: argparse.Namespace,
) -> Iterator[Way]:
    """The float model, uniform bits, and cora with and without adapters."""
    yield "float", 32, lambda: (model, 32.0, float_state_bits(model))
    search = SearchConfig(seed=seed, samples=args.samples)
    plain = {**ONE, "rank_budget": 0, "search": search}
    for bits in args.bits:
        for rounding in ("nearest", "gptq"):
            spec = QuantSpec(bits=bits, rounding=rounding)
            label = "error feedback" if rounding == "gptq" else rounding
            yield label, bits, quantized(model, calibration, weight=spec, **plain)
    regression = task.output_logits(calibration.teacher()[0]) is None
    loss: Any = "kl" if regression else "labels"
    for bits in args.bits:
        # The paper's: one scale a tensor, 3 sigma, SVD of the residual, ranks by gates on labels. Budget by
        # projection instead of a penalty, the best iterate kept, batch norms folded.
        options = {
            "weight": QuantSpec(bits, "per_tensor", clip="ksigma", k=3.0, rounding="nearest"),
            "rank_budget": 0.05,
            "adapter_bits": 8,
            "fit": "plain",
            "search": SearchConfig(
                "gate",
                loss=loss,
                label_loss=task.label_loss,
                seed=seed,
                samples=args.samples,
                doubt=0,
            ),
            "bias_correction": False,
            **ONE,
        }
        yield "the paper's recipe", bits, quantized(model, calibration, **options)
    for target in args.target:
        options = {"target_bits": target, "search": search}
        yield "cora", target, quantized(model, calibration, **options)
        yield (
            "cora, no adapters",
            target,
            quantized(model, calibration, rank_budget=0, **options),
        )


def _activation_ways(
    _task: Task,
    model: nn.Module,
    calibration: Calibration,
    _batches: Any,
    seed: int,
    args: argparse.Namespace,
) -> Iterator[Way]:
    """Static input ranges below float, ends like the other layers or at 8 bits."""
    search = SearchConfig(seed=seed, samples=args.samples)
    for bits, target in ((8, 4.1), (4, 4.1), (3, 3.1)):
        for policy, ends, more in (("same", "alike", 0.0), ("8bit", "at 8 bits", 0.3)):
            for label, options in {
                "cora": {"target_bits": target + more},
                "error feedback": {"weight": QuantSpec(int(target)), "rank_budget": 0, **ONE},
            }.items():
                make = quantized(
                    model,
                    calibration,
                    activation_bits=bits,
                    first_last=policy,
                    search=search,
                    **options,
                )
                yield f"{label}, W{int(target)}A{bits}, ends {ends}", target, make


def _peer_ways(
    _task: Task,
    model: nn.Module,
    calibration: Calibration,
    batches: Any,
    seed: int,
    args: argparse.Namespace,
) -> Iterator[Way]:
    from accuracy_peers import peers, unavailable

    for name, reason in unavailable().items():
        print(f"{name}: not measured: {reason}")
    for peer in peers():
        for bits in args.bits:
            if bits in peer.bits and peer.applies(calibration.model):

                def make(peer: Any = peer, bits: int = bits) -> tuple[nn.Module, float, int]:
                    found = peer.run(
                        calibration.model,
                        batches,
                        bits,
                        seed,
                        iterations=args.peer_iterations,
                        activation_bits=args.peer_activations,
                    )
                    return found.model, found.bits_per_weight, found.total_bits

                label = peer.name
                if args.peer_iterations:
                    label += f" ({args.peer_iterations} steps)"
                if args.peer_activations:
                    label += f", W{bits}A{args.peer_activations}, ends alike"
                yield label, bits, make


# --- Tables --------------------------------------------------------------------------------------

_PLACE = {"ablation", "series", "x"}
_NOT_METRICS = {
    *COUNTED,
    *_PLACE,
    "versions",
    "ranks",
    "layer_bits",
    "before",
    "after",
    "train",
    "step",
}
_CURVES = ("nearest", "error feedback", "the paper's recipe", "cora")


def _metrics(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in _NOT_METRICS}


def _groups(rows: list[Row]) -> dict[str, dict[tuple[str, float], list[Row]]]:
    """task -> (method, bits) -> its rows, one a seed."""
    found: dict[str, dict[tuple[str, float], list[Row]]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault((row["method"], row["bits"]), []).append(row)
    return found


def tables(rows: list[Row]) -> str:
    """Markdown, a table a task: mean and standard deviation over the seeds."""
    lines = []
    for task, ways in _groups(rows).items():
        first = next(iter(ways.values()))[0]
        metrics = metrics_of([_metrics(first)])
        limit = "all" if first["limit"] is None else first["limit"]
        lines += [
            f"\n## {task}\n",
            f"{first['samples']} calibration samples, {limit} validation samples.\n",
            "| | bits a weight | KiB | " + " | ".join(metrics) + " | seconds | seeds |",
            "|---|---|---|" + "---|" * (len(metrics) + 2),
        ]
        order = sorted(ways.items(), key=lambda way: (way[1][0]["bits_per_weight"], way[0]))
        for (method, _bits), members in order:
            cells = [
                f"{statistics.mean(r['bits_per_weight'] for r in members):.2f}",
                f"{statistics.mean(r['total_bits'] for r in members) / 8192:.0f}",
            ]
            for metric in metrics:
                values = [r[metric] for r in members if metric in r]
                spread = ""
                if len(values) > 1 and method != "float":
                    spread = f" ± {format_metric(metric, statistics.stdev(values))}"
                value = format_metric(metric, statistics.mean(values)) if values else ""
                cells.append(value + spread)
            seconds = statistics.median(r["seconds"] for r in members)
            lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.0f} | {len(members)} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Divergence against stored bits of the first task."""
    ways = next(iter(_groups(rows).values()))
    series: dict[str, list[tuple[float, float]]] = {}
    for (method, _bits), members in ways.items():
        if method in _CURVES or ("AdaRound" in method and "steps" not in method):
            point = (
                statistics.mean(r["bits_per_weight"] for r in members),
                statistics.mean(r["kl"] for r in members),
            )
            series.setdefault(method, []).append(point)
    drawn = plot_size(series, "KL to the float network, nats", size="stored bits a weight")
    drawn.axes[0].set_yscale("log")
    drawn.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
