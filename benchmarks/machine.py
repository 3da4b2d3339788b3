"""The machine and its peaks, measured by native/peaks.cpp where a C++ compiler is found."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import cora
from cora import ops

_SOURCE = Path(__file__).with_name("native") / "peaks.cpp"
_PACKAGES = ("torch", "onnxruntime", "onnx", "openvino", "nncf", "bitsandbytes", "xllamacpp")
_FLAGS = (
    "avx2", "avx_vnni",
    "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16",
)  # fmt: skip

PEAKS = {
    "f32": "float32 FMA, GFLOP/s",
    "avx2_int8": "int8 AVX2, GOP/s",
    "avx2_int4": "int8 by 4 bits, AVX2, GOP/s",
    "vnni": "int8 AVX-512 VNNI, GOP/s",
    "amx_int8": "int8 AMX, GOP/s",
    "amx_bf16": "bfloat16 AMX, GFLOP/s",
    "read": "memory read, GB/s",
    "read1_write2": "memory, 1 read and 2 streamed writes, GB/s",
}


def core() -> str:
    """Identifies the native library: numbers of another one are out of date."""
    path = Path(cora.__file__).with_name("_C.so")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def machine() -> dict[str, Any]:
    """CPU, caches, memory, versions."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in lines}
        facts["cpu"] = values.get("model name", facts["cpu"])
        has = values.get("flags", "").split()
        facts["instructions"] = [flag for flag in _FLAGS if flag in has]
    facts["logical cores"] = os.cpu_count()
    if hasattr(os, "sysconf"):
        facts["memory GiB"] = round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
        )
    facts["level"] = ops.isa()["level"]
    facts["python"] = platform.python_version()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["versions"] = versions
    return facts


def peaks(threads: list[int], mebibytes: int = 1536) -> dict[str, dict[str, float]]:
    """threads (as text) -> peak -> value; empty without a compiler or on another architecture."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None or platform.machine() != "x86_64":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peaks")
        subprocess.run(
            [compiler, "-O2", "-std=c++17", "-pthread", str(_SOURCE), "-o", program], check=True
        )
        words = [program, str(mebibytes), *map(str, threads)]
        output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, float]] = {str(count): {} for count in threads}
    for line in output.splitlines():
        name, count, value = line.split()
        found[count][name] = float(value)
    return found


def describe() -> str:
    """One line for a header."""
    facts = machine()
    return f"{facts['cpu']}, level {facts['level']}, torch {torch.__version__}"
