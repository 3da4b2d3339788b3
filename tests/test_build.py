"""The built libraries and the ways to build them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cora.ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(cora.__file__).parent
LIBRARY = PACKAGE / "_C.so"
CUDA_LIBRARY = PACKAGE / "libcora_cuda.so"


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def exported(library: Path) -> set[str]:
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    names = {line.split()[-1] for line in lines if line.split()[1] in "TDB"}
    return names - {"_edata", "_end", "__bss_start"}  # the linker's own


needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
needs_source = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


@needs_binutils
def test_library_is_portable() -> None:
    """No path of the building machine inside, nothing of Python or C++ torch needed, nothing
    exported."""
    dynamic = run("readelf", "-d", LIBRARY)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libtorch_python" not in dynamic and "libpython" not in dynamic
    assert exported(LIBRARY) == set()
    undefined = [
        line.split()[-1] for line in run("nm", "-D", "--undefined-only", LIBRARY).splitlines()
    ]
    foreign = [
        name for name in undefined if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "Py"))
    ]
    assert foreign == []


@needs_binutils
@pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="built without nvcc")
def test_cuda_library_is_a_closed_door() -> None:
    assert exported(CUDA_LIBRARY) == {"cora_cuda_get_api"}
    needed = run("readelf", "-d", CUDA_LIBRARY)
    assert "libtorch" not in needed and "libcudart" not in needed and "libcuda.so" not in needed


@pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="built without nvcc")
def test_cuda_library_opens_without_a_driver() -> None:
    code = f"""
import ctypes
library = ctypes.CDLL({str(CUDA_LIBRARY)!r})
library.cora_cuda_get_api.restype = ctypes.c_void_p
print(ctypes.c_int.from_address(library.cora_cuda_get_api()).value)
"""
    assert int(run(sys.executable, "-c", code)) >= 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_cuda_library_is_there_where_nvcc_is() -> None:
    if os.environ.get("CORA_CUDA", "AUTO").upper() == "OFF":
        pytest.skip("CORA_CUDA=OFF")
    assert CUDA_LIBRARY.exists()


@needs_source
@pytest.mark.slow
def test_sdist_and_wheel_without_nvcc(tmp_path: Path) -> None:
    """The source archive is complete, and builds where there is no nvcc; the wheel runs by
    itself."""
    copy = tmp_path / "source"
    keep = shutil.ignore_patterns("build", "dist", "*.so", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(ROOT, copy, ignore=keep)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    archive = next(tmp_path.glob("cora-*.tar.gz"))
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
        # Early patch releases of Python 3.10 and 3.11 have no filters.
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert {
        "csrc/bits.h",
        "csrc/cuda/fake_quantize.cu",
        "CMakeLists.txt",
        "cora/tasks/__init__.py",
    } <= names
    assert not any(name.endswith(".so") for name in names)

    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    flags = ("--no-build-isolation", "--no-deps", "--no-cache-dir")
    run(*pip, "wheel", *flags, "-w", tmp_path, unpacked, CORA_CUDA="OFF", MAX_JOBS="2")
    wheel = next(tmp_path.glob("cora-*.whl"))
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as contents:
        files = set(contents.namelist())
        assert {"cora/_C.so", "cora/py.typed", "cora/tasks/__init__.py"} <= files
        assert "cora/libcora_cuda.so" not in files
        contents.extractall(tmp_path / "site")
    code = "from cora import ops; print(ops.__file__, ops.isa()['level'])"
    assert str(tmp_path / "site") in run(sys.executable, "-c", code, cwd=tmp_path / "site")
