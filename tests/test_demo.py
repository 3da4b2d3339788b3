"""The demo, as small as it gets: it runs, and what it writes is there and says the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cora
from cora.tasks import available_tasks

ROOT = Path(cora.__file__).parents[1]
DEMO = ROOT / "examples" / "demo.py"
MISSING = {task.name: task.missing for task in available_tasks()}["ocr-recognition"]


@pytest.mark.skipif(not DEMO.is_file(), reason="needs the source tree")
@pytest.mark.skipif(MISSING is not None, reason="ocr-recognition: weights or Pillow not found")
@pytest.mark.slow
def test_demo_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = ["--samples", "8", "--lines", "10", "--iterations", "2", "--bits", "3"]
    small += ["--detector-bits", "0"]
    done = subprocess.run(
        [sys.executable, str(DEMO), "--output", str(tmp_path / "out"), *small],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "ocr-recognition-3bit.safetensors",
        *("page-float.png", "page-packed.png", "report.html", "result.png", "results.json"),
    }
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["recognition"]["3.0"]
    labels = [row["row"] for row in rows]
    # A row "same bits, no adapters" stands there too if the plan took any.
    assert labels[:3] == ["float", "2-bit, nearest", "2-bit, error feedback"]
    assert labels[-1] == "cora, bits and ranks chosen"
    for row in rows:
        assert row["row"] in done.stdout
    assert "words right" in done.stdout
