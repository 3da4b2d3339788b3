"""The CPU level: detection, forcing, and that no kernel silently falls to a lower one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LEVELS, SUPPORTED

from cora import ops

# The kernels a level has of its own, where that is not all, and what the others take.
AMX_ONLY = {"split", "panel_bf16", "tile_bf16", "rescale", "codes_tile", "finish"}
AMX = {"tile_s8", "store_hidden", "quantized_hidden", "expand_up", "up_project"} | AMX_ONLY
AVXVNNI = {"tile_s8", "gemv_s8"}
# Those that lower levels do without.
ONLY = {"depthwise_codes": ("avx512", "amx"), **dict.fromkeys(AMX_ONLY, ("amx",))}
NEEDS = {"avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2"}}
NEEDS["avxvnni"] = NEEDS["avx2"] | {"avx_vnni"}
NEEDS["avx512"] = NEEDS["avx2"] | {
    f"avx512{name}" for name in ("f", "bw", "dq", "vl", "_vnni", "vbmi")
}
NEEDS["amx"] = NEEDS["avx512"] | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}


def run_with(level: str) -> subprocess.CompletedProcess[str]:
    code = "from cora import ops; print(ops.isa()['level'])"
    env = {**os.environ, "CORA_ISA": level}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_every_kernel_runs_at_its_level(isa: str) -> None:
    report = ops.isa()
    assert report.pop("level") == isa
    assert len(report) >= 20
    assert {name for name in ONLY if name in report} == {n for n, on in ONLY.items() if isa in on}
    expected = dict.fromkeys(report, isa)
    if isa == "amx":
        expected = {name: "amx" if name in AMX else "avx512" for name in report}
    if isa == "avxvnni":
        expected = {name: "avxvnni" if name in AVXVNNI else "avx2" for name in report}
    if isa in ("avx512", "amx"):
        expected["pack_row"] = "avx2"
    assert report == expected


@pytest.mark.parametrize("level", SUPPORTED)
def test_environment_caps_the_level(level: str) -> None:
    result = run_with(level)
    assert result.stdout.strip() == level, result.stderr


def test_unknown_level_in_the_environment() -> None:
    result = run_with("sse9")
    assert result.returncode != 0
    assert (
        f"CORA_ISA must be one of {{{', '.join(SUPPORTED)}}} on this CPU, got 'sse9'"
        in result.stderr
    )


@pytest.mark.parametrize("name", ["", "sse9", "AVX2", *sorted({*LEVELS} - {*SUPPORTED})])
def test_unknown_level(name: str) -> None:
    before = ops.isa()
    with pytest.raises(RuntimeError, match="set_isa must be one of {scalar"):
        ops.set_isa(name)
    assert ops.isa() == before


def test_detection_agrees_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "flags" not in cpuinfo.read_text():
        pytest.skip("no x86 flags in /proc/cpuinfo")
    line = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split())
    expected = ["scalar", *(level for level in LEVELS[1:] if NEEDS[level] <= flags)]
    assert list(SUPPORTED) == expected
