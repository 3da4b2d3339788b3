"""The native library and the CPU level its kernels run on."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["isa", "ops", "set_isa"]

_LIBRARY = Path(__file__).parents[1] / "_C.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"cora: {_LIBRARY} is missing: build it with `pip install .` (or `pip install -e .`), "
        "or leave the source folder if another cora is installed"
    )
# The file holds no Python: schemas and kernels register themselves.
torch.ops.load_library(_LIBRARY)
ops = torch.ops.cora


def isa() -> dict[str, str]:
    """The CPU level in force and the level of the kernel each op takes.

    Returns:
        ``{"level": "amx", "tile_s8": "amx", "fake_quantize": "avx512", ...}``.

    Raises:
        RuntimeError: the environment variable ``CORA_ISA`` names no level of this CPU.
    """
    level, *kernels = str(ops.isa()).split()
    return {"level": level, **dict(kernel.split("=") for kernel in kernels)}


def set_isa(name: str) -> None:
    """Force a CPU level: ``scalar``, ``avx2``, ``avxvnni``, ``avx512`` or ``amx`` (as ``CORA_ISA`` does at start).

    Raises:
        RuntimeError: unknown, or not supported by this CPU; the message lists the valid names.
    """
    ops.set_isa(name)
