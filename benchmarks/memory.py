"""Peak memory of a process that runs ResNet-50, above one that only imports torch.

    python benchmarks/memory.py KIND FOLDER     # KIND: bare, float, packed; prints the peak in KiB

Each process loads its model from a file in FOLDER and runs one image. `measure()` makes the files,
starts the processes and returns the peaks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 3


def peak_kib() -> int:
    """Peak resident size of this process, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def run(kind: str, folder: Path) -> int:
    import torch

    torch.set_num_threads(1)
    x = torch.zeros(1, 3, 224, 224)
    if kind == "bare":
        torch.nn.functional.relu(x)
        return peak_kib()
    from resnet import resnet50, without_batch_norm

    with torch.device("meta"):
        model = without_batch_norm(resnet50())
    if kind == "float":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / "float.safetensors"), assign=True)
        with torch.inference_mode():
            model.eval().to(memory_format=torch.channels_last)(
                x.contiguous(memory_format=torch.channels_last)
            )
        return peak_kib()
    import cora

    packed = cora.load(folder / "packed.safetensors", model)
    with torch.inference_mode():
        cora.fuse(packed, x)(x)
    return peak_kib()


def measure() -> dict[str, float]:
    """KiB of each kind, medians: bare, float, packed."""
    from rows import network, packed_network
    from safetensors.torch import save_file

    import cora

    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = network("ResNet-50")
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "float.safetensors"
        )
        cora.save(packed_network("ResNet-50"), folder / "packed.safetensors")
        for kind in ("bare", "float", "packed"):
            command = [sys.executable, __file__, kind, name]
            results = []
            for _ in range(RUNS):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(float(done.stdout.split()[-1]))
            peaks[kind] = sorted(results)[RUNS // 2]
        peaks["float file"] = (folder / "float.safetensors").stat().st_size / 1024
        peaks["packed file"] = (folder / "packed.safetensors").stat().st_size / 1024
    return peaks


if __name__ == "__main__":
    print(run(sys.argv[1], Path(sys.argv[2])))
