"""The command `cora`: quantize, evaluate, inspect, bench, info.

Results go to stdout, as tables or with --json as one JSON object; progress and errors go to stderr.
Exit codes: 0; 2 bad input (one line, "cora: error: ..."); 1 any other failure; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import cora
from cora import Calibration, QuantSpec, SearchConfig, TuneConfig, ops
from cora.bench import bench, in_memory_bytes
from cora.convert import DEFAULT_TARGET_BITS
from cora.quantizer import SUPPORTED_BITS
from cora.report import float_state_bits, versions
from cora.serialization import read_header
from cora.tables import comparison_table, kib, text_table
from cora.tasks import Task, UserTask, available_tasks, load_object, resolve_task
from cora.tasks.corruptions import robustness, robustness_table

__all__ = ["main"]

_BAD_INPUT = (ValueError, TypeError, OSError, ImportError, AttributeError, RuntimeError)
_MODEL_HELP = (
    "a built-in task (see `cora info`), file.py or module with build() and calibration(), "
    "file.py:object or module:object"
)
_FUSE_HELP = "run the packed model fused (see `cora.fuse`)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    args.progress = not args.no_progress and sys.stderr.isatty()
    try:
        # What a user's model prints must not get between the lines of the result.
        with contextlib.redirect_stdout(sys.stderr):
            values, text = args.run(args)
        print(json.dumps(_plain(values)) if args.json else text, flush=True)
    except KeyboardInterrupt:
        print("cora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `cora info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        expected = isinstance(error, _BAD_INPUT)
        name = "" if expected else f"{type(error).__name__}: "
        print(f"cora: error: {name}{' '.join(str(error).split())}", file=sys.stderr)
        return 2 if expected else 1
    return 0


# --- Arguments -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"cora: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def _row_bits(text: str) -> int | None:
    if text == "float":
        return None
    if text not in map(str, SUPPORTED_BITS):
        raise argparse.ArgumentTypeError(f"expected 2..8 or float, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, a file was expected")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write into the folder {str(path.parent)!r}")
    return path


def _page(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return _writable(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cora", description="Low-bit quantization with searched low-rank adapters."
    )
    parser.add_argument("--version", action="version", version=f"cora {cora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--no-progress", action="store_true", help="no bars on stderr")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    data = _Parser(add_help=False)
    data.add_argument(
        "--data", type=_folder, metavar="DIR", help="data folder of the built-in tasks (CORA_DATA)"
    )

    def add(name: str, run: Callable[..., Any], about: str, *parents: _Parser) -> Any:
        command = commands.add_parser(
            name, help=about, description=about, parents=[common, *parents], allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    _quantize_arguments(add("quantize", _quantize, "quantize a model into a packed file", data))
    command = add("evaluate", _evaluate, "a packed file beside its float model", data)
    _model_arguments(command)
    command.add_argument("file", type=_existing, metavar="FILE")
    command.add_argument("--limit", type=_positive, metavar="N", help="validation samples")
    command.add_argument("--fuse", action="store_true", help=_FUSE_HELP)
    command.add_argument(
        "--corruptions",
        action="store_true",
        help="also on images with noise, blur and less contrast, at five severities",
    )
    about = "what a packed file holds, or where quantization would hurt a model and what helps"
    _inspect_arguments(add("inspect", _inspect, about, data))
    command = add("bench", _bench, "time a packed file against its float model", data)
    _model_arguments(command)
    command.add_argument("file", type=_existing, metavar="FILE")
    command.add_argument("--batch", type=_positive, nargs="+", default=[1, 8], metavar="N")
    command.add_argument("--threads", type=_positive, nargs="+", default=[1], metavar="N")
    command.add_argument(
        "--seconds", type=float, default=2.0, help="for each batch size and number of threads"
    )
    command.add_argument(
        "--shape", type=_positive, nargs="+", metavar="N", help="random inputs of this shape"
    )
    command.add_argument("--fuse", action="store_true", help=_FUSE_HELP)
    add("info", _info, "versions, kernels in use, tasks and their data", data)
    return parser


def _model_arguments(command: Any) -> None:
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    for name in ("calibration", "validation"):
        command.add_argument(
            f"--{name}",
            metavar="SPEC",
            help="file.py:object or module:object: batches, or a function",
        )


def _inspect_arguments(command: Any) -> None:
    add = command.add_argument
    add("target", metavar="MODEL_OR_FILE", help=f"*.safetensors, or a model: {_MODEL_HELP}")
    add("--html", type=_page, metavar="PAGE", help="write the report as a page")
    add = command.add_argument_group("of a packed file").add_argument
    add("--model", help=f"also check that the file fits: {_MODEL_HELP}")
    # Their defaults are set in _diagnose: a packed file must be able to refuse them.
    add = command.add_argument_group("of a model").add_argument
    add("--bits", type=int, choices=range(2, 9), help="default 3")
    add("--granularity", choices=("per_tensor", "per_channel", "per_group"))
    add("--group-size", type=_positive, metavar="N", help="weights a scale; implies per_group")
    add("--clip", choices=("minmax", "ksigma", "mse"), help="default mse")
    add("--adapter-bits", type=int, choices=(2, 3, 4, 5, 6, 7, 8, 16, 32), help="default 4")
    add("--samples", type=_positive, metavar="N", help="calibration samples")
    add("--seed", type=int, help="default 0")
    add(
        "--calibration",
        metavar="SPEC",
        help="file.py:object or module:object: batches, or a function",
    )


_OF_A_MODEL = (
    *("bits", "granularity", "group_size", "clip", "adapter_bits", "samples", "seed"),
    "calibration",
)


def _quantize_arguments(command: Any) -> None:
    _model_arguments(command)
    add = command.add_argument
    add("-o", "--output", type=_writable, required=True, metavar="FILE", help="*.safetensors")
    add("--html", type=_page, metavar="PAGE", help="write the report as a page")
    add("--no-compare", action="store_true", help="skip the rows beside the result")
    add("--limit", type=_positive, metavar="N", help="validation samples of the comparison")
    weights = command.add_argument_group("weights")
    add = weights.add_argument
    size = weights.add_mutually_exclusive_group()
    size.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="stored bits a weight with everything; bits, groups and ranks are chosen (default 3.5)",
    )
    size.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="the fewest bits that change at most so many percent of held-out answers",
    )
    size.add_argument("--bits", type=int, choices=range(2, 9), help="the same bits in every layer")
    add("--granularity", choices=("per_tensor", "per_channel", "per_group"))
    add("--group-size", type=_positive, metavar="N", help="weights a scale; implies per_group")
    add("--clip", choices=("minmax", "ksigma", "mse"), default="mse")
    add("--k", type=float, default=3.0, help="standard deviations of --clip ksigma")
    add("--symmetric", action="store_true")
    add("--rounding", choices=("gptq", "nearest"), default="gptq")
    add("--no-propagate", action="store_true", help="fit every layer to the float model's inputs")
    add("--tune", type=int, default=120, metavar="N", help="gradient steps of the last tuning")
    add("--skip", nargs="+", default=[], metavar="PATTERN", help="layers that stay float")
    add("--first-last", choices=("same", "8bit", "float"), default="same")
    for what in ("embedding", "recurrent"):
        text = f"of {what} weights, by rows: 2..8, or float (default 8)"
        add(f"--{what}-bits", type=_row_bits, default=8, metavar="N", help=text)
    activations = command.add_argument_group("activations")
    add = activations.add_argument
    add("--activation-bits", type=int, choices=range(2, 9))
    add("--activation", choices=("static", "dynamic"), default="static")
    add("--activation-range", choices=("minmax", "percentile", "mse"), default="mse")
    add("--keep-bn", action="store_true", help="do not fold batch norms into the layers before")
    add("--no-bias-correction", action="store_true", help="leave biases as they are")
    adapters = command.add_argument_group("adapters")
    add = adapters.add_argument
    add(
        "--rank-budget",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="with --bits; 0: no adapters",
    )
    add("--adapter-bits", type=int, choices=(2, 3, 4, 5, 6, 7, 8, 16, 32))
    add("--fit", choices=("weighted", "plain"), default="weighted")
    add(
        "--search",
        choices=("sensitivity", "energy", "uniform", "gate", "none"),
        default="sensitivity",
        help="ranks with --bits: a closed form, or gate: the search; none: uniform ranks",
    )
    add("--plan", choices=("closed_form", "search"), default="closed_form", help="without --bits")
    add("--iterations", type=int, metavar="N", help="steps of the search")
    add("--samples", type=_positive, metavar="N", help="calibration samples")
    add("--seed", type=int, default=0)
    add("--loss", choices=("kl", "labels"), default="kl")


# --- The model and its data ----------------------------------------------------------------------


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


# --- Commands: each returns the JSON values and the text ------------------------------------------


def _quantize(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.html is not None and args.html.resolve() == args.output.resolve():
        raise ValueError(f"--html and --output are the same file, {args.output}")
    if args.bits is None and (args.granularity or args.group_size):
        raise ValueError("--granularity and --group-size go with --bits: else they are chosen")
    granularity: Any = args.granularity or ("per_group" if args.group_size else "per_channel")
    spec = QuantSpec(
        args.bits or 4,
        granularity,
        args.group_size,
        args.symmetric,
        args.clip,
        args.k,
        args.rounding,
    )
    target = args.target_bits
    if args.bits is None and target is None and args.max_drop is None:
        target = DEFAULT_TARGET_BITS
    task = _task(args)
    samples = args.samples or task.default_samples
    options = {} if args.iterations is None else {"iterations": args.iterations}
    config = SearchConfig(
        method="uniform" if args.search == "none" else args.search,
        samples=samples,
        seed=args.seed,
        loss=args.loss,
        label_loss=task.label_loss,
        plan=args.plan,
        **options,
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
        args.rank_budget,
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
        activation=args.activation,
        activation_range=args.activation_range,
        bias_correction=not args.no_bias_correction,
        embedding_bits=args.embedding_bits,
        recurrent_bits=args.recurrent_bits,
    )
    seconds = time.perf_counter() - clock
    cora.save(qmodel, args.output)
    report: Any = qmodel.report
    notes = []
    if report.search["interrupted"]:
        notes.append("the search was interrupted: these are the best ranks so far, not compared")
    elif not args.no_compare:
        evaluate = _evaluator(task, model, args.limit, args.progress)
        if evaluate is None:
            notes.append("no validation data: compared on the calibration data")
        cora.compare(model, calibration, qmodel, evaluate, args.progress)
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


def _evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    task = _task(args)
    model = task.model()
    qmodel = cora.load(args.file, model)
    report: Any = getattr(qmodel, "report", None)
    if args.fuse:
        qmodel = cora.fuse(qmodel, _example(task))
    evaluate = _evaluator(task, model, args.limit, args.progress)
    if evaluate is None:
        raise ValueError(f"{args.model}: there are no validation data; name them with --validation")
    packed_bits = report.totals["bits_per_weight"] if report else math.nan
    rows = [
        {
            "row": label,
            "bits_per_weight": bits,
            "total_bits": float_state_bits(candidate),
            **evaluate(candidate),
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


def _inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
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


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    task = _task(args)
    model = task.model()
    qmodel = cora.load(args.file, model)
    if args.shape:
        example: Any = torch.randn(args.shape, generator=torch.Generator().manual_seed(0))
    else:
        example = _example(task)
    if args.fuse:
        qmodel = cora.fuse(qmodel, example)
    rows = bench(model, qmodel, example, args.batch, args.threads, args.seconds, args.progress)
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
    "Linear, Conv1d and Conv2d in one group, scales per tensor, channel or whole channels, integer "
    "adapters up to rank 256; inputs float16, bfloat16 or quantized"
)
_CUDA_UNPACKED = (
    "float32 inputs, grouped and depthwise convolutions, scale groups that cut through channels, "
    "float adapters, ranks above 256, float Linear inputs of 256 rows or more (faster so)"
)


def _info(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    isa = ops.isa()
    library = Path(ops.__file__).with_name("libcora_cuda.so")
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


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity and no NaN: those become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    sys.exit(main())
