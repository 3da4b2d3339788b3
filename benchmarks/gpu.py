"""Builds, tests and times the CUDA kernels on one GPU, in one go and within minutes.

    python benchmarks/gpu.py                       # on the GPU machine: everything
    python benchmarks/gpu.py --no-build --only decode --json out.json
    python benchmarks/gpu.py --backend emulated    # anywhere: the same cases, small, checked but not timed

Each contestant is captured into a CUDA graph of calls that go through enough copies of their tensors to
be past four times the second-level cache; medians and interquartile ranges of replays, by events.
Baselines are torch's own operators on 16-bit tensors, rotated alike; all data is random. "x" is the
baseline's time over ours, "floor" the time in which the card could move the bytes that ours must.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

GROUPS = ("quantize", "decode", "prefill", "linear8", "conv16", "conv8", "svd")
CACHE_MULTIPLE = 4
CALLS = 20  # a graph
WARM_UP, REPLAYS = 5, 50


@dataclass
class Row:
    """One case: what was measured, and what it is held against."""

    group: str
    name: str
    us: float
    iqr_us: float
    baseline: str
    baseline_us: float
    floor_us: float
    accept: float | None  # the ratio wanted
    error: float
    others: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.baseline_us / self.us if self.us else float("nan")


@dataclass
class Case:
    """make(seed) -> the call and its baselines on tensors of their own."""

    group: str
    name: str
    make: Callable[[int], tuple[Callable[[], Tensor], dict[str, Callable[[], Any]]]]
    expected: Callable[[int], Tensor]
    bytes_moved: int  # by ours
    bytes_held: int  # by the copy of ours that holds least
    accept: float | None = None


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


# --- Cases ---------------------------------------------------------------------------------------

WITHOUT = "without warpgroups"  # the contestant's name: our call, not by Hopper's own instructions


def without_warpgroups(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with CORA_WARPGROUPS=0, which is read when the kernel is chosen."""

    def run() -> Tensor:
        before = os.environ.get("CORA_WARPGROUPS", "1")
        os.environ["CORA_WARPGROUPS"] = "0"
        try:
            return call()
        finally:
            os.environ["CORA_WARPGROUPS"] = before

    return run


class Cases:
    """The acceptance table's cases; `small` shrinks them so that they run on the emulator."""

    def __init__(self, device: str, namespace: Any, small: bool, warpgroups: bool) -> None:
        self.device, self.ops, self.small, self.warpgroups = device, namespace, small, warpgroups

    def weight(
        self, n: int, k: int, bits: int, rank: int, groups: int, generator: torch.Generator
    ) -> dict[str, Any]:
        """A random packed weight, as the file has it, and its float value."""
        codes = torch.randint(
            0, 2**bits, (n, k), dtype=torch.uint8, generator=generator, device=self.device
        )
        scale = torch.rand(n, groups, generator=generator, device=self.device) * 0.01 + 0.005
        zero_point = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.int32, device=self.device)
        a = torch.randint(
            -127, 128, (rank, k), dtype=torch.int8, generator=generator, device=self.device
        )
        b = torch.randint(
            -127, 128, (n, rank), dtype=torch.int8, generator=generator, device=self.device
        )
        adapter_scale = torch.rand(rank, generator=generator, device=self.device) * 1e-6
        from cora import ops

        value = ops.dequantize_packed(ops.pack_bits(codes, bits), scale, zero_point, bits, k)
        if rank:
            value = value + b.float() @ (a.float() * adapter_scale[:, None])
        return {
            "codes": ops.pack_bits(codes, bits),
            "scale": scale,
            "zero_point": zero_point,
            "bits": bits,
            "adapter": (a, b, adapter_scale) if rank else (None, None, None),
            "value": value,
        }

    def layer(
        self, w: dict[str, Any], channels: int, window: Sequence[Any]
    ) -> tuple[Tensor, list[int]]:
        """The prepared layer on the device, and its geometry."""
        from cora import ops

        kernel, stride, padding, dilation = window if window else ([], [], [], [])
        prepared = self.ops.prepare_layer.default(
            w["codes"], w["scale"], w["zero_point"],
            w["bits"], channels, kernel, stride, padding, dilation, 1, *w["adapter"], None,
        )  # fmt: skip
        pairs = tuple(window) if window else ()
        geometry = ops.layer_geometry(
            w["codes"],
            w["scale"],
            w["bits"],
            channels,
            *(tuple(p) for p in pairs),
            b=w["adapter"][1],
            bias=False,
        )
        return prepared, geometry

    def run(
        self,
        x: Tensor,
        layer: tuple[Tensor, list[int]],
        *quantizer: Any,
        out: tuple[float | None, int, int] = (None, 0, 0),
    ) -> Tensor:
        scale, zero, bits, halo = quantizer or (None, 0, 0, 0)
        rest = (None, 1.0, 0, 0, float("-inf"), float("inf"), *out)
        return self.ops.run_layer.default(x, *layer, scale, zero, bits, halo, *rest)

    def linear(
        self,
        group: str,
        m: int,
        n: int,
        k: int,
        bits: int = 4,
        rank: int = 64,
        *,
        x_bits: int = 0,
        accept: float | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Case:
        if self.small:
            n, k, rank, m = max(n // 64, 32), max(k // 64, 64), rank // 4, min(m, 300)
        groups = k // 128 if k % 128 == 0 and not x_bits else 1

        def data(seed: int) -> tuple[dict[str, Any], Tensor]:
            generator = torch.Generator(self.device).manual_seed(seed)
            w = self.weight(n, k, bits, rank, groups, generator)
            return w, torch.randn(m, k, generator=generator, device=self.device).to(dtype)

        def make(seed: int) -> tuple[Callable[[], Tensor], dict[str, Callable[[], Any]]]:
            w, x = data(seed)
            layer = self.layer(w, k, ())
            dense = w["value"].to(dtype).T
            others: dict[str, Callable[[], Any]] = {"torch mm": lambda: x @ dense}
            if rank:
                plain = self.layer({**w, "adapter": (None, None, None)}, k, ())
                others["rank 0"] = lambda: self.run(x, plain, *quantizer)
                a, b, s = w["adapter"]
                down = (a.float() * s[:, None]).to(dtype).T
                up = b.to(dtype).T
                others["unfused"] = lambda: self.run(x, plain, *quantizer) + (x @ down) @ up
            if bits == 4 and m <= 64 and self.device == "cuda" and not x_bits:
                others |= tinygemm(x, w, n, k)
            quantizer = (0.03, 128, x_bits, 0) if x_bits else ()
            if x_bits and self.warpgroups:
                others[WITHOUT] = without_warpgroups(lambda: self.run(x, layer, *quantizer))
            return lambda: self.run(x, layer, *quantizer), others

        def expected(seed: int) -> Tensor:
            w, x = data(seed)
            xf = x.double()
            if x_bits:
                xf = 0.03 * (((x.float() / 0.03).round() + 128).clamp(0, 255).double() - 128)
            return xf @ w["value"].double().T

        held = n * k * bits // 8 + rank * (n + k)
        name = f"{n}x{k} M{m} W{bits}{f'A{x_bits}' if x_bits else ''} r{rank}"
        return Case(group, name, make, expected, held + 2 * m * (n + k), held, accept)

    def conv(
        self,
        group: str,
        batch: int,
        size: int,
        channels: int,
        rank: int = 16,
        *,
        x_bits: int = 0,
        accept: float | None = None,
    ) -> Case:
        if self.small:
            batch, size, channels, rank = min(batch, 2), min(size, 7), channels // 8, rank // 4
        k = channels * 9
        window = ([3, 3], [1, 1], [1, 1], [1, 1])
        # 8-bit layers hand each other codes inside a border; the sums' spread fills them.
        quantizer = (0.03, 128, x_bits, 1) if x_bits else ()
        out = (0.0028 * k**0.5, 128, 1) if x_bits else (None, 0, 0)

        def data(seed: int) -> tuple[dict[str, Any], Tensor]:
            generator = torch.Generator(self.device).manual_seed(seed)
            w = self.weight(channels, k, 4, rank, 1, generator)
            shape = (batch, channels, size, size)
            if x_bits:
                x = torch.randint(
                    0, 256, shape, dtype=torch.uint8, generator=generator, device=self.device
                )
                x = F.pad(x, (1, 1, 1, 1), value=128)
            else:
                x = torch.randn(shape, generator=generator, device=self.device).half()
            return w, x.to(memory_format=torch.channels_last)

        def make(seed: int) -> tuple[Callable[[], Tensor], dict[str, Callable[[], Any]]]:
            w, x = data(seed)
            layer = self.layer(w, channels, window)
            filters = w["value"].half().reshape(channels, channels, 3, 3)
            filters = filters.to(memory_format=torch.channels_last)
            image = x[:, :, 1:-1, 1:-1].half() if x_bits else x
            image = image.contiguous(memory_format=torch.channels_last)
            plain = self.layer({**w, "adapter": (None, None, None)}, channels, window)
            others: dict[str, Callable[[], Any]] = {
                "cudnn float16": lambda: F.conv2d(image, filters, padding=1),
                "rank 0": lambda: self.run(x, plain, *quantizer, out=out),
            }
            if x_bits and self.warpgroups:
                others[WITHOUT] = without_warpgroups(
                    lambda: self.run(x, layer, *quantizer, out=out)
                )
            return lambda: self.run(x, layer, *quantizer, out=out), others

        def expected(seed: int) -> Tensor:
            w, x = data(seed)
            xf = 0.03 * (x[:, :, 1:-1, 1:-1].double() - 128) if x_bits else x.double()
            y = F.conv2d(xf, w["value"].double().reshape(channels, channels, 3, 3), padding=1)
            if not x_bits:
                return y
            codes = (y / out[0]).round().add(128).clamp(0, 255)
            return F.pad(codes, (1, 1, 1, 1), value=128)

        pixels = batch * size * size * channels
        held = k * channels // 2 + rank * (k + channels)
        moved = held + pixels * (2 if x_bits else 4)
        name = f"b{batch} {size}x{size}x{channels} 3x3 W4{f'A{x_bits}' if x_bits else ''} r{rank}"
        return Case(group, name, make, expected, moved, held + pixels, accept)

    def quantize(self, rows: int, columns: int, backward: bool, accept: float | None) -> Case:
        if self.small:
            rows, columns = rows // 64, columns // 64

        def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            generator = torch.Generator(self.device).manual_seed(seed)
            x, grad = (
                torch.randn(rows, columns, generator=generator, device=self.device)
                for _ in range(2)
            )
            scale = torch.rand(rows, 1, generator=generator, device=self.device) * 0.1 + 0.1
            return x, grad, scale, torch.full((rows, 1), 8, dtype=torch.int32, device=self.device)

        def eager(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
            y = ((x / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale)
            return y, x - y

        def make(seed: int) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
            x, grad, scale, zero = data(seed)
            if backward:

                def chain() -> tuple[Tensor, Tensor]:
                    q = (x / scale).round() + zero
                    inside = (q >= 0) & (q <= 15)
                    return grad * inside, (grad * (q.clamp(0, 15) - zero - x / scale)).sum(1)

                op = self.ops.fake_quantize_backward.default
                return lambda: op(grad, x, scale, zero, 4)[0], {"torch eager": chain}
            op = self.ops.fake_quantize.default
            others: dict[str, Callable[[], Any]] = {"torch eager": lambda: eager(x, scale, zero)}
            if self.device == "cuda":
                compiled = torch.compile(eager)
                compiled(x, scale, zero)
                others["torch.compile"] = lambda: compiled(x, scale, zero)
            return lambda: op(x, scale, zero, 4, True, False)[0], others

        def expected(seed: int) -> Tensor:
            x, grad, scale, zero = data(seed)
            if backward:
                q = (x / scale).round() + zero
                return grad * ((q >= 0) & (q <= 15))
            return eager(x, scale, zero)[0]

        count = rows * columns
        kind = "backward" if backward else "forward"
        return Case(
            "quantize", f"{kind} {rows}x{columns}", make, expected, 12 * count, 4 * count, accept
        )

    def all(self, groups: Sequence[str]) -> Iterator[Case]:
        for rows, columns in ((4096, 4096), (8192, 8192), (512, 4608)):
            for backward in (False, True):
                yield self.quantize(rows, columns, backward, 3.2)
        for n, k in ((8192, 8192), (14336, 4096), (4096, 4096)):
            for m in (1, 4, 16):
                accept = 2.2 if n > 4096 else 1.5 if m != 4 else None
                yield self.linear("decode", m, n, k, accept=accept)
        yield self.linear("decode", 32, 8192, 8192, accept=2.0)
        yield self.linear("decode", 64, 8192, 8192, accept=1.4)
        for bits, accept in ((3, 2.4), (2, 2.6)):
            for m in (1, 16):
                yield self.linear("decode", m, 8192, 8192, bits, accept=accept)
        for m, accept in ((256, 0.75), (1024, 0.9), (4096, 0.95)):
            yield self.linear("prefill", m, 8192, 8192, accept=accept)
        for m in (256, 4096):
            yield self.linear("linear8", m, 8192, 8192, x_bits=8, accept=1.1)
        for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
            accept16 = 0.7 if channels > 64 else None
            yield self.conv("conv16", 32, size, channels, accept=accept16)
            yield self.conv(
                "conv8", 32, size, channels, x_bits=8, accept=1.1 if channels > 64 else None
            )
        for size, channels in ((14, 256), (7, 512)):
            yield self.conv("conv8", 1, size, channels, x_bits=8, accept=1.0)


def tinygemm(x: Tensor, w: dict[str, Any], n: int, k: int) -> dict[str, Callable[[], Any]]:
    """torch's own 4-bit matmul (bfloat16, groups of 128), without the adapter."""
    try:
        from cora import ops

        codes = ops.unpack_bits(w["codes"], 4, k)
        packed = torch.ops.aten._convert_weight_to_int4pack(
            (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8
        )
        groups = k // w["scale"].shape[1]
        scales = w["scale"].T.bfloat16()
        params = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
        half = x.bfloat16()
        torch.ops.aten._weight_int4pack_mm(half, packed, groups, params)
    except (RuntimeError, AttributeError, NotImplementedError):
        return {}
    return {
        "torch int4pack": lambda: torch.ops.aten._weight_int4pack_mm(half, packed, groups, params)
    }


# --- Timing --------------------------------------------------------------------------------------


def timed(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """Median and interquartile range of one call in us: a graph of CALLS calls, each on other tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(max(CALLS, len(calls))):
            calls[i % len(calls)]()
    count = max(CALLS, len(calls))
    for _ in range(WARM_UP):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    us = [1e3 * a.elapsed_time(b) / count for a, b in zip(events, events[1:], strict=False)]
    quarters = statistics.quantiles(us, n=4)
    return statistics.median(us), quarters[2] - quarters[0]


def bandwidth() -> float:
    """Bytes a second of a copy far beyond the caches, read and write counted."""
    a = torch.ones(1 << 28, device="cuda")  # 1 GiB
    b = torch.empty_like(a)
    us, _ = timed([lambda: torch.neg(a, out=b)])  # a kernel: a graph leaves copies to slower hands
    return 2 * a.nbytes / us * 1e6


def measure(case: Case, peak: float) -> Row:
    """Our call and its baselines, in turns; sets of tensors past the cache, at most 4 GiB of them."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(25, 1 + CACHE_MULTIPLE * cache // case.bytes_held))
    ours: list[Callable[[], Any]] = []
    others: dict[str, list[Callable[[], Any]]] = {}
    for seed in range(sets):
        call, baselines = case.make(seed)
        ours.append(call)
        for name, baseline in baselines.items():
            others.setdefault(name, []).append(baseline)
    checked = [ours[0], *others.get(WITHOUT, [])[:1]]
    error = max(relative_error(call(), case.expected(0)) for call in checked)
    us, iqr = timed(ours)
    times = {name: timed(calls)[0] for name, calls in others.items()}
    first = next(iter(times))
    return Row(
        case.group, case.name, us, iqr, first, times[first],
        case.bytes_moved / peak * 1e6, case.accept, error, times,
    )  # fmt: skip


def time_factors() -> dict[str, float]:
    """Residual SVD on the GPU: seconds, and the share of the best energy, 512 x 4608 at rank 32."""
    from cora import gpu

    residual = torch.rand(512, 4608, device="cuda") - 0.5
    moment = torch.eye(4608, device="cuda")[None] + 0.01
    results = {}
    for name, weights in (("plain", None), ("weighted", moment)):
        gpu.lowrank_factors(residual, 32, 1, weights)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        a, b, s = gpu.lowrank_factors(residual, 32, 1, weights)
        torch.cuda.synchronize()
        results[f"{name}_seconds"] = time.perf_counter() - begin
        if weights is None:
            best = torch.linalg.svdvals(residual.double())[:32].square().sum()
            total = residual.double().square().sum()
            kept = total - (residual.double() - b.double() @ a.double()).square().sum()
            results["share_of_best_energy"] = float(kept / best)
    return results


# --- The whole run -------------------------------------------------------------------------------


def shell(*command: str, seconds: float) -> dict[str, Any]:
    begin = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    output = (result.stdout + result.stderr)[-4000:]
    return {"code": result.returncode, "seconds": time.perf_counter() - begin, "output": output}


HEAD = """| case | us | IQR | baseline | baseline us | x | accept | % of floor | error | others |
|---|---|---|---|---|---|---|---|---|---|"""


def line(r: Row) -> str:
    others = ", ".join(f"{name} {us:.1f}" for name, us in r.others.items() if name != r.baseline)
    accept = "" if r.accept is None else f"{r.accept} {'ok' if r.ratio >= r.accept else 'MISSED'}"
    return (
        f"| {r.group} {r.name} | {r.us:.1f} | {r.iqr_us:.1f} | {r.baseline} | {r.baseline_us:.1f} | "
        f"{r.ratio:.2f} | {accept} | {100 * r.floor_us / r.us:.0f} | {r.error:.1e} | {others} |"
    )


def rehearse(groups: Sequence[str]) -> list[str]:
    """Every case, small, on the emulated kernels: constructed, run, checked, not timed."""
    from emulator import emulator

    lines = []
    emulated = emulator()
    for case in Cases("cpu", emulated.ops, True, warpgroups=True).all(groups):
        if case.group not in groups:
            continue
        call, baselines = case.make(0)
        got = call()
        error = relative_error(got.float(), case.expected(0))
        for name, baseline in baselines.items():
            if name == WITHOUT:
                with emulated.device(9):
                    if not torch.equal(call(), got):
                        raise SystemExit(f"wrong result: {case.name} by warpgroups")
            elif name != "cudnn float16":  # slow on a CPU in float16
                baseline()
        lines.append(f"{case.group} {case.name}: error {error:.1e}, against {', '.join(baselines)}")
        if not error < 2e-3:
            raise SystemExit(f"wrong result: {lines[-1]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--no-build", action="store_true", help="use the built libraries")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument(
        "--sanitize", action="store_true", help="memcheck and racecheck on a few tests"
    )
    parser.add_argument("--seconds", type=float, default=480, help="no new case after this long")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the table of an earlier run, and end"
    )
    parser.add_argument("--json", type=Path, default=ROOT / ".out" / "gpu.json")
    args = parser.parse_args()
    begin = time.perf_counter()

    if args.table is not None:
        rows = json.loads(args.table.read_text())["rows"]
        known = [{k: v for k, v in row.items() if k != "ratio"} for row in rows]
        print("\n".join([HEAD, *(line(Row(**row)) for row in known)]))
        return
    if args.backend == "emulated":
        print("\n".join(rehearse(args.only)))
        print("The emulator says nothing about speed: no GPU was timed.")
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: no CUDA device (try --backend emulated)")

    capability = "".join(map(str, torch.cuda.get_device_capability()))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not args.no_build:
        if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
            raise SystemExit("benchmarks/gpu.py: nvcc not found (set CUDA_HOME, or --no-build)")
        os.environ["CORA_CUDA"] = "ON"
        os.environ.setdefault("CORA_CUDA_ARCHS", {"90": "90a"}.get(capability, capability))
        report["build"] = shell(sys.executable, "setup.py", "build_ext", "--inplace", seconds=240)
        if report["build"]["code"]:
            raise SystemExit(report["build"]["output"])
    if not args.no_tests:
        tests = ["tests/test_cuda_ops.py", "tests/test_cuda_models.py", "tests/test_cuda_build.py"]
        picked = ("-k", "cuda and not emulated", "-m", "not slow", "-p", "no:cacheprovider")
        report["tests"] = shell(sys.executable, "-m", "pytest", "-q", *picked, *tests, seconds=240)
        print(report["tests"]["output"][-1500:])
    if args.sanitize:
        few = ("-k", "cuda and (test_linear_bits or test_conv_reads)", "-p", "no:cacheprovider")
        for name in ("memcheck", "racecheck"):
            report[name] = shell(
                "compute-sanitizer", "--tool", name, "--error-exitcode", "1",
                sys.executable, "-m", "pytest", "-q", *few, "tests/test_cuda_ops.py", seconds=240,
            )  # fmt: skip

    torch.backends.cudnn.benchmark = True
    import cora.ops  # noqa: F401  # after the build

    peak = bandwidth()
    report["bandwidth"] = peak
    measured: list[Row] = []
    late: list[str] = []
    failed: dict[str, str] = {}

    def write() -> None:
        report["rows"] = [{**asdict(row), "ratio": row.ratio} for row in measured]
        report["not_run_for_time"], report["failed"] = late, failed
        report["seconds"] = time.perf_counter() - begin
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1))

    warpgroups = capability == "90"
    print(f"{report['device']}, torch {report['torch']}, {peak / 1e12:.2f} TB/s")
    print(HEAD)
    for case in Cases("cuda", torch.ops.cora, False, warpgroups).all(args.only):
        name = f"{case.group} {case.name}"
        if case.group not in args.only:
            continue
        if time.perf_counter() - begin > args.seconds:
            late.append(name)
            continue
        try:
            measured.append(measure(case, peak))
            print(line(measured[-1]), flush=True)
        except RuntimeError as error:  # the other cases are still worth their time
            failed[name] = str(error)
            print(f"FAILED {name}: {error}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        write()
    if "svd" in args.only:
        report["svd"] = time_factors()
    write()
    print(f"{report['seconds']:.0f} s")
    if late:
        print("not run for lack of time:", "; ".join(late))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
