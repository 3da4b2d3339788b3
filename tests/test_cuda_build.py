"""What the compiled CUDA library is made of: every architecture asked for, no spilled registers, the
tensor-core and asynchronous-copy instructions where they belong.

Needs the library (built where nvcc is found) and cuobjdump: from a CUDA toolkit, or the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import cora.ops

LIBRARY = Path(cora.__file__).parent / "libcora_cuda.so"
MOST_REGISTERS = {"gemm_kernel": 255, "": 128}  # a lane; the rest of a kernel's name decides
THREADS = {"gemm_kernel": 256}
WARPGROUPS = (
    "Lb1EEEEEvNS0_8GemmArgsE"  # ends the name of a kernel with kWarpgroup, which sm_90a alone has
)

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc")


def tool(name: str) -> str:
    """Path of a CUDA binary utility; skips the test where there is none."""
    found = shutil.which(name)
    packages = Path(sys.prefix) / "lib"
    for path in packages.glob(f"python*/site-packages/nvidia/*/bin/{name}"):
        found = found or str(path)
    if found is None:
        pytest.skip(f"needs {name} (pip install nvidia-cuda-{name})")
    return found


def run(*command: str) -> str:
    folder = str(Path(command[0]).parent)  # cuobjdump calls nvdisasm
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> {"REG": ..., "STACK": ..., "LOCAL": ...}."""
    kernels: dict[tuple[str, str], dict[str, int]] = {}
    arch = name = ""
    for line in run(tool("cuobjdump"), "--dump-resource-usage", str(LIBRARY)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            kernels[arch, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return kernels


def test_every_architecture_holds_every_kernel() -> None:
    by_arch: dict[str, set[str]] = {}
    for arch, name in resources():
        by_arch.setdefault(arch, set()).add(name)
    assert by_arch
    known = set.union(*by_arch.values())
    everywhere = {name for name in known if not name.endswith(WARPGROUPS)}
    assert sum("gemm_kernel" in name for name in everywhere) >= 40
    assert len(known - everywhere) == (16 if "sm_90a" in by_arch else 0)
    for arch, names in by_arch.items():
        assert names == (known if arch == "sm_90a" else everywhere), arch


def test_nothing_lives_in_local_memory() -> None:
    for kernel, usage in resources().items():
        assert usage["STACK"] == 0, kernel
        assert usage["LOCAL"] == 0, kernel


def test_registers_are_within_budget() -> None:
    for (arch, name), usage in resources().items():
        most = next(limit for part, limit in MOST_REGISTERS.items() if part in name)
        assert usage["REG"] <= most, (arch, name)
        threads = THREADS["gemm_kernel"]
        assert usage["REG"] * threads <= 65536, (arch, name)


@pytest.mark.parametrize(
    "type_name,wanted",
    [("4Half", ("HMMA.16816", "LDS.64")), ("4Int8", ("IMMA.16832", "LDSM.16.M88.4"))],
)
def test_kernels_use_the_instructions_they_are_for(type_name: str, wanted: tuple[str, ...]) -> None:
    """Tensor cores, asynchronous 16-byte copies; no local loads or stores. One kernel stands for its kind:
    reading them all takes minutes."""
    tool("nvdisasm")
    arch, name = min(
        key
        for key in resources()
        if "gemm_kernel" in key[1] and type_name in key[1] and not key[1].endswith(WARPGROUPS)
    )
    code = instructions(arch, name)
    for instruction in (*wanted, "LDGSTS.E.BYPASS"):
        assert instruction in code, f"{name}: no {instruction}"
    assert not re.search(r"\b(LDL|STL)\b", code), name


def instructions(arch: str, name: str) -> str:
    options = ("--dump-sass", "--gpu-architecture", arch, "--function", name)
    return run(tool("cuobjdump"), *options, str(LIBRARY))


def test_asynchronous_copies_use_registers_that_were_written() -> None:
    """ptxas 13.0 gives a cp.async that has a cache policy uniform registers that nothing wrote,
    [R15+UR0], desc[UR1]: it shows in the descriptor, a pair of registers, beginning at an odd one."""
    tool("nvdisasm")
    for arch in sorted({arch for arch, _ in resources()}):
        options = ("--dump-sass", "--gpu-architecture", arch)
        code = run(tool("cuobjdump"), *options, str(LIBRARY))
        assert "LDGSTS" in code, arch
        assert not re.findall(r"LDGSTS.*desc\[UR\d*[13579]\].*", code), arch


def test_warpgroup_instructions_overlap() -> None:
    """Two groups of two a round, each issued while the one before runs. Where the assembler cannot prove
    that their registers are left alone, it makes every wait a wait for all (and says so: C7513)."""
    tool("nvdisasm")
    names = [n for arch, n in resources() if arch == "sm_90a" and n.endswith(WARPGROUPS)]
    if not names:
        pytest.skip("built without sm_90a")
    for name in names:
        code = instructions("sm_90a", name)
        assert len(re.findall(r"IGMMA\.64x\d+x32\.S8\.U8", code)) == 4, name
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", code)
        assert waits == ["0x1"] * 2 + ["0x0"], name
