"""Times every row against every peer and writes docs/performance.json and docs/performance.md.

    python benchmarks/performance.py                       # everything, about ten minutes
    python benchmarks/performance.py --rows linear gemm    # some rows
    python benchmarks/performance.py --limit 120           # stop after two minutes; the next call goes on
    python benchmarks/performance.py --output docs/performance_avx2.json   # another machine's

What was measured with the same native library, undisturbed by other processes, is not measured again unless
`--fresh` is given.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# Idle OpenMP threads stop spinning after half a millisecond instead of fifteen: they belong to one
# contestant and would slow the next. Between two layers of a network no thread waits that long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# torch's switch for huge pages, for every contestant that computes in its tensors: without them bandwidth
# is a matter of which pages the kernel happened to hand out.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from machine import PEAKS, core, machine, peaks
from rows import ROWS, Case, Contest, cases
from timing import Others, Times, in_turns, threads
from verdicts import DISTURBED, page, verdicts

from cora.files import write_file

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTES = Path(__file__).with_name("notes")  # of each output: what explains its numbers, by hand


ATTEMPTS = 2


def measure(case: Case, count: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.inference_mode(), threads(count):
        contest = case.build(count)
        best = float("inf")
        for _ in range(ATTEMPTS):
            others = Others()
            found = run(case, contest, seconds)
            cores = others.cores()
            if cores < best:
                best, times = cores, found
            if best < DISTURBED:
                break
    facts = {k: v() if callable(v) else v for k, v in contest.facts.items()}
    return {
        "seconds": {name: t.median for name, t in times.items()},
        "spread": {name: round(t.spread, 3) for name, t in times.items()},
        "calls": {name: len(t.seconds) for name, t in times.items()},
        "others": round(best, 2),
        "absent": contest.absent,
        "operations": contest.operations,
        "bytes": contest.bytes,
        "facts": facts,
    }


def run(case: Case, contest: Contest, seconds: float) -> dict[str, Times]:
    if case.once:
        return in_turns(contest.calls, 0, calls_a_turn=1, least=1 if case.row == "svd" else 5)
    if case.flush:
        return in_turns(contest.calls, seconds, flush=True, calls_a_turn=2)
    return in_turns(contest.calls, seconds)


def measure_memory() -> dict[str, Any]:
    from memory import measure

    facts = measure()
    facts["ratio"] = (facts["packed"] - facts["bare"]) / (facts["float"] - facts["bare"])
    return {
        "seconds": {"cora": 0.0}, "spread": {}, "calls": {}, "absent": {},
        "operations": 0, "bytes": 0, "facts": facts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.2, help="on each contestant, about")
    parser.add_argument(
        "--limit", type=float, default=1e9, help="start no case after so many seconds"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--output", type=Path, default=DOCS / "performance.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    results: dict[str, Any] = {"peaks": {}, "cases": {}}
    if args.output.exists():
        results |= json.loads(args.output.read_text())
    start, library = time.perf_counter(), core()
    if results.get("threads") != args.threads or not results["peaks"] or args.fresh:
        results |= {"threads": args.threads, "peaks": peaks(args.threads), "peak names": PEAKS}
    explained = NOTES / f"{args.output.stem}.md"
    notes = explained.read_text() if explained.exists() else ""
    results |= {"machine": machine(), "date": datetime.date.today().isoformat()}

    def keep(key: str, record: dict[str, Any]) -> None:
        results["cases"][key] = record
        write_file(args.output, (json.dumps(results, indent=1) + "\n").encode())
        write_file(args.output.with_suffix(".md"), page(results, args.output.name, notes).encode())

    left = 0
    for order, case in enumerate(cases()):
        for count in args.threads:
            key = f"{case} / {count}"
            before = results["cases"].get(key, {})
            current = before.get("core") == library
            done = current and before["others"] <= DISTURBED and not args.fresh
            if case.row not in args.rows or args.only not in case.name or done:
                continue
            if time.perf_counter() - start > args.limit:
                left += 1
                continue
            record = measure(case, count, args.seconds)
            head = {
                "row": case.row,
                "name": case.name,
                "threads": count,
                "order": order,
                "core": library,
            }
            if not current or args.fresh or record["others"] <= before["others"]:
                keep(key, head | record)
            gc.collect()
            shown = min(record["seconds"].items(), key=lambda item: item[1])
            own = next(iter(record["seconds"].items()))
            others = record["others"]
            disturbed = f" (others: {others} cores)" if others > DISTURBED else ""
            print(
                f"{key}: {own[0]} {own[1] * 1e6:.0f} us, fastest {shown[0]} {shown[1] * 1e6:.0f}{disturbed}",
                flush=True,
            )
    done = results["cases"].get("memory / 1", {}).get("core") == library and not args.fresh
    if "memory" in args.rows and not done and time.perf_counter() - start < args.limit:
        head = {"row": "memory", "name": "ResNet-50", "threads": 1, "order": 10**6, "core": library}
        keep("memory / 1", head | measure_memory())
    if results["cases"]:
        write_file(args.output.with_suffix(".md"), page(results, args.output.name, notes).encode())
    if left:
        print(f"{left} cases left: call again")
    missed = [
        v
        for v in verdicts(results["cases"].values(), results["peaks"])
        if v.reached < len(v.values)
    ]
    for v in missed:
        print(
            f"missed: {v.target.work} against {v.target.against}, {v.threads} threads: {v.target.text(v.worst)}"
        )


if __name__ == "__main__":
    sys.exit(main())
