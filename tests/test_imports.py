"""Who may import whom: the arrows of the package point one way, and there is one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CORA = Path(__file__).parents[1] / "cora"

# A module may import those of lower layers; the right-hand ones are optional or stand beside.
LAYERS = {
    "cli": 16, "commands": 15, "compare": 14, "serialization": 13, "convert": 12, "roofline": 11,
    "choose": 11, "diagnosis": 11, "fuse": 11, "fused": 10, "recode": 4, "joint": 10, "report": 10,
    "tracing": 9, "fitting": 9, "search": 9, "planning": 9, "tuning": 9,
    "allocation": 8, "biases": 8, "evaluation": 8, "drift": 8,
    "curvature": 7, "calibration": 6, "activation_ranges": 5, "restructure": 5,
    "attention": 4, "fold": 4, "batches": 3, "moments": 3,
    "embedding": 3, "recurrent": 3, "modules": 3, "lowrank": 2, "rounding": 2,
    "quantizer": 1, "ops": 0, "gpu": -1, "files": 0, "nodes": 0, "tables": 0,
}  # fmt: skip
CORE = sorted(LAYERS.keys() - {"cli", "commands"})


def files_of(name: str) -> list[Path]:
    """A module's file, or those of a package."""
    package = CORA / name
    return sorted(package.glob("*.py")) if package.is_dir() else [CORA / f"{name}.py"]


def cora_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module of cora, whether it is imported when the file is) for every import of cora's own."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "cora"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            inside = len(path.relative_to(CORA).parts) - node.level  # a package's own modules
            names = [f"cora.{name}" for name in names if inside < 1 and not name.startswith("__")]
        elif (
            isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cora"
        ):
            names = (
                [node.module] if node.module != "cora" else [f"cora.{a.name}" for a in node.names]
            )
        for name in names:
            yield name.removeprefix("cora").lstrip("."), id(node) in top


def sources() -> dict[str, Path]:
    return {path.relative_to(CORA).with_suffix("").as_posix(): path for path in CORA.rglob("*.py")}


@pytest.mark.parametrize("name", CORE)
def test_arrows(name: str) -> None:
    found = [pair for path in files_of(name) for pair in cora_imports(path)]
    for other, at_import in found:
        if (name, other) in (("report", "html"), ("diagnosis", "html_diagnosis")):
            assert not at_import  # matplotlib is optional
            continue
        assert other in LAYERS, f"{name} imports {other}"
        assert LAYERS[other] < LAYERS[name], f"{name} must not import {other}"


def test_every_core_module_is_here() -> None:
    for name in CORE:
        assert all(path.is_file() for path in files_of(name)), name


def test_reference_is_for_tests_only() -> None:
    for name, path in sources().items():
        imported = {other for other, _ in cora_imports(path)}
        assert name == "reference" or "reference" not in imported, name
    assert not list(cora_imports(CORA / "reference.py"))


def test_tasks_stand_outside_the_core() -> None:
    for name in CORE:
        assert not any(
            other.split(".")[0] in ("tasks", "cli", "commands", "bench")
            for path in files_of(name)
            for other, _ in cora_imports(path)
        )


def test_one_door_to_the_native_code() -> None:
    for name, path in sources().items():
        said = re.search(r"torch\.ops\b|load_library|torch\.library", path.read_text())
        assert name.startswith("ops/") or not said, name
        assert ("torch.ops" in path.read_text()) == (name == "ops/_native"), name


@pytest.mark.parametrize("name", CORE)
def test_public_names(name: str) -> None:
    """`__all__` is there, sorted, and every name in it exists."""
    module = __import__(f"cora.{name}", fromlist=["__all__"])
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_import_is_quiet_and_light() -> None:
    """Importing cora prints nothing and needs nothing optional."""
    code = (
        "import sys, cora;"
        "heavy = {'matplotlib', 'PIL', 'cora.cli', 'cora.tasks', 'cora.reference'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CORA.parent, check=True
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
