"""The packed file: one safetensors file that holds everything but the architecture.

Tensors of a packed layer are stored at their width (codes, zero-points and adapters packed to bits,
scales in float16 where that is what they are), everything else as it is. One metadata entry, "cora",
is JSON: format version, layers, checksum and the report. Two runs write the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import ops
from .convert import replace_layers
from .lowrank import Adapter, LayerShape
from .modules import QUANT_LAYERS, QuantLayer, QuantWeight
from .quantizer import QParams, zero_point_bits
from .report import Report

__all__ = ["FORMAT_VERSION", "load", "read_header", "save"]

FORMAT_VERSION = 1

_KEY = "cora"
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def save(qmodel: nn.Module, path: str | Path) -> None:
    """Write a packed model. The file appears whole or not at all.

    Args:
        qmodel: what `cora.quantize` or `cora.load` returned.
        path: of the file, by custom "*.safetensors"; replaced if it exists.

    Raises:
        ValueError: qmodel has no packed layers.
        OSError: the file cannot be written.
    """
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in qmodel.named_modules():
        if isinstance(module, QuantLayer):
            layers[name], stored = _pack_layer(module)
            tensors.update({_join(name, key): value for key, value in stored.items()})
    if not layers:
        raise ValueError("qmodel: expected a model with packed layers, found none")
    for key, _, tensor in _float_tensors(qmodel):
        tensors[key] = tensor.detach()
    tensors = {key: value.cpu().contiguous() for key, value in sorted(tensors.items())}
    header = {
        "format": FORMAT_VERSION,
        "layers": layers,
        "report": _stored_report(getattr(qmodel, "report", None)),
    }
    header["sha256"] = _checksum(header, tensors)
    metadata = {_KEY: json.dumps(header, sort_keys=True, separators=(",", ":"))}
    _write(Path(path), safetensors.torch.save(tensors, metadata))


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Read a packed model.

    Args:
        path: a file that `cora.save` wrote.
        model: the float architecture; its weights are not used and it is not changed.

    Returns:
        The packed model in eval mode, on the CPU, with its `report`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, altered, of another version, or of another architecture.
    """
    header, tensors = _read(Path(path))
    report = header["report"]
    layers: dict[str, nn.Module] = {}
    available = dict(model.named_modules())
    for name, config in header["layers"].items():
        float_layer = available.get(name)
        kind = type(float_layer).__name__ if float_layer is not None else "nothing"
        if kind != config["kind"] or list(float_layer.weight.shape) != config["weight_shape"]:
            found = kind if float_layer is None else _describe(float_layer)
            raise ValueError(
                f"{path}: the file is of another architecture: layer {name!r} is "
                f"{config['kind']} {config['weight_shape']} in the file, the model has {found}"
            )
        prefix = _join(name, "")
        stored = {
            key.removeprefix(prefix): tensors.pop(key)
            for key in [_join(name, part) for part in config["tensors"]]
            if key in tensors
        }
        missing = set(config["tensors"]) - set(stored)
        if missing:
            raise ValueError(f"{path}: layer {name!r} lacks {', '.join(sorted(missing))}")
        layers[name] = _unpack_layer(float_layer, config, stored)
    report_attribute = model.__dict__.get("report")
    qmodel = copy.deepcopy(model).eval()
    if report_attribute is not None:
        qmodel.__dict__.pop("report")
    qmodel = replace_layers(qmodel, layers)
    _load_float(path, qmodel, tensors)
    if report is not None:
        qmodel.report = Report.from_dict(report)
    return qmodel


def read_header(path: str | Path) -> dict[str, Any]:
    """What a packed file says of itself: "format", "layers", "report"; no model is needed.

    The whole file is read and its checksum verified.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    return _read(Path(path))[0]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _describe(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ + (f" {list(weight.shape)}" if isinstance(weight, Tensor) else "")


def _float_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(key, owner, tensor) of every parameter and persistent buffer outside packed layers, once each."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            continue
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or key in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield _join(name, key), module, tensor


# --- One layer -----------------------------------------------------------------------------------


def _pack_layer(layer: QuantLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    width = zero_point_bits(layer.zero_point, layer.bits, layer.symmetric)
    tensors = {"codes": layer.codes, "scale": layer.scale.to(layer.scale_dtype)}
    if width == layer.bits:
        tensors["zero_point"] = ops.pack_bits(
            layer.zero_point.reshape(1, -1).to(torch.uint8), width
        )
    elif width:
        tensors["zero_point"] = layer.zero_point.to(_INTEGERS[width])
    if layer.rank:
        tensors["adapter_a"] = _pack_adapter(layer.adapter_a, layer.adapter_bits)
        tensors["adapter_b"] = _pack_adapter(layer.adapter_b.T.contiguous(), layer.adapter_bits)
    for key in ("adapter_scale", "bias", "x_scale", "x_zero_point"):
        if getattr(layer, key) is not None:
            tensors[key] = getattr(layer, key)
    config = {
        "kind": layer.float_type.__name__,
        "weight_shape": list(layer.weight_shape),
        "bits": layer.bits,
        "scale_shape": list(layer.scale.shape),
        "zero_point_bits": width,
        "rank": layer.rank,
        "adapter_bits": layer.adapter_bits,
        "activation_bits": layer.activation_bits,
        "tensors": sorted(tensors),
    }
    return config, tensors


def _unpack_layer(
    float_layer: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantLayer:
    shape = LayerShape.of(float_layer)
    bits, width, rank = config["bits"], config["zero_point_bits"], config["rank"]
    scale_shape = config["scale_shape"]
    scale = tensors["scale"]
    if width == 0:
        zero = torch.full(scale_shape, 2 ** (bits - 1), dtype=torch.int32)
    elif width == bits:
        zero = ops.unpack_bits(tensors["zero_point"], bits, scale.numel()).to(torch.int32)
    else:
        zero = tensors["zero_point"].to(torch.int32)
    qparams = QParams(scale.float(), zero.reshape(scale_shape), bits, scale.dtype, width == 0)
    adapter_bits = config["adapter_bits"]
    if rank:
        a = _unpack_adapter(tensors["adapter_a"], adapter_bits, shape.columns)
        b = _unpack_adapter(tensors["adapter_b"], adapter_bits, shape.rows).T.contiguous()
    else:
        a, b = torch.zeros(0, shape.columns), torch.zeros(shape.rows, 0)
    adapter = Adapter(a, b, tensors.get("adapter_scale"), adapter_bits)
    weight = QuantWeight(tensors["codes"], qparams, adapter, shape)
    layer = QUANT_LAYERS[type(float_layer)](float_layer, weight, config["activation_bits"])
    layer.bias = tensors.get("bias")
    if "x_scale" in tensors:
        layer.set_activation_range(tensors["x_scale"], tensors["x_zero_point"])
    return layer.eval()


def _pack_adapter(factor: Tensor, bits: int) -> Tensor:
    """Rows of signed codes, offset to unsigned and packed; 8-bit and float factors as they are."""
    if bits >= 8:
        return factor
    return ops.pack_bits((factor.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)


def _unpack_adapter(stored: Tensor, bits: int, columns: int) -> Tensor:
    if bits >= 8:
        return stored
    return (ops.unpack_bits(stored, bits, columns).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


# --- The file ------------------------------------------------------------------------------------


def _stored_report(report: Report | None) -> dict[str, Any] | None:
    """The report without what only plots need."""
    if report is None:
        return None
    values = report.to_dict()
    values["search"] = {**values["search"], "history": []}
    for layer in values["layers"]:
        layer["spectrum"] = []
    return values


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    content = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises several kinds
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if _KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one that cora.save wrote")
    try:
        header = json.loads(metadata[_KEY])
        version = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its header was altered or damaged ({error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {FORMAT_VERSION} was expected, got {version!r}; "
            "read it with the cora that wrote it"
        )
    if header.get("sha256") != _checksum(header, tensors):
        raise ValueError(f"{path}: its checksum does not match: it was altered or damaged")
    return header, tensors


def _load_float(path: str | Path, qmodel: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill parameters and buffers outside packed layers; every one must be there, and no other."""
    places = {key: (owner, tensor) for key, owner, tensor in _float_tensors(qmodel)}
    for what, keys in (
        ("lacks", places.keys() - tensors.keys()),
        ("has a layer the model lacks:", tensors.keys() - places.keys()),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:3])
            raise ValueError(f"{path}: the file is of another architecture: it {what} {names}")
    for key, (owner, tensor) in places.items():
        stored = tensors[key]
        if stored.shape != tensor.shape:
            raise ValueError(
                f"{path}: the file is of another architecture: {key} is {list(stored.shape)} in the "
                f"file, {list(tensor.shape)} in the model"
            )
        if tensor.is_meta or tensor.dtype != stored.dtype:
            name = key.rsplit(".", 1)[-1]
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(stored, requires_grad=False)
            else:
                owner._buffers[name] = stored
        else:
            with torch.no_grad():
                tensor.copy_(stored)
