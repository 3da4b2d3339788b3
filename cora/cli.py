"""The command `cora`: quantize, evaluate, inspect, bench, info.

Results go to stdout, as tables or with --json as one JSON object; progress and errors go to stderr.
Exit codes: 0; 2 bad input (one line, "cora: error: ..."); 1 any other failure; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import cora
from cora import commands
from cora.activation_ranges import ActivationRange
from cora.convert import DEFAULT_TARGET_BITS, Activation, FirstLast
from cora.evaluation import Loss
from cora.fitting import Fit
from cora.lowrank import ADAPTER_BITS
from cora.quantizer import SUPPORTED_BITS, Clip, Granularity, Rounding
from cora.search import Method, PlanMethod

__all__ = ["main"]

_BAD_INPUT = (ValueError, TypeError, OSError, ImportError, AttributeError, RuntimeError)
_MODEL_HELP = (
    "a built-in task (see `cora info`), file.py with build() and calibration(), "
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
    if path.suffix == ".py":
        raise argparse.ArgumentTypeError(f"{text!r} is a Python file, which is not written over")
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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--no-progress", action="store_true", help="no bars on stderr")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    data = _Parser(add_help=False)
    data.add_argument(
        "--data", type=_folder, metavar="DIR", help="data folder of the built-in tasks (CORA_DATA)"
    )

    def add(name: str, run: Callable[..., Any], about: str, *parents: _Parser) -> Any:
        command = subparsers.add_parser(
            name, help=about, description=about, parents=[common, *parents], allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    _quantize_arguments(
        add("quantize", commands.quantize, "quantize a model into a packed file", data)
    )
    command = add("evaluate", commands.evaluate, "a packed file beside its float model", data)
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
    _inspect_arguments(add("inspect", commands.inspect, about, data))
    command = add("bench", commands.bench, "time a packed file against its float model", data)
    _model_arguments(command, ("calibration",))
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
    add("info", commands.info, "versions, kernels in use, tasks and their data", data)
    return parser


def _model_arguments(command: Any, batches: Sequence[str] = ("calibration", "validation")) -> None:
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    for name in batches:
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
    # Without defaults: a packed file must be able to refuse them.
    add = command.add_argument_group("of a model").add_argument
    add("--bits", type=int, choices=SUPPORTED_BITS, help="default 3")
    add("--granularity", choices=get_args(Granularity))
    add("--group-size", type=_positive, metavar="N", help="weights a scale; implies per_group")
    add("--clip", choices=get_args(Clip), help="default mse")
    add("--adapter-bits", type=int, choices=ADAPTER_BITS, help="default 4")
    add("--samples", type=_positive, metavar="N", help="calibration samples")
    add("--seed", type=int, help="default 0")
    add(
        "--calibration",
        metavar="SPEC",
        help="file.py:object or module:object: batches, or a function",
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
    text = "stored bits a weight with everything; bits, groups and ranks are chosen"
    size.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help=f"{text} (default {DEFAULT_TARGET_BITS})",
    )
    size.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="the fewest bits that change at most so many percent of held-out answers",
    )
    size.add_argument(
        "--bits", type=int, choices=SUPPORTED_BITS, help="the same bits in every layer"
    )
    add("--granularity", choices=get_args(Granularity), help="with --bits")
    add("--group-size", type=_positive, metavar="N", help="weights a scale; implies per_group")
    add("--clip", choices=get_args(Clip), default="mse")
    add("--k", type=float, help="standard deviations of --clip ksigma (default 3)")
    add("--symmetric", action="store_true")
    add("--rounding", choices=get_args(Rounding), default="gptq")
    add("--no-propagate", action="store_true", help="fit every layer to the float model's inputs")
    add("--tune", type=int, default=120, metavar="N", help="gradient steps of the last tuning")
    add("--skip", nargs="+", default=[], metavar="PATTERN", help="layers that stay float")
    add("--first-last", choices=get_args(FirstLast), default="same")
    add("--keep-bn", action="store_true", help="do not fold batch norms into the layers before")
    add("--no-bias-correction", action="store_true", help="leave biases as they are")
    for what in ("embedding", "recurrent"):
        text = f"of {what} weights, by rows: 2..8, or float (default 8)"
        add(f"--{what}-bits", type=_row_bits, default=8, metavar="N", help=text)
    add = command.add_argument_group("activations").add_argument
    add("--activation-bits", type=int, choices=SUPPORTED_BITS)
    text = "with --activation-bits"
    add("--activation", choices=get_args(Activation), help=f"{text}, default static")
    add("--activation-range", choices=get_args(ActivationRange), help=f"{text}, default mse")
    add = command.add_argument_group("adapters").add_argument
    add(
        "--rank-budget",
        type=float,
        metavar="SHARE",
        help="with --bits, of the float weights' bits (default 0.05); 0: no adapters",
    )
    add("--adapter-bits", type=int, choices=ADAPTER_BITS, help="default 4; or 4 and 8, by layer")
    add("--fit", choices=get_args(Fit), default="weighted")
    add("--loss", choices=get_args(Loss), default="kl", help="what held-out samples are judged by")
    add = command.add_argument_group("calibration and search").add_argument
    add("--samples", type=_positive, metavar="N", help="calibration samples")
    add("--seed", type=int, default=0)
    text = "ranks with --bits: a closed form (default sensitivity), or gate: the search"
    add("--search", choices=get_args(Method), help=text)
    text = "without --bits: the closed form (default), or a search from there"
    add("--plan", choices=get_args(PlanMethod), help=text)
    add("--iterations", type=int, metavar="N", help="of --search gate or --plan search")


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
