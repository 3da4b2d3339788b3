"""The command line, on a user's model in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LEVELS

import cora
from cora import cli

USER = """
import torch
from torch import nn

print("a user's module may print")

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 5)
    )

def batches(samples=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples // 8):
        yield torch.randn(8, 3, 10, 10, generator=generator), torch.arange(8) % 5

def more():
    return list(batches(24, 1))

READY = [torch.zeros(2, 3, 10, 10), torch.ones(2, 3, 10, 10)]
MODEL = build()

def broken():
    raise ValueError("two\\nlines")

def interrupted():
    raise KeyboardInterrupt
"""
TASK = """
from parts import build, batches as calibration, more as validation
"""
QUICK = ["--samples", "16", "--tune", "2", "--no-progress"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's model in it."""
    (tmp_path / "parts.py").write_text(USER)
    (tmp_path / "whole.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("parts", None)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """A command with --json that must succeed; stdout must be the object and nothing else."""
    code = cli.main([*argv, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of error of a command that must reject its input."""
    try:
        code = cli.main(list(argv))
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    lines = [line for line in captured.err.splitlines() if "may print" not in line]
    assert len(lines) == 1 and lines[0].startswith("cora: error: "), captured.err
    return lines[0]


def packed(folder: Path) -> Path:
    path = folder / "m.safetensors"
    model = ["quantize", "parts.py:build", "--calibration", "parts.py:batches", "--bits", "3"]
    assert cli.main([*model, "-o", str(path), "--no-compare", "--json", *QUICK]) == 0
    return path


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ((), "cora, bits and ranks chosen"),
        (("--bits", "3"), "3-bit + adapters, sensitivity ranks"),
    ],
)
def test_quantize_with_functions(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], last: str
) -> None:
    model = ("parts:build", "--calibration", "parts:batches", *options)
    values = run(capsys, "quantize", *model, "-o", "m.safetensors", *QUICK)
    assert values["file_bytes"] == (folder / "m.safetensors").stat().st_size
    rows = [row["row"] for row in values["report"]["comparison"]]
    assert rows[0] == "float" and rows[-1] == last
    assert "kl" in values["report"]["comparison"][-1]  # there are no validation data
    assert values["notes"] == ["no validation data: compared on the calibration data"]


def test_quantize_a_whole_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run(
        capsys,
        *("quantize", "whole.py", "-o", "m.safetensors", "--bits", "2", "--group-size", "3"),
        *("--skip", "5", "--search", "uniform", "--activation-bits", "8", *QUICK),
    )
    report = values["report"]
    assert report["settings"]["weight"]["granularity"] == "per_group"
    assert report["search"]["method"] == "uniform"
    assert [layer["name"] for layer in report["layers"]] == ["0", "2"]
    assert {"top1", "kl", "agreement"} <= report["comparison"][0].keys()


def test_quantize_to_a_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(*options: str) -> dict[str, Any]:
        given = ("whole.py", "-o", "m.safetensors", "--no-compare", *QUICK, *options)
        report: dict[str, Any] = run(capsys, "quantize", *given)["report"]
        assert report["search"]["method"] == "joint"
        return report

    report = settings("--target-bits", "4.5", "--rounding", "nearest", "--no-propagate")
    assert 4.2 < report["totals"]["bits_per_weight"] <= 4.5
    assert report["settings"]["weight"]["rounding"] == "nearest"
    assert not report["settings"]["propagate"] and report["settings"]["tune"]["iterations"] == 2
    assert report["search"]["history"] == []
    report = settings("--max-drop", "90")
    assert report["settings"]["max_drop"] == 90 and report["totals"]["bits_per_weight"] < 3.5
    report = settings("--target-bits", "4.5", "--plan", "search", "--iterations", "6")
    assert {entry["kind"] for entry in report["search"]["history"]} >= {"closed form", "corrected"}


def test_ready_objects_are_data_and_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("parts.py:MODEL", "--calibration", "parts.py:READY")
    values = run(capsys, "quantize", *model, "-o", "m.safetensors", "--rank-budget", "0", *QUICK)
    assert values["report"]["totals"]["adapter_bits"] == 0


def test_same_arguments_write_the_same_file(folder: Path) -> None:
    first = packed(folder).read_bytes()
    assert packed(folder).read_bytes() == first


def test_text_holds_both_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", "whole.py", "-o", "m.safetensors", "--bits", "3", *QUICK]) == 0
    out = capsys.readouterr().out
    for part in ("SQNR", "bits/weight", "same bits, no adapters", "m.safetensors: "):
        assert part in out


def test_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(folder)
    capsys.readouterr()
    values = run(capsys, "evaluate", "whole.py", str(path), "--limit", "16")
    assert [row["row"] for row in values["rows"]] == ["float", "packed"]
    assert values["rows"][0]["agreement"] == 1.0
    given = ("--validation", "parts.py:more", "--limit", "16")
    assert run(capsys, "evaluate", "parts.py:build", str(path), *given)["rows"] == values["rows"]
    line = fails(capsys, "evaluate", "parts.py:build", str(path))
    assert "--validation" in line
    fused = run(capsys, "evaluate", "whole.py", str(path), "--limit", "16", "--fuse")
    assert fused["fused"] and not values["fused"]
    assert fused["rows"][1]["kl"] == pytest.approx(values["rows"][1]["kl"], rel=0.1, abs=1e-4)


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(folder)
    capsys.readouterr()
    values = run(capsys, "inspect", str(path), "--model", "parts.py:build")
    assert values["fits"] == "parts.py:build" and values["file_bytes"] == path.stat().st_size
    assert [layer["bits"] for layer in values["report"]["layers"]] == [3, 3, 3]
    assert cli.main(["inspect", str(path)]) == 0
    assert "stored" in capsys.readouterr().out


def test_inspect_a_file_that_is_no_packed_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text").write_text("no tensors")
    assert "not a whole safetensors file" in fails(capsys, "inspect", "text")


def test_inspect_a_file_without_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = cora.QuantLinear.from_float(torch.nn.Linear(8, 4), cora.QuantSpec(bits=4), rank=1)
    cora.save(torch.nn.Sequential(layer), "bare.safetensors")
    assert run(capsys, "inspect", "bare.safetensors")["report"] is None
    assert cli.main(["inspect", "bare.safetensors"]) == 0
    assert "Linear" in capsys.readouterr().out


DIAGNOSE = ("--samples", "16", "--no-progress")


def test_inspect_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "inspect", "whole.py", *DIAGNOSE)
    found = values["diagnosis"]
    assert values["model"] == "whole.py" and [la["name"] for la in found["layers"]] == list("025")
    assert found["settings"]["weight"]["bits"] == 3 and found["settings"]["adapter_bits"] == 4
    assert found["settings"]["calibration_samples"] == 16
    given = ("parts.py:build", "--calibration", "parts.py:batches")
    assert run(capsys, "inspect", *given, *DIAGNOSE)["diagnosis"] == found
    assert run(capsys, "inspect", "whole.py", "--seed", "1", *DIAGNOSE)["diagnosis"] != found
    fields = ("--bits", "2", "--group-size", "1", "--clip", "minmax", "--adapter-bits", "8")
    other = run(capsys, "inspect", "whole.py", *fields, *DIAGNOSE)["diagnosis"]["settings"]
    weight = other["weight"]
    assert (weight["bits"], weight["granularity"], weight["group_size"]) == (2, "per_group", 1)
    assert weight["clip"] == "minmax" and other["adapter_bits"] == 8


def test_inspect_a_model_as_text_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["inspect", "whole.py", "--html", "d.html", *DIAGNOSE]) == 0
    out = capsys.readouterr().out
    for part in ("stable rank", "predicted loss", "d.html: the diagnosis"):
        assert part in out
    assert "diagnosis" in (folder / "d.html").read_text()


def test_inspect_refuses_the_other_kind_s_options(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(packed(folder))
    capsys.readouterr()
    for option, value in (("--bits", "3"), ("--group-size", "3"), ("--calibration", "x.py:y")):
        assert f"{option} goes with a model" in fails(capsys, "inspect", path, option, value)
    line = fails(capsys, "inspect", "whole.py", "--model", "parts.py:build")
    assert "--model goes with a packed file" in line


def test_evaluate_corruptions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(packed(folder))
    capsys.readouterr()
    argv = ("evaluate", "whole.py", path, "--limit", "16", "--corruptions")
    values = run(capsys, *argv)
    rows = values["corruptions"]
    assert len(rows) == 17 and rows[0]["corruption"] == "clean"
    for row, name in zip(values["rows"], ("float", "packed"), strict=True):
        for key in ("top1", "kl", "agreement"):
            assert rows[0]["models"][name][key] == pytest.approx(row[key])
    assert run(capsys, *argv)["corruptions"] == rows
    assert run(capsys, *argv[:-1])["corruptions"] is None
    assert cli.main([*argv, "--fuse"]) == 0
    out = capsys.readouterr().out
    assert "bits/weight" in out and "gaussian blur" in out and "packed drop" in out


def test_evaluate_corruptions_of_what_is_no_image(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "flat.py").write_text(
        "import torch\ndef build(): return torch.nn.Linear(8, 3)\n"
        "def calibration(): return [torch.ones(4, 8)]\nvalidation = calibration\n"
    )
    quick = ("-o", "f.safetensors", "--bits", "3", "--rank-budget", "0", "--no-compare", *QUICK)
    assert cli.main(["quantize", "flat.py", *quick]) == 0
    capsys.readouterr()
    line = fails(capsys, "evaluate", "flat.py", "f.safetensors", "--corruptions")
    assert "corruptions need images" in line and "[4, 8]" in line


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(folder)
    capsys.readouterr()
    threads = torch.get_num_threads()
    quick = ("--batch", "1", "3", "--seconds", "0.01")
    values = run(capsys, "bench", "whole.py", str(path), *quick)
    assert [row["batch"] for row in values["rows"]] == [1, 3]
    for row in values["rows"]:
        floats = row["float_ms"], row["float_channels_last_ms"]
        assert row["packed_ms"] > 0 and row["speedup"] == min(floats) / row["packed_ms"]
        assert len(row["layers"]) == 3 and row["roof"]["integer"] > 0
        assert row["floor_ms"] == sum(layer["floor_ms"] for layer in row["layers"])
    assert values["packed_memory_bytes"] > 0 and values["float_memory_bytes"] > 0
    assert torch.get_num_threads() == threads
    fused = run(capsys, "bench", "whole.py", str(path), "--fuse", *quick)
    assert fused["fused"] and fused["rows"][0]["packed_ms"] > 0
    shape = ("--shape", "2", "3", "10", "10")
    assert cli.main(["bench", "parts.py:build", str(path), *quick, *shape]) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out and "bound by" in out
    assert "--calibration" in fails(capsys, "bench", "parts.py:build", str(path))


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "info")
    assert values["versions"]["cora"] == cora.__version__
    assert values["isa"]["level"] in LEVELS
    assert {"ocr-recognition", "cifar10-resnet20"} <= {task["name"] for task in values["tasks"]}
    assert cli.main(["info"]) == 0
    assert values["cuda"]["state"] in capsys.readouterr().out


BAD = {
    "no command": (["frobnicate"], "frobnicate"),
    "no model": (["quantize", "nothing", "-o", "m"], "nothing"),
    "no file of a model": (["quantize", "no.py:build", "-o", "m"], "no.py"),
    "no such object": (["quantize", "parts.py:wrong", "-o", "m"], "wrong"),
    "output folder": (["quantize", "whole.py", "-o", "none/m"], "--output: the folder 'none'"),
    "output is a folder": (["quantize", "whole.py", "-o", "."], "is a folder"),
    "page over file": (["quantize", "whole.py", "-o", "m", "--html", "m"], "same file"),
    "no output": (["quantize", "whole.py"], "--output"),
    "bits": (["quantize", "whole.py", "-o", "m", "--bits", "9"], "--bits"),
    "samples": (["quantize", "whole.py", "-o", "m", "--samples", "0"], "positive integer"),
    "iterations": (
        ["quantize", "whole.py", "-o", "m", "--plan", "search", "--iterations", "-1"],
        "iterations",
    ),
    "k": (["quantize", "whole.py", "-o", "m", "--clip", "ksigma", "--k", "0"], "k must be"),
    "budget": (
        ["quantize", "whole.py", "-o", "m", "--bits", "3", "--rank-budget", "-1"],
        "rank_budget",
    ),
    "skip": (["quantize", "whole.py", "-o", "m", "--skip", "x"], "skip"),
    "group": (
        ["quantize", "whole.py", "-o", "m", "--bits", "3", "--group-size", "7"],
        "group_size",
    ),
    "group and granularity": (
        ["quantize", "whole.py", "-o", "m", "--bits", "3", "--group-size", "3"]
        + ["--granularity", "per_tensor"],
        "group_size",
    ),
    "group without bits": (["quantize", "whole.py", "-o", "m", "--group-size", "3"], "--bits"),
    "too few bits": (["quantize", "whole.py", "-o", "m", "--target-bits", "2"], "target_bits must"),
    "no number of bits": (
        ["quantize", "whole.py", "-o", "m", "--target-bits", "x"],
        "--target-bits",
    ),
    "bits and target": (
        ["quantize", "whole.py", "-o", "m", "--bits", "3", "--target-bits", "3"],
        "--target-bits: not allowed with argument --bits",
    ),
    "target and drop": (
        ["quantize", "whole.py", "-o", "m", "--target-bits", "3", "--max-drop", "1"],
        "--max-drop: not allowed with argument --target-bits",
    ),
    "drop": (["quantize", "whole.py", "-o", "m", "--max-drop", "-1"], "max_drop must be"),
    "tune": (["quantize", "whole.py", "-o", "m", "--tune", "-1"], "iterations must be"),
    "rounding": (["quantize", "whole.py", "-o", "m", "--rounding", "up"], "--rounding"),
    "plan": (["quantize", "whole.py", "-o", "m", "--plan", "best"], "--plan"),
    **{
        f"ignored {option}": (
            ["quantize", "whole.py", "-o", "m", f"--{option}", value, *others],
            f"--{option} goes with",
        )
        for option, value, others in (
            ("granularity", "per_tensor", ()),
            ("group-size", "8", ()),
            ("search", "gate", ()),
            ("rank-budget", "0.1", ()),
            ("plan", "search", ("--bits", "3")),
            ("iterations", "8", ()),
            ("iterations", "8", ("--bits", "3", "--search", "energy")),
            ("k", "2", ()),
            ("activation", "dynamic", ()),
            ("activation-range", "minmax", ()),
            ("limit", "8", ("--no-compare",)),
        )
    },
    "user's own error": (
        ["quantize", "parts.py:build", "--calibration", "parts.py:broken", "-o", "m"],
        "two lines",
    ),
    "data of a built-in task": (
        ["quantize", "ocr-detection", "--calibration", "parts.py:READY", "-o", "m"],
        "--calibration",
    ),
    "data folder": (["info", "--data", "none"], "none"),
    "no packed file": (["inspect", "none.safetensors"], "none.safetensors"),
    "no packed file at all": (["inspect", "whole.safetensors"], "there is no file"),
    "neither a model nor a file": (["inspect", "nothing"], "nothing"),
    "a model without data": (["inspect", "parts.py:build"], "--calibration"),
    "bits of a diagnosis": (["inspect", "whole.py", "--bits", "1"], "--bits"),
    "groups of a diagnosis": (["inspect", "whole.py", "--group-size", "7"], "group_size"),
    "granularity of a diagnosis": (
        ["inspect", "whole.py", "--granularity", "per_group"],
        "group_size",
    ),
    "page of a diagnosis": (["inspect", "whole.py", "--html", "none/p"], "the folder 'none'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, expected = BAD[case]
    assert expected in fails(capsys, *argv)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"parts.py", "whole.py"}


def test_file_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(folder)
    (folder / "other.py").write_text("import torch\ndef build(): return torch.nn.Linear(3, 3)\n")
    capsys.readouterr()
    assert "architecture" in fails(capsys, "inspect", str(path), "--model", "other.py:build")


def test_ctrl_c(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["quantize", "parts.py:build", "--calibration", "parts.py:interrupted"]
    assert cli.main([*model, "-o", "m"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_interrupted_search_is_saved(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cora.search._descend", stop)
    search = ("--bits", "3", "--search", "gate")
    values = run(capsys, "quantize", "whole.py", "-o", "m.safetensors", *search, *QUICK)
    assert values["report"]["search"]["interrupted"] and values["report"]["comparison"] == []
    assert "interrupted" in values["notes"][0]
    assert (folder / "m.safetensors").is_file()


def test_json_has_no_infinity() -> None:
    assert cli._plain({"a": [float("inf"), float("nan"), 1.5], 2: ()}) == {
        "a": [None, None, 1.5],
        "2": [],
    }


def test_as_a_process(folder: Path) -> None:
    """Progress and what users print go to stderr, the result to stdout."""
    command = [
        sys.executable,
        "-m",
        "cora",
        "quantize",
        "whole.py",
        "-o",
        "m.safetensors",
        "--json",
    ]
    root = str(Path(cora.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [*command, *QUICK], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(done.stdout)["file"] == "m.safetensors"
    assert "may print" in done.stderr
