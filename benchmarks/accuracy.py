"""Accuracy beside stored bits, over seeds: what the table in docs/results.md is made of.

    python benchmarks/accuracy.py --task cifar10-resnet20 ocr-recognition --bits 3 2 --seeds 0 1 2

Each run is one `cora.compare`: float, plain, same stored bits without adapters, uniform ranks, searched
ranks, on one calibration draw. Runs already in the output file are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import cora
from cora.report import versions
from cora.tables import metrics_of
from cora.tasks import resolve_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", default=["cifar10-resnet20", "ocr-recognition"])
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 2])
    parser.add_argument("--budget", nargs="+", type=float, default=[0.05])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--adapter-bits", nargs="+", type=int, default=[8])
    parser.add_argument("--clip", nargs="+", default=["mse"])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument(
        "--limit", type=int, default=None, help="validation samples, all by default"
    )
    parser.add_argument("--data", default=None)
    parser.add_argument("--output", type=Path, default=Path("accuracy.json"))
    args = parser.parse_args()

    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    results["versions"] = versions()
    done = {_key(run) for run in results["runs"]}
    for name in args.task:
        task = resolve_task(name, args.data)
        model = task.model()
        reference = None
        for seed in args.seeds:
            calibration = None
            for bits, budget, adapter_bits, clip in itertools.product(
                args.bits, args.budget, args.adapter_bits, args.clip
            ):
                setting = {
                    "task": name,
                    "bits": bits,
                    "budget": budget,
                    "adapter_bits": adapter_bits,
                    "clip": clip,
                    "seed": seed,
                    "samples": args.samples,
                    "limit": args.limit,
                }
                if _key(setting) in done:
                    continue
                if reference is None:
                    reference = task.outputs(model, args.limit)
                if calibration is None:
                    batches = task.calibration(args.samples, seed)
                    calibration = cora.Calibration(
                        model, batches, args.samples, seed, logits=task.output_logits
                    )
                run = {**setting, **_run(task, model, calibration, reference, setting)}
                results["runs"].append(run)
                temporary = args.output.with_suffix(".tmp")
                temporary.write_text(json.dumps(results, indent=1))
                temporary.replace(args.output)
    print(table(results["runs"]))


_SETTING = ("task", "bits", "budget", "adapter_bits", "clip", "seed", "samples", "limit")


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[key] for key in _SETTING)


def _run(
    task: Any,
    model: torch.nn.Module,
    calibration: cora.Calibration,
    reference: list[torch.Tensor],
    setting: dict[str, Any],
) -> dict[str, Any]:
    start = time.perf_counter()
    qmodel = cora.quantize(
        model,
        calibration,
        cora.QuantSpec(bits=setting["bits"], clip=setting["clip"]),
        rank_budget=setting["budget"],
        adapter_bits=setting["adapter_bits"],
        search=cora.SearchConfig(seed=setting["seed"]),
        progress=False,
    )
    seconds = time.perf_counter() - start
    rows = cora.compare(
        model,
        calibration,
        qmodel,
        lambda candidate: task.evaluate(candidate, setting["limit"], reference),
        progress=False,
    )
    return {
        "seconds": round(seconds, 1),
        "rows": rows,
        "ranks": qmodel.report.search["ranks"],
        "candidates": qmodel.report.search["candidates"],
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds of each row's metrics."""
    lines = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(_key(run)[:5], []).append(run)
    for (task, bits, budget, adapter_bits, clip), members in sorted(groups.items(), key=str):
        metrics = metrics_of(members[0]["rows"][-1:])
        lines += [
            f"\n**{task}, {bits} bits, {adapter_bits}-bit adapters at {budget:.2%} of the float weights, "
            f"clip {clip}, {len(members)} seeds**\n",
            "| | bits a weight | KiB | " + " | ".join(metrics) + " |",
            "|---|---|---|" + "---|" * len(metrics),
        ]
        for index in range(len(members[0]["rows"])):
            rows = [member["rows"][index] for member in members]
            label = rows[0]["row"]
            cells = [
                f"{statistics.mean(r['bits_per_weight'] for r in rows):.2f}",
                f"{statistics.mean(r['total_bits'] for r in rows) / 8192:.0f}",
            ]
            for metric in metrics:
                values = [r[metric] for r in rows if metric in r]
                if not values:
                    cells.append("")
                elif index == 0:
                    cells.append(f"{values[0]:.4f}")
                else:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.mean(values):.4f} +- {spread:.4f}")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
