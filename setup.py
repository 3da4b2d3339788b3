"""Build of the native libraries by CMake and Ninja. All metadata is in pyproject.toml.

Environment: CORA_CUDA=AUTO|ON|OFF, CORA_CUDA_ARCHS="80+PTX;90a", MAX_JOBS (default: all cores).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_dir() -> str:
    """Folder of the torch to build against, found without importing it (an import takes
    seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("cora needs torch to build: install torch, or build without --no-build-isolation")
    return spec.submodule_search_locations[0]


def tool(name: str) -> str:
    """Path of a build tool: beside the running Python first, then on PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        sys.exit(f"cora needs {name} to build: pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Runs CMake once; it writes _C.so and, where nvcc is found, libcora_cuda.so beside it."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python ABI in it: one file for all

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CORA_TORCH_DIR": torch_dir(),
            "CORA_OUTPUT_DIR": str(output),
            "CORA_CUDA": os.environ.get("CORA_CUDA", "AUTO"),
            "CORA_CUDA_ARCHS": os.environ.get("CORA_CUDA_ARCHS", "80+PTX;90a"),
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.check_call(
            [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *defines]
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call([tool("cmake"), "--build", str(build), "--parallel", jobs])

    def copy_extensions_to_source(self) -> None:
        """In an editable install both libraries go beside the sources."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "cora" / "libcora_cuda.so"
        if built.is_file():
            shutil.copy2(built, ROOT / "cora")


setup(
    ext_modules=[Extension("cora._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
