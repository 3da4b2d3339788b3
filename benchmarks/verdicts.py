"""From measured cases to targets reached or missed, and to the page docs/performance.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

from rows import MERGED, READING, ROWS

Record = Mapping[str, Any]

FOUR_BIT = (
    "onnxruntime MatMulNBits level 4",
    "onnxruntime MatMulNBits level 0",
    "torch int4pack",
    "OpenVINO int4",
    "ggml q4_0",
    "bitsandbytes NF4",
)
INT8 = ("onnxruntime int8", "OpenVINO int8")


@dataclass(frozen=True)
class Target:
    """What a row has to reach.

    Args:
        rows: keys of `ROWS`.
        work, against: as in the table.
        goal: the least value that reaches it, or the largest if `most`.
        value: (record, peaks of its number of threads) -> what was reached, None if it cannot be said.
        percent: shown as a percentage, else as a factor.
        only: the cases it is about.
    """

    rows: tuple[str, ...]
    work: str
    against: str
    goal: float
    value: Callable[[Record, Mapping[str, float]], float | None]
    percent: bool = False
    most: bool = False
    only: Callable[[Record], bool] = lambda record: True

    def met(self, value: float) -> bool:
        return value <= self.goal if self.most else value >= self.goal

    def text(self, value: float) -> str:
        if self.percent:
            digits = 3 if abs(value - 1) < 1e-3 else 0
            return f"{100 * value:.{digits}f} %"
        return f"{value:.2f}x"


@dataclass(frozen=True)
class Verdict:
    """A target at one number of threads: the value of every case."""

    target: Target
    threads: int
    values: tuple[float, ...]

    @property
    def reached(self) -> int:
        return sum(map(self.target.met, self.values))

    @property
    def worst(self) -> float:
        return max(self.values) if self.target.most else min(self.values)

    @property
    def best(self) -> float:
        return min(self.values) if self.target.most else max(self.values)

    @property
    def mean(self) -> float:
        """Geometric mean; arithmetic where a value is not positive."""
        if min(self.values) <= 0:
            return sum(self.values) / len(self.values)
        return exp(sum(map(log, self.values)) / len(self.values))


def ours(record: Record) -> str:
    """cora's first contestant."""
    return next(name for name in record["seconds"] if name.startswith("cora"))


def _find(record: Record, beginning: str) -> float | None:
    """Seconds of the first contestant whose name begins so."""
    found = (s for name, s in record["seconds"].items() if name.startswith(beginning))
    return next(found, None)


def ratio(
    *peers: str, of: Callable[[Record], str] | None = None
) -> Callable[[Record, Mapping[str, float]], float | None]:
    """Time of the fastest of the peers over that of the contestant `of` says, or ours."""

    def value(record: Record, _: Mapping[str, float]) -> float | None:
        times = [record["seconds"][name] for name in peers if name in record["seconds"]]
        own = record["seconds"].get((of or ours)(record))
        return min(times) / own if times and own else None

    return value


def _over(slow: str, fast: str) -> Callable[[Record, Mapping[str, float]], float | None]:
    def value(record: Record, _: Mapping[str, float]) -> float | None:
        a, b = _find(record, slow), _find(record, fast)
        return a / b if a and b else None

    return value


def _share(amount: str, peak: str) -> Callable[[Record, Mapping[str, float]], float | None]:
    def value(record: Record, peaks: Mapping[str, float]) -> float | None:
        if not record.get(amount) or peak not in peaks:
            return None
        return record[amount] / record["seconds"][ours(record)] / 1e9 / peaks[peak]

    return value


def in_networks(record: Record) -> str:
    """The contestant that is what `cora.fuse` makes of the layer and its adapter."""
    return MERGED if MERGED in record["seconds"] else ours(record)


def _adapter(
    which: Callable[[Record], str],
) -> Callable[[Record, Mapping[str, float]], float | None]:
    """Time of the layer with its adapter over that of the layer alone, less one."""

    def value(record: Record, _: Mapping[str, float]) -> float | None:
        without = _find(record, "cora no adapter")
        return record["seconds"][which(record)] / without - 1 if without else None

    return value


_CONVS = ("conv3x3-codes", "conv1x1-codes", "conv3x3-float", "conv1x1-float")
_KINDS = {
    "conv3x3-codes": "W4A8 conv 3 x 3 + rank 5 %, codes in and out",
    "conv1x1-codes": "W4A8 conv 1 x 1 + rank 5 %, codes in and out",
    "conv3x3-float": "W4A8 conv 3 x 3 + rank 5 %, float in and out",
    "conv1x1-float": "W4A8 conv 1 x 1 + rank 5 %, float in and out",
}


def _one_row(record: Record) -> bool:
    return record["facts"].get("m") == 1


_LINEAR = "W4 linear + rank 32, M = 1 and 4"
_NETWORK = "ResNet-18 and -50 W4A8 + 5 % adapters"

TARGETS = (
    Target(("linear",), _LINEAR, "read bandwidth", 0.80, _share("bytes", "read"), percent=True),
    Target(("linear",), _LINEAR, READING, 0.80, ratio(READING), percent=True),
    Target(("linear",), _LINEAR, "torch float32", 6, ratio("torch float32")),
    Target(("linear",), _LINEAR, "best 4-bit peer", 1.6, ratio(*FOUR_BIT)),
    Target(
        ("linear",),
        "W3 linear, M = 1",
        "cora W4",
        1.2,
        _over("cora W4A8 rank", "cora W3"),
        only=_one_row,
    ),
    Target(
        ("linear",),
        "W2 linear, M = 1",
        "cora W4",
        1.7,
        _over("cora W4A8 rank", "cora W2"),
        only=_one_row,
    ),
    Target(
        ("gemm",),
        "W4A8 linear + rank 32, M = 128",
        "VNNI peak",
        0.75,
        _share("operations", "vnni"),
        percent=True,
    ),
    Target(
        ("gemm",),
        "W4A8 linear + rank 32, M = 128",
        "torch int8 dynamic",
        1.05,
        ratio("torch int8 dynamic"),
    ),
    Target(("gemm",), "W4A8 linear + rank 32, M = 128", "best 4-bit peer", 2.5, ratio(*FOUR_BIT)),
    *(
        target
        for row, work in _KINDS.items()
        for target in (
            Target((row,), work, "torch float32", 2.5, ratio("torch float32")),
            Target((row,), work, "best of onnxruntime, OpenVINO int8", 1.0, ratio(*INT8)),
            Target(
                (row,),
                f"{work}, as fused networks run it",
                "best of onnxruntime, OpenVINO int8",
                1.0,
                ratio(*INT8, of=in_networks),
            ),
        )
    ),
    Target(("network",), _NETWORK, "torch float32", 4, ratio("torch float32")),
    Target(("network",), _NETWORK, "onnxruntime int8", 1.6, ratio("onnxruntime int8")),
    Target(("network",), _NETWORK, "OpenVINO int8", 1.0, ratio("OpenVINO int8")),
    *(
        Target(
            rows,
            f"adapter of rank 5 %, {how}, {kernel}",
            "no adapter",
            0.08,
            _adapter(which),
            percent=True,
            most=True,
        )
        for kernel, rows in (("3 x 3", _CONVS[::2]), ("1 x 1", _CONVS[1::2]))
        for how, which in (("beside its codes", ours), ("as fused networks run it", in_networks))
    ),
    Target(
        ("fake_quantize",),
        "fake_quantize with residual",
        "bytes floor",
        0.85,
        _share("bytes", "read1_write2"),
        percent=True,
    ),
    Target(
        ("fake_quantize",),
        "fake_quantize with residual, new tensors",
        "torch, residual subtracted",
        3,
        ratio("torch, residual subtracted", of=lambda record: "cora, new tensors"),
    ),
    Target(
        ("svd",), "adapter factors of ResNet-50", "torch.linalg.svd", 3, ratio("torch.linalg.svd")
    ),
    Target(
        ("svd",),
        "adapter factors of ResNet-50, energy",
        "exact SVD",
        0.9999,
        lambda r, _: r["facts"].get("energy"),
        percent=True,
    ),
    Target(
        ("memory",),
        "peak memory of packed ResNet-50",
        "float32",
        0.35,
        lambda r, _: r["facts"].get("ratio"),
        percent=True,
        most=True,
    ),
)


DISTURBED = 0.25  # cores that others may keep busy while a case is timed


def disturbed(record: Record) -> bool:
    return bool(record.get("others", 0.0) > DISTURBED)


def verdicts(records: Iterable[Record], peaks: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """Every target at every number of threads it was measured at, by the cases that were not disturbed."""
    records = [record for record in records if not disturbed(record)]
    found = []
    for target in TARGETS:
        for threads in sorted({r["threads"] for r in records}):
            values = [
                target.value(r, peaks.get(str(threads), {}))
                for r in records
                if r["threads"] == threads and r["row"] in target.rows and target.only(r)
            ]
            known = tuple(v for v in values if v is not None)
            if known:
                found.append(Verdict(target, threads, known))
    return found


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us"


def _target_table(found: Sequence[Verdict]) -> str:
    rows = []
    for v in found:
        goal = ("<= " if v.target.most else ">= ") + v.target.text(v.target.goal)
        state = "reached" if v.reached == len(v.values) else "missed"
        if 0 < v.reached < len(v.values):
            state = f"{v.reached} of {len(v.values)}"
        many = len(v.values) > 1
        rows.append(
            [
                v.target.work,
                v.target.against,
                goal,
                str(v.threads),
                v.target.text(v.worst),
                v.target.text(v.mean) if many else "",
                v.target.text(v.best) if many else "",
                state,
            ]
        )
    head = ["work", "against", "target", "threads", "worst", "mean", "best", "reached"]
    return markdown(head, rows)


_UNITS = {"amx_int8": "AMX", "vnni": "VNNI", "avx2_int4": "AVX2"}  # the fastest of a machine first


def _row_table(records: Sequence[Record], peaks: Mapping[str, Mapping[str, float]]) -> str:
    """Times of one row: a line a case, a column a contestant (cora's names without their ranks)."""
    names: list[str] = []
    for record in records:
        names += [n for n in map(_column, record["seconds"]) if n not in names]
    rows = []
    for record in records:
        times = {_column(name): s for name, s in record["seconds"].items()}
        speed = []
        own, peak = record["seconds"][ours(record)], peaks.get(str(record["threads"]), {})
        if record["row"] in ("linear", "fake_quantize") and record["bytes"]:
            speed.append(f"{record['bytes'] / own / 1e9:.1f} GB/s")
        elif record["operations"]:
            rate = record["operations"] / own / 1e9
            share = next(
                (
                    f", {100 * rate / peak[p]:.0f} % of {unit}"
                    for p, unit in _UNITS.items()
                    if p in peak
                ),
                "",
            )
            speed.append(f"{rate:.0f} GOP/s{share}")
        cells = [duration(times[name]) if name in times else "" for name in names]
        mark = " (*)" if disturbed(record) else ""
        rows.append([record["name"] + mark, str(record["threads"]), *cells, *speed])
    head = ["work", "threads", *names, *(["cora reaches"] if any(map(len, rows)) else [])]
    width = max(map(len, rows))
    return markdown(head[:width], [row + [""] * (width - len(row)) for row in rows])


def _column(name: str) -> str:
    """A contestant's column: the rank is the case's, and stands in no head."""
    if not name.startswith("cora"):
        return name
    words = name.split()
    kept = [w for i, w in enumerate(words) if not (i and words[i - 1] == "rank")]
    return " ".join(kept).replace(" rank,", ",").replace(" rank", " + adapter")


def page(results: Mapping[str, Any], name: str, notes: str = "") -> str:
    """The page beside the file `name` of the results; `notes` say what explains the verdicts."""
    peaks = results["peaks"]
    records = sorted(
        results["cases"].values(),
        key=lambda r: (list(ROWS).index(r["row"]), r["order"], r["threads"]),
    )
    facts = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        "# Performance",
        f"`python benchmarks/performance.py` makes this page and [{name}]({name}). "
        "All contestants of a line run in turns in one process, in another order each time; times are "
        "medians. Ratios are the peer's time over cora's. Linear layers of few rows read weights that no "
        "cache holds: half a gibibyte is read before each turn. Codes in and out: uint8, channels last, each "
        "library in its own layout; torch float32 and bfloat16 there work on floats. Convolutions carry a bias.",
        f"{facts['cpu']}, {facts['logical cores']} cores ({', '.join(facts['instructions'])}), "
        f"{facts['memory GiB']} GiB; Python {facts['python']}, {versions}; {results['date']}. "
        f"cora's level: {facts['level']}.",
    ]
    if peaks:
        counts = sorted(peaks, key=int)
        labels = results["peak names"]
        rows = [[labels[p], *(f"{peaks[c][p]:.0f}" for c in counts)] for p in peaks[counts[0]]]
        parts += [
            markdown(
                ["measured peak", *(f"{c} threads" if c != "1" else "1 thread" for c in counts)],
                rows,
            )
        ]
    parts += ["## Targets", _target_table(verdicts(records, peaks))]
    if notes:
        parts.append(notes.strip())
    for row, title in ROWS.items():
        members = [r for r in records if r["row"] == row]
        if not members:
            continue
        parts.append(f"## {title}")
        if row == "memory":
            parts.append(_memory_text(members[0]))
        else:
            parts.append(_row_table(members, peaks))
    builds = Counter(r.get("core") for r in records)
    stale = len(records) - max(builds.values())
    if stale:
        parts.append(
            f"{stale} of {len(records)} cases were measured with another build of cora than the rest."
        )
    if any(map(disturbed, records)):
        parts.append("(*) Other processes took part of the machine: not counted in the targets.")
    absent = {name: why for r in records for name, why in r["absent"].items()}
    absent |= results.get("absent", {})
    lines = [f"- {name}: {why}" for name, why in absent.items()] or ["None."]
    parts += ["## Peers that are absent", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _memory_text(record: Record) -> str:
    f = record["facts"]
    mib = {k: f"{v / 1024:.1f}" for k, v in f.items() if k != "ratio"}
    return (
        f"Peak resident memory of a process that loads the file and runs one image, above one that only "
        f"imports torch ({mib['bare']} MiB): float32 {(f['float'] - f['bare']) / 1024:.1f} MiB, packed "
        f"{(f['packed'] - f['bare']) / 1024:.1f} MiB. Files: {mib['float file']} and {mib['packed file']} MiB."
    )
