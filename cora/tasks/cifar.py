"""CIFAR-10 with the pretrained ResNet-20 and ResNet-32 of Y. Idelbayev (option-A shortcuts)."""

from __future__ import annotations

import codecs
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cora.tasks.base import Batch, ClassificationMeter, Task, batches, check_samples
from cora.tasks.data import (
    DataNotFoundError,
    Remote,
    Source,
    data_folders,
    fetch,
    load_checkpoint,
    locate,
    missing_message,
)
from cora.tasks.resnet import SmallResNet

__all__ = ["Cifar10", "load_cifar10"]

Images = NDArray[np.uint8]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
_CHECKPOINTS = {
    20: (
        "resnet20-12fca82f.th",
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    ),
    32: (
        "resnet32-d509ac18.th",
        "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
    ),
}
_ARCHIVE = Source(
    what="the CIFAR-10 archive",
    names=("cifar10/cifar-10-python.tar.gz", "cifar-10-python.tar.gz"),
    remote=Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "md5",
    ),
)
_MEMBERS = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test": ("test_batch",),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the archive's Python 2 pickles: numpy arrays and plain containers, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module.startswith("numpy") and module.endswith("multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, where Python 3 wrote the pickle
            return codecs.encode
        raise pickle.UnpicklingError(f"CIFAR-10 batch: unexpected object {module}.{name}")


def _read_batch(stream: IO[bytes]) -> tuple[Images, Images]:
    content = _ArrayUnpickler(stream, encoding="bytes").load()
    images = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(content[b"labels"], np.uint8)


def _read_npz(path: Path) -> tuple[Images, Images]:
    with np.load(path, allow_pickle=False) as content:
        images, labels = content["images"], content["labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"{path}: images must be uint8 [N, 32, 32, 3], got {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: labels must have shape [{len(images)}], got {labels.shape}")
    return images, labels


def _find_split(split: str, data: str | os.PathLike[str] | None) -> tuple[str, Path] | None:
    """(kind, path) of the first source of a split, in the order of the data folders."""
    for folder in data_folders(data):
        for base in (folder / "cifar10", folder):
            if (base / f"{split}.npz").is_file():
                return "npz", base / f"{split}.npz"
            if (base / "cifar-10-batches-py" / _MEMBERS[split][0]).is_file():
                return "folder", base / "cifar-10-batches-py"
            if (base / _MEMBERS[split][0]).is_file():
                return "folder", base
            if (base / "cifar-10-python.tar.gz").is_file():
                return "archive", base / "cifar-10-python.tar.gz"
    return None


def load_cifar10(split: str, data: str | os.PathLike[str] | None = None) -> tuple[Images, Images]:
    """CIFAR-10 images and labels.

    Read from ``cifar10/<split>.npz`` (``images``, ``labels``) in a data folder, from the original
    ``cifar-10-batches-py`` folder or its ``.tar.gz``, else downloaded.

    Args:
        split: ``"train"`` or ``"test"``.
        data: a folder to search first.

    Returns:
        uint8 [N, 32, 32, 3] and uint8 [N].

    Raises:
        DataNotFoundError: there is none and it cannot be downloaded.
    """
    if split not in _MEMBERS:
        raise ValueError(f"split: expected one of {sorted(_MEMBERS)}, got {split!r}")
    found = _find_split(split, data)
    if found is None:
        try:
            found = "archive", fetch(_ARCHIVE, data)
        except DataNotFoundError as error:
            hint = f"also taken: cifar10/{split}.npz, cifar10/cifar-10-batches-py/"
            raise DataNotFoundError(f"{error}\n  {hint}") from error
    kind, path = found
    if kind == "npz":
        return _read_npz(path)
    parts = []
    if kind == "folder":
        for member in _MEMBERS[split]:
            with (path / member).open("rb") as file:
                parts.append(_read_batch(file))
    else:
        parts = list(_read_archive(path, _MEMBERS[split]))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _read_archive(path: Path, members: tuple[str, ...]) -> Iterator[tuple[Images, Images]]:
    with tarfile.open(path) as archive:
        for member in members:
            stream = archive.extractfile(f"cifar-10-batches-py/{member}")
            if stream is None:
                raise ValueError(f"{path}: cifar-10-batches-py/{member} is not a file")
            yield _read_batch(io.BytesIO(stream.read()))


def normalise(images: Images) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] with the ImageNet mean and deviation removed."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)
    mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
    return x.sub_(mean).div_(std)


class Cifar10(Task):
    """CIFAR-10 classification: 10,000 test images, calibration from the training images.

    Args:
        depth: 20 or 32.
        data: a data folder to search first.
        batch_size: samples a batch.
    """

    def __init__(
        self,
        depth: int = 20,
        data: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
    ) -> None:
        if depth not in _CHECKPOINTS:
            raise ValueError(f"depth: expected one of {sorted(_CHECKPOINTS)}, got {depth}")
        self.name = f"cifar10-resnet{depth}"
        self.description = f"CIFAR-10 images, pretrained ResNet-{depth}; top-1 accuracy"
        self.depth = depth
        self.data = data
        self.batch_size = batch_size
        self._splits: dict[str, tuple[Images, Images]] = {}

    def _weights(self) -> Source:
        name, digest = _CHECKPOINTS[self.depth]
        return Source(
            what=f"ResNet-{self.depth} weights for CIFAR-10",
            names=(f"cifar10/{name}", name),
            remote=Remote(_WEIGHTS + name, digest),
        )

    def _load(self, split: str) -> tuple[Images, Images]:
        if split not in self._splits:
            self._splits[split] = load_cifar10(split, self.data)
        return self._splits[split]

    def missing(self) -> str | None:
        if locate(self._weights(), self.data) is None:
            return missing_message([self._weights()], self.data)
        for split in _MEMBERS:
            if _find_split(split, self.data) is None:
                return missing_message([_ARCHIVE], self.data)
        return None

    def model(self) -> nn.Module:
        model = SmallResNet((self.depth - 2) // 6)
        model.load_state_dict(load_checkpoint(fetch(self._weights(), self.data)))
        return model.eval()

    def calibration(self, samples: int = 1600, seed: int = 0) -> list[Batch]:
        images, labels = self._load("train")
        check_samples(samples, len(images))
        chosen = np.random.default_rng(seed).permutation(len(images))[:samples]
        targets = torch.from_numpy(labels[chosen].astype(np.int64))
        return batches(normalise(images[chosen]), targets, self.batch_size)

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        images, labels = self._load("test")
        order = np.random.default_rng(0).permutation(len(images))[:limit]  # files go by class
        for start in range(0, len(order), 500):
            part = order[start : start + 500]
            yield normalise(images[part]), torch.from_numpy(labels[part].astype(np.int64))

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter()
