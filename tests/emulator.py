"""The CUDA ops on the CPU: the same kernel and op sources, built against csrc/emu, as `torch.ops.cora_emu`.

The library is built on first use, into build/emulator; later only what changed is.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cora import gpu

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2, 3)

OPS = (
    "fake_quantize",
    "fake_quantize_out",
    "fake_quantize_backward",
    "quantize_activation",
    "dequantize_activation",
    "pack_bits",
    "unpack_bits",
    "dequantize_packed",
    "linear_lowrank",
    "conv2d_lowrank",
    "prepare_layer",
    "run_layer",
)
MUTATIONS = {"barrier": 1, "wait": 2, "late-wait": 3, "predicate": 4}  # csrc/emu/emulator.h


def build() -> Path:
    """Path of the built library; skips the test where it cannot be built."""
    import pytest

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None or not (ROOT / "csrc").exists():
        pytest.skip("the emulator needs the source tree, cmake and ninja")
    folder = ROOT / "build" / "emulator"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": ninja,
        "CORA_TORCH_DIR": torch.__path__[0],
        "CORA_OUTPUT_DIR": str(folder),
        "CORA_CUDA": "OFF",
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # other test processes want it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *defines],
            [cmake, "--build", str(folder), "--target", "_emu"],
        ):
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder / "_emu.so"


class Emulator:
    """What tests set in the emulator; `Emulator.ops` are the ops."""

    def __init__(self, path: Path) -> None:
        self._schemas = torch.library.Library("cora_emu", "DEF")
        for name in OPS:
            if hasattr(torch.ops.cora, name):
                schema = str(getattr(torch.ops.cora, name).default._schema)
                self._schemas.define(schema.replace("cora::", ""))
        for name in gpu.__all__:
            schema = str(getattr(torch.ops.cora, name).default._schema)
            self._schemas.define(schema.replace("cora::", ""))
            self._schemas.impl(name, getattr(gpu, name), "CPU")
        torch.ops.load_library(path)
        self._library = ctypes.CDLL(str(path))
        self._library.cora_emu_sites.restype = ctypes.c_char_p
        self._library.cora_emu_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.ops: Any = torch.ops.cora_emu

    def seed(self, seed: int) -> None:
        """Sets the order in which blocks, warps and lanes run."""
        self._library.cora_emu_seed(seed)

    @contextmanager
    def device(self, major: int = 8, multiprocessors: int = 6) -> Iterator[None]:
        """A GPU of another compute capability (8 or 9) or size."""
        self._library.cora_emu_device(major, multiprocessors)
        try:
            yield
        finally:
            self._library.cora_emu_device(8, 6)

    def sites(self, mutation: str) -> list[str]:
        """Places of the kernels' source that have been passed so far: "file:line"."""
        text: bytes = self._library.cora_emu_sites(MUTATIONS[mutation])
        return text.decode().split()

    def forget_sites(self) -> None:
        self._library.cora_emu_forget_sites()

    @contextmanager
    def mutated(self, mutation: str, site: str) -> Iterator[None]:
        """Breaks the kernels at a place."""
        self._library.cora_emu_mutate(MUTATIONS[mutation], self.sites(mutation).index(site))
        try:
            yield
        finally:
            self._library.cora_emu_mutate(0, -1)

    @contextmanager
    def guarded(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Lets kernels touch these tensors, and what the ops allocate, and nothing else."""
        for t in tensors:
            self._library.cora_emu_register(t.data_ptr(), t.numel() * t.element_size())
        try:
            yield
        finally:
            self._library.cora_emu_forget_buffers()


@functools.cache
def emulator() -> Emulator:
    """The emulator, built and loaded once a session."""
    return Emulator(build())
