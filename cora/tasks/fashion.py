"""Fashion-MNIST with a small ResNet that examples/train_fashion_mnist.py trains."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cora.tasks.base import Batch, ClassificationMeter, Task, batches, check_samples
from cora.tasks.data import (
    DataNotFoundError,
    Source,
    data_folders,
    fetch,
    load_checkpoint,
    locate,
    missing_message,
)
from cora.tasks.resnet import SmallResNet

__all__ = [
    "CHECKPOINT",
    "FashionMnist",
    "build_model",
    "load_fashion_mnist",
    "normalise",
    "read_idx",
]

CHECKPOINT = "fashion-mnist/resnet8.pth"
"""Where a data folder has the trained weights."""

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PREFIX = {"train": "train", "test": "t10k"}
_MEAN, _STD = 0.2860, 0.3530
_WEIGHTS = Source(
    what="ResNet-8 weights for Fashion-MNIST", names=(CHECKPOINT, Path(CHECKPOINT).name)
)
_TRAIN_HINT = "make it with: python examples/train_fashion_mnist.py --data DIR"
_DATA_HINT = (
    "apt-get install dataset-fashion-mnist brings it, or take the four files "
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
    "t10k-labels-idx1-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist"
)
_IMAGES = Source(
    what="Fashion-MNIST",
    names=("fashion-mnist/train-images-idx3-ubyte[.gz]", "train-images-idx3-ubyte[.gz]"),
)


def read_idx(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped or not.

    Returns:
        uint8 array of the shape the header states.

    Raises:
        ValueError: the header is wrong or the file is not as long as it says.
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of bytes, header 00 00 08, got {raw[:3]!r}")
    rank = raw[3]
    start = 4 + 4 * rank
    if rank == 0 or len(raw) < start:
        raise ValueError(f"{path}: truncated IDX header of {rank} dimensions")
    shape = struct.unpack(f">{rank}I", raw[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - start != expected:
        raise ValueError(f"{path}: expected {expected} bytes of data, got {len(raw) - start}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _files(split: str, data: str | os.PathLike[str] | None) -> tuple[Path, Path] | None:
    """(images, labels) in a data folder or where Debian's package puts them."""
    bases = [base for folder in data_folders(data) for base in (folder / "fashion-mnist", folder)]
    for base in (*bases, _DEBIAN):
        for suffix in ("", ".gz"):
            images = base / f"{_PREFIX[split]}-images-idx3-ubyte{suffix}"
            labels = base / f"{_PREFIX[split]}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                return images, labels
    return None


def load_fashion_mnist(
    split: str, data: str | os.PathLike[str] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of ``"train"`` or ``"test"``.

    Raises:
        DataNotFoundError: neither a data folder nor Debian's package has the four files.
    """
    if split not in _PREFIX:
        raise ValueError(f"split: expected one of {sorted(_PREFIX)}, got {split!r}")
    files = _files(split, data)
    if files is None:
        hint = f"also looked in {_DEBIAN}; {_DATA_HINT}"
        raise DataNotFoundError(missing_message([_IMAGES], data, hint=hint))
    images, labels = read_idx(files[0]), read_idx(files[1])
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(f"{files[0]}: expected [N, 28, 28] with N labels, got {images.shape}")
    return images, labels


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, 28, 28] -> float32 [N, 1, 28, 28]."""
    x = torch.from_numpy(images.copy()).unsqueeze(1).float()
    return x.div_(255).sub_(_MEAN).div_(_STD)


def build_model() -> SmallResNet:
    """The untrained ResNet-8, 78 thousand parameters."""
    return SmallResNet(blocks=1, channels=1)


class FashionMnist(Task):
    """Fashion-MNIST classification: 10,000 test images, calibration from the training images.

    Args:
        data: a data folder to search first.
        batch_size: samples a batch.
    """

    name = "fashion-mnist"
    description = "Fashion-MNIST images, a ResNet-8 trained by an example; top-1 accuracy"

    def __init__(self, data: str | os.PathLike[str] | None = None, batch_size: int = 64) -> None:
        self.data = data
        self.batch_size = batch_size

    def missing(self) -> str | None:
        if _files("train", self.data) is None or _files("test", self.data) is None:
            return missing_message([_IMAGES], self.data, hint=_DATA_HINT)
        if locate(_WEIGHTS, self.data) is None:
            return missing_message([_WEIGHTS], self.data, hint=_TRAIN_HINT)
        return None

    def model(self) -> nn.Module:
        try:
            path = fetch(_WEIGHTS, self.data)
        except DataNotFoundError as error:
            raise DataNotFoundError(f"{error}\n  {_TRAIN_HINT}") from None
        model = build_model()
        model.load_state_dict(load_checkpoint(path))
        return model.eval()

    def calibration(self, samples: int = 1600, seed: int = 0) -> list[Batch]:
        images, labels = load_fashion_mnist("train", self.data)
        check_samples(samples, len(images))
        chosen = np.random.default_rng(seed).permutation(len(images))[:samples]
        targets = torch.from_numpy(labels[chosen].astype(np.int64))
        return batches(normalise(images[chosen]), targets, self.batch_size)

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        images, labels = load_fashion_mnist("test", self.data)
        images, labels = images[:limit], labels[:limit]
        for start in range(0, len(images), 500):
            part = slice(start, start + 500)
            yield normalise(images[part]), torch.from_numpy(labels[part].astype(np.int64))

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter()
