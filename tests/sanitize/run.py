"""Runs the native tests under AddressSanitizer with UndefinedBehaviorSanitizer, then between guard pages.

python tests/sanitize/run.py [-k EXPRESSION]

The first build is by CMake's CORA_SANITIZE, beside the Python files in build/sanitize. The second run takes
the library as it is built in place and the allocator of guard.cpp, which sees what the sanitizers do not:
masked vector instructions and AMX tiles. Each mechanism first has to find a planted fault. New kernels are
covered by the tests of their ops.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "sanitize"
BUILD = ROOT / "build" / "sanitize"
# Every op's tests; the rest of tests/ reaches the native code through the same ops.
TESTS = sorted(
    path
    for path in (ROOT / "tests").glob("test_ops_*.py")
    if path.stem not in ("test_ops_dispatch", "test_ops_errors", "test_ops_isa")
)
# Without depthwise weights that lie in memory as others do.
PICK = "not (test_ops_depthwise and (8bit or per-tensor))"
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
PROBE = """
import ctypes, sys, torch
name, size = sys.argv[2], int(sys.argv[3])
call = getattr(ctypes.CDLL(sys.argv[1]), name)
call.argtypes = [ctypes.c_int] if name == "overflow" else [ctypes.c_void_p, ctypes.c_int64]
x = torch.zeros(size)
call(2**31 - 1) if name == "overflow" else call(x.data_ptr(), size)
del x
"""


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or sys.exit(f"sanitize: {name} is missing")


def compile_library(source: str, output: Path, *flags: str) -> Path:
    command = [tool("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", *flags, str(HERE / source)]
    subprocess.run([*command, "-o", str(output), "-ldl"], check=True)
    return output


def build_sanitized() -> None:
    """build/sanitize/cora: the package with a sanitized library."""
    import torch

    options = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CORA_TORCH_DIR": Path(torch.__file__).parent,
        "CORA_OUTPUT_DIR": BUILD / "cora",
        "CORA_CUDA": "OFF",
        "CORA_SANITIZE": "ON",
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    cmake = tool("cmake")
    quiet = {"stdout": subprocess.DEVNULL, "check": True, "env": {**os.environ, "CXX": tool("g++")}}
    subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", BUILD, *defines], **quiet)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", BUILD, "--parallel", jobs], **quiet)
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cora", BUILD / "cora", dirs_exist_ok=True, ignore=skip)


def run(folder: Path, preload: list[str], *arguments: str) -> tuple[int, str]:
    """Python in `folder` with libraries preloaded: exit status and output."""
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "OMP_WAIT_POLICY": "passive",
        "PYTHONFAULTHANDLER": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


def must_find(fault: str, folder: Path, preload: list[str], message: str, *arguments: str) -> None:
    status, output = run(folder, preload, "-c", PROBE, *arguments)
    if status == 0 or message not in output:
        sys.exit(f"sanitize: {fault} was not found:\n{output}")
    print(f"found, as it has to be: {fault}", flush=True)


def passes(title: str, folder: Path, preload: list[str], ask: list[str]) -> bool:
    start = time.monotonic()
    tests = ["-k", PICK, *map(str, TESTS)]
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    # The package is the one in the working directory.
    status, output = run(folder, preload, "-m", "pytest", "-q", "-x", *config, *tests, *ask)
    tail = "\n".join(output.splitlines()[-60:]) if status else output.splitlines()[-1]
    print(f"{title}: {tail} ({time.monotonic() - start:.0f} s)", flush=True)
    return status == 0


def main(ask: list[str]) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    build_sanitized()
    print(f"sanitized build: {time.monotonic() - start:.0f} s", flush=True)
    compiler = tool("g++")
    names = ("libasan.so", "libubsan.so")
    asan = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    probe = str(compile_library("probe.cpp", BUILD / "probe.so", *SANITIZE))
    overflow = "heap-buffer-overflow"
    must_find("a read past a tensor (ASan)", BUILD, asan, overflow, probe, "read_past", "100")
    must_find(
        "a signed overflow (UBSan)", BUILD, asan, "signed integer overflow", probe, "overflow", "1"
    )
    guard = [str(compile_library("guard.cpp", BUILD / "guard.so", "-fno-builtin"))]
    probe = str(compile_library("probe.cpp", BUILD / "plain_probe.so"))
    fault = "a write past a tensor that ASan does not see"
    must_find(fault, ROOT, guard, "Segmentation fault", probe, "write_past", "1024")
    must_find(
        f"{fault}, within its alignment", ROOT, guard, "written past", probe, "write_past", "5"
    )
    with ThreadPoolExecutor(2) as pool:
        runs = (("ASan and UBSan", BUILD, asan), ("guard pages", ROOT, guard))
        results = [pool.submit(passes, *arguments, ask) for arguments in runs]
    sys.exit(not all(result.result() for result in results))


if __name__ == "__main__":
    main(sys.argv[1:])
