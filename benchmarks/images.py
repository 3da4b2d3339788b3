"""Real images for networks: the ImageNet sample in CORA_DATA, or smooth noise where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def images(count: int, size: int = 224) -> tuple[Tensor, str]:
    """float32 [count, 3, size, size], normalised as for ImageNet, and where they come from."""
    files = sorted(Path(os.environ.get("CORA_DATA", ".")).glob("imagenet-sample/*.jpg"))[:count]
    if len(files) < count:
        coarse = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(0))
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
        return smooth, "smooth random images (CORA_DATA has no imagenet-sample)"
    from cora.tasks.imagenet import Preprocessing

    preprocessing = Preprocessing(size)
    raw = torch.stack([preprocessing.load(path) for path in files])
    return preprocessing.normalise(raw), f"{count} ImageNet images"
