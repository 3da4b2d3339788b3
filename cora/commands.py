"""What the command `cora` does: a function a command, from its arguments to what --json prints and the text."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import cora
from cora import Calibration, QuantSpec, SearchConfig, TuneConfig, ops
from cora.bench import bench as time_models
from cora.bench import in_memory_bytes
from cora.convert import DEFAULT_TARGET_BITS
from cora.report import float_state_bits, versions
from cora.serialization import read_header
from cora.tables import comparison_table, kib, text_table
from cora.tasks import Task, UserTask, available_tasks, load_object, resolve_task
from cora.tasks.corruptions import robustness, robustness_table

__all__ = ["bench", "evaluate", "info", "inspect", "quantize"]


def _task(args: argparse.Namespace) -> Task:
    """The task that MODEL names, with the batches that --calibration and --validation name."""
    name = args.model
    given = {
        part: _as_function(load_object(spec))
        for part in ("calibration", "validation")
        if (spec := getattr(args, part, None))
    }
    task: Task | None = None
    if ":" in name and not name.startswith("imagenet:"):
        build = _builder(load_object(name))
        if build is not None:
            task = UserTask(name, build, _no_batches)
    task = task or resolve_task(name, args.data)
    if not given:
        return task
    if not isinstance(task, UserTask):
        raise ValueError(
            f"--{next(iter(given))} goes with a model of your own, {name} has its data"
        )
    return task.with_data(**given)


def _builder(found: Any) -> Callable[[], nn.Module] | None:
    """A function that gives the model, if the object is a model, or a function or class of one."""
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)
    if isinstance(found, Task) or hasattr(found, "calibration") or not callable(found):
        return None
    made = found()
    return (lambda: copy.deepcopy(made)) if isinstance(made, nn.Module) else None


def _as_function(found: Any) -> Callable[..., Iterable[Any]]:
    return found if callable(found) else lambda: found


def _no_batches() -> NoReturn:
    raise ValueError("MODEL is a model without data: name batches with --calibration")


def _evaluator(
    task: Task, model: nn.Module, limit: int | None, progress: bool
) -> Callable[[nn.Module], dict[str, float]] | None:
    """model -> metrics, also against the float model's outputs; None without validation data."""
    if not task.has_metric:
        return None
    reference: Any = task.outputs(model, limit, progress) if task.has_validation else model
    return lambda candidate: task.evaluate(candidate, limit, reference, progress)


def _example(task: Task) -> Any:
    """A batch of inputs."""
    return next(iter(task.calibration(min(32, task.default_samples), 0)))


def quantize(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.html is not None and args.html.resolve() == args.output.resolve():
        raise ValueError(f"--html and --output are the same file, {args.output}")
    _check_together(args)
    granularity: Any = args.granularity or ("per_group" if args.group_size else "per_channel")
    spec = QuantSpec(
        args.bits or 4,
        granularity,
        args.group_size,
        args.symmetric,
        args.clip,
        3.0 if args.k is None else args.k,
        args.rounding,
    )
    target = args.target_bits
    if args.bits is None and target is None and args.max_drop is None:
        target = DEFAULT_TARGET_BITS
    task = _task(args)
    samples = args.samples or task.default_samples
    options = {"method": args.search, "plan": args.plan, "iterations": args.iterations}
    config = SearchConfig(
        samples=samples,
        seed=args.seed,
        loss=args.loss,
        label_loss=task.label_loss,
        **{name: value for name, value in options.items() if value is not None},
    )
    clock = time.perf_counter()
    model = task.model()
    calibration = Calibration(
        model,
        task.calibration(samples, args.seed),
        samples,
        args.seed,
        logits=task.output_logits,
        progress=args.progress,
        fold_bn=not args.keep_bn,
    )
    qmodel = cora.quantize(
        model,
        calibration,
        spec,
        args.activation_bits,
        0.05 if args.rank_budget is None else args.rank_budget,
        args.adapter_bits,
        config,
        args.skip,
        args.progress,
        target_bits=target,
        max_drop=args.max_drop,
        tune=TuneConfig(iterations=args.tune),
        propagate=not args.no_propagate,
        fit=args.fit,
        first_last=args.first_last,
        activation=args.activation or "static",
        activation_range=args.activation_range or "mse",
        bias_correction=not args.no_bias_correction,
        embedding_bits=args.embedding_bits,
        recurrent_bits=args.recurrent_bits,
    )
    seconds = time.perf_counter() - clock
    cora.save(qmodel, args.output)
    report: Any = qmodel.report
    notes = []
    if report.search["interrupted"]:
        notes.append("interrupted: this is the best that was found until then, not compared")
    elif not args.no_compare:
        metrics = _evaluator(task, model, args.limit, args.progress)
        if metrics is None:
            notes.append("no validation data: compared on the calibration data")
        cora.compare(model, calibration, qmodel, metrics, args.progress)
        cora.save(qmodel, args.output)  # the report in the file now holds the comparison
    if args.html is not None:
        report.to_html(args.html)
    size = args.output.stat().st_size
    text = [str(report)]
    if report.comparison:
        text += ["", text_table(*comparison_table(report.comparison))]
    text += ["", *notes, f"{args.output}: {size:,} bytes, quantized in {seconds:.1f} s"]
    text += [f"{args.html}: the report"] if args.html else []
    values = {
        "model": args.model,
        "file": str(args.output),
        "file_bytes": size,
        "html": str(args.html) if args.html else None,
        "seconds": seconds,
        "notes": notes,
        "report": report.to_dict(),
    }
    return values, "\n".join(text)


def _check_together(args: argparse.Namespace) -> None:
    """Refuse options that would change nothing beside the others."""
    fixed, searched = args.bits is not None, args.plan == "search" or args.search == "gate"
    for name, matters, reason in (
        ("granularity", fixed, "goes with --bits: else it is chosen"),
        ("group_size", fixed, "goes with --bits: else it is chosen"),
        ("search", fixed, "goes with --bits: else ranks are chosen with the bits, see --plan"),
        ("plan", not fixed, "goes without --bits: it chooses the bits"),
        ("iterations", searched, "goes with a search: --plan search, or --bits and --search gate"),
        ("k", args.clip == "ksigma", "goes with --clip ksigma"),
        ("activation", args.activation_bits, "goes with --activation-bits"),
        ("activation_range", args.activation_bits, "goes with --activation-bits"),
        ("limit", not args.no_compare, "goes without --no-compare: it limits the comparison"),
    ):
        if getattr(args, name) is not None and not matters:
            raise ValueError(f"--{name.replace('_', '-')} {reason}")
    if args.rank_budget and not fixed:
        raise ValueError(
            "--rank-budget goes with --bits: else adapters share --target-bits, and only 0, none at "
            f"all, can be asked for; got {args.rank_budget}"
        )


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    task = _task(args)
    model = task.model()
    qmodel = cora.load(args.file, model)
    report: Any = getattr(qmodel, "report", None)
    if args.fuse:
        qmodel = cora.fuse(qmodel, _example(task))
    metrics = _evaluator(task, model, args.limit, args.progress)
    if metrics is None:
        raise ValueError(f"{args.model}: there are no validation data; name them with --validation")
    packed_bits = report.totals["bits_per_weight"] if report else math.nan
    rows = [
        {
            "row": label,
            "bits_per_weight": bits,
            "total_bits": float_state_bits(candidate),
            **metrics(candidate),
        }
        for label, candidate, bits in (("float", model, 32.0), ("packed", qmodel, packed_bits))
    ]
    if report:
        rows[1]["total_bits"] = report.totals["total_bits"]
    text = text_table(*comparison_table(rows))
    if "samples" in rows[0]:
        text += f"\n{rows[0]['samples']:.0f} validation samples"
    corrupted = None
    if args.corruptions:
        models = {"float": model, "packed": qmodel}
        corrupted = robustness(task, models, args.limit, progress=args.progress)
        text += f"\n\n{text_table(*robustness_table(corrupted))}"
    values = {"model": args.model, "file": str(args.file), "fused": args.fuse, "rows": rows}
    return {**values, "corruptions": corrupted}, text


_OF_A_MODEL = (
    *("bits", "granularity", "group_size", "clip", "adapter_bits", "samples", "seed"),
    "calibration",
)


def inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    target = Path(args.target)
    packed = target.suffix == ".safetensors" or (target.is_file() and target.suffix != ".py")
    for option in ("model",) if not packed else _OF_A_MODEL:
        if getattr(args, option) is not None:
            kind, other = ("packed file", "model") if packed else ("model", "packed file")
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} goes with a {other}, {args.target} is a {kind}")
    if not packed:
        return _diagnose(args)
    if not target.is_file():
        raise ValueError(f"there is no file {args.target!r}")
    args.file = target
    header = read_header(args.file)
    size = args.file.stat().st_size
    report = cora.Report.from_dict(header["report"]) if header["report"] else None
    text = [f"{args.file}: {size:,} bytes, format {header['format']}, checksum right"]
    if args.model:
        args.calibration = args.validation = None
        cora.load(args.file, _task(args).model())
        text.append(f"it fits {args.model}")
    if report is None:
        if args.html:
            raise ValueError(f"{args.file}: it was saved without a report, so there is no page")
        head = ["layer", "kind", "weight", "bits", "rank"]
        cells = [
            [name, la["kind"], str(la["weight_shape"]), str(la["bits"]), str(la["rank"])]
            for name, la in header["layers"].items()
        ]
        text += ["", text_table(head, cells)]
    else:
        text += ["", str(report)]
        if report.comparison:
            text += ["", text_table(*comparison_table(report.comparison))]
        if args.html:
            report.to_html(args.html)
            text += ["", f"{args.html}: the report"]
    values = {
        "file": str(args.file),
        "file_bytes": size,
        "format": header["format"],
        "layers": header["layers"],
        "fits": args.model,
        "report": header["report"],
    }
    return values, "\n".join(text)


def _diagnose(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `inspect` says of a model."""
    granularity: Any = args.granularity or ("per_group" if args.group_size else "per_channel")
    spec = QuantSpec(args.bits or 3, granularity, args.group_size, clip=args.clip or "mse")
    args.model = args.target
    task = _task(args)
    samples, seed = args.samples or task.default_samples, args.seed or 0
    model = task.model()
    batches = task.calibration(samples, seed)
    calibration = Calibration(
        model, batches, samples, seed, logits=task.output_logits, progress=args.progress
    )
    diagnosis = cora.diagnose(model, calibration, spec, args.adapter_bits or 4, args.progress)
    text = [str(diagnosis)]
    if args.html:
        diagnosis.to_html(args.html)
        text += ["", f"{args.html}: the diagnosis"]
    values = {"model": args.model, "html": str(args.html) if args.html else None}
    return {**values, "diagnosis": diagnosis.to_dict()}, "\n".join(text)


def bench(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    task = _task(args)
    model = task.model()
    qmodel = cora.load(args.file, model)
    if args.shape:
        example: Any = torch.randn(args.shape, generator=torch.Generator().manual_seed(0))
    else:
        example = _example(task)
    if args.fuse:
        qmodel = cora.fuse(qmodel, example)
    rows = time_models(
        model, qmodel, example, args.batch, args.threads, args.seconds, args.progress
    )
    sizes = {
        "float_bytes": float_state_bits(model) // 8,
        "file_bytes": args.file.stat().st_size,
        "float_memory_bytes": in_memory_bytes(model),
        "packed_memory_bytes": in_memory_bytes(qmodel),
    }
    names = [key.removesuffix("_iqr_ms") for key in rows[0] if key.endswith("_iqr_ms")]
    head = ["batch", "threads", *[f"{name.replace('_', ' ')}, ms" for name in names], "speed-up"]
    cells = [
        [
            str(row["batch"]),
            str(row["threads"]),
            *[f"{row[f'{name}_ms']:.2f} (iqr {row[f'{name}_iqr_ms']:.2f})" for name in names],
            f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]
    text = (
        f"{_layer_table(rows[0])}{text_table(head, cells)}\n\nmedians; the last column is the faster "
        f"float time over the packed one\nfile {kib(8 * sizes['file_bytes'])} KiB, float state "
        f"{kib(8 * sizes['float_bytes'])} KiB; in memory {kib(8 * sizes['packed_memory_bytes'])} "
        f"KiB against {kib(8 * sizes['float_memory_bytes'])} KiB"
    )
    values = {
        "model": args.model,
        "file": str(args.file),
        "fused": args.fuse,
        "rows": rows,
        **sizes,
    }
    return {**values, "machine": versions()}, text


def _layer_table(row: dict[str, Any]) -> str:
    """The packed layers of one combination with their floors."""
    if not row["layers"]:
        return ""
    total = sum(layer["ms"] for layer in row["layers"])
    head = ["layer", "us", "share", "GOP/s", "GB/s", "floor, us", "bound by", "reached"]
    cells = [
        [
            layer["name"],
            f"{1e3 * layer['ms']:.1f}",
            f"{100 * layer['ms'] / total:.1f} %",
            f"{layer['operations'] / layer['ms'] / 1e6:.0f}",
            f"{layer['bytes'] / layer['ms'] / 1e6:.1f}",
            f"{1e3 * layer['floor_ms']:.1f}",
            layer["bound"],
            f"{100 * layer['reached']:.0f} %",
        ]
        for layer in row["layers"]
    ]
    roof = row["roof"]
    return (
        f"{text_table(head, cells)}\n\nbatch {row['batch']}, {row['threads']} threads: packed layers "
        f"{total:.3f} of {row['packed_ms']:.3f} ms, floor {row['floor_ms']:.3f} ms "
        f"({100 * row['reached']:.0f} % reached); measured here: products of codes "
        f"{roof['integer'] / 1e9:.0f} GOP/s, of floats {roof['floating'] / 1e9:.0f} GFLOP/s, memory "
        f"{roof['bandwidth'] / 1e9:.1f} GB/s\n\n"
    )


_CUDA_FUSED = (
    "Linear, Conv1d and Conv2d in one group, scales per tensor, channel or group of whole "
    "channels (a multiple of 8; of 16 if inputs are quantized), integer adapters up to rank 256; "
    "inputs float16, bfloat16 or quantized"
)
_CUDA_UNPACKED = (
    "float32 inputs, grouped and depthwise convolutions, scale groups that cut through channels, "
    "float adapters, ranks above 256; float Linear inputs of more than 192 rows and float images "
    "of many pixels (faster so)"
)


def info(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    isa = ops.isa()
    library = Path(cora.__file__).with_name("libcora_cuda.so")
    if not library.is_file():
        cuda = "no library: cora was built without nvcc"
    elif not torch.cuda.is_available():
        cuda = "library built; this torch or machine has no CUDA device"
    else:
        cuda = f"library built; {torch.cuda.get_device_name()}"
    tasks = [
        {"name": task.name, "description": task.description, "missing": task.missing}
        for task in available_tasks(args.data)
    ]
    known = versions()
    head = ", ".join(f"{key} {value}" for key, value in known.items() if key != "isa")
    kernels = ", ".join(f"{op} {level}" for op, level in isa.items() if op != "level")
    text = [
        head,
        f"CPU level {isa['level']} ({torch.get_num_threads()} threads); kernels: {kernels}",
        f"CUDA: {cuda}",
        f"CUDA, fused: {_CUDA_FUSED}",
        f"CUDA, weight unpacked for the call: {_CUDA_UNPACKED}",
        "",
        "tasks:",
    ]
    for task in tasks:
        text.append(f"  {task['name']:<18} {task['description']}")
        if task["missing"]:
            text.append(f"  {'':<18} not available: {' '.join(task['missing'].split())}")
    values = {
        "versions": known,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "cuda": {
            "library": library.is_file(),
            "device": torch.cuda.is_available(),
            "state": cuda,
            "fused": _CUDA_FUSED,
            "unpacked": _CUDA_UNPACKED,
        },
        "tasks": tasks,
    }
    return values, "\n".join(text)
