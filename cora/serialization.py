"""The packed file: one safetensors file that holds everything but the architecture.

Tensors of a packed layer are stored at their width (codes, zero-points and adapters packed to bits,
scales in float16 where that is what they are), everything else as it is. One metadata entry, "cora",
is deflated JSON: format version, layers, checksum and the report. Two runs write the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import ops
from .attention import SplitAttention
from .embedding import QuantEmbedding, names_sharing
from .files import write_file
from .fold import FoldedBatchNorm
from .lowrank import Adapter, FloatLayer, LayerShape
from .modules import QUANT_LAYERS, QuantLayer, QuantWeight, copied, replace_layers
from .quantizer import QParams, zero_point_bits
from .recurrent import QUANT_RECURRENT, QuantRecurrent, matrices_of
from .report import Report, float_state
from .restructure import hides_layers, restructure

__all__ = ["FORMAT_VERSION", "load", "read_header", "save"]

FORMAT_VERSION = 2

_KEY = "cora"
# What a layer does beside its weight's shape; a file is for layers that do the same.
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
_EMBEDDING_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def save(qmodel: nn.Module, path: str | Path) -> None:
    """Write a packed model. The file appears whole or not at all.

    Args:
        qmodel: what `cora.quantize` or `cora.load` returned.
        path: of the file, by convention "*.safetensors"; replaced if it exists.

    Raises:
        ValueError: qmodel has no packed layers.
        OSError: the file cannot be written.
    """
    qmodel = getattr(qmodel, "_orig_mod", qmodel)  # of torch.compile
    if hasattr(qmodel, "graph_module"):
        raise ValueError(
            "qmodel: expected the packed model, got a fused one, which is made after loading"
        )
    layers: dict[str, Any] = {}
    embeddings: dict[str, Any] = {}
    recurrent: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in qmodel.named_modules():
        if isinstance(module, QuantLayer):
            layers[name], stored = _pack_layer(module)
        elif isinstance(module, QuantEmbedding):
            embeddings[name], stored = _pack_embedding(module)
        elif isinstance(module, QuantRecurrent):
            recurrent[name], stored = _pack_recurrent(module)
        else:
            continue
        tensors.update({_join(name, key): value for key, value in stored.items()})
    if not layers:
        raise ValueError("qmodel: expected a model with packed layers, found none")
    for key, tensor in _float_tensors(qmodel):
        tensors[key] = tensor.detach()
    tensors = _apart({key: value.cpu().contiguous() for key, value in sorted(tensors.items())})
    header = {
        "format": FORMAT_VERSION,
        "layers": layers,
        "embeddings": embeddings,
        "recurrent": recurrent,
        "attention": _attention(qmodel),
        "restructured": not hides_layers(qmodel),
        "folded": sorted(n for n, m in qmodel.named_modules() if isinstance(m, FoldedBatchNorm)),
        "report": _stored_report(getattr(qmodel, "report", None)),
    }
    header["sha256"] = _checksum(header, tensors)
    write_file(Path(path), safetensors.torch.save(tensors, {_KEY: _encode(header)}))


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Read a packed model.

    Args:
        path: a file that `cora.save` wrote.
        model: the float architecture; its weights are not used and it is not changed.

    Returns:
        The packed model in eval mode, on the CPU, with its `report`.

    Raises:
        FileNotFoundError: no such file.
        TypeError: the model is not a module.
        ValueError: truncated, altered, of another version, or of another architecture.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, the float architecture, got {model!r}")
    header, tensors = _read(Path(path))
    report = header["report"]
    qmodel: Any = copied(model)
    qmodel.__dict__.pop("report", None)
    if header["restructured"]:
        qmodel = restructure(qmodel)
        if (here := _attention(qmodel)) != header["attention"]:
            raise ValueError(
                f"{path}: the file is of another architecture: its attention is "
                f"{', '.join(header['attention']) or 'none'}, the model's {', '.join(here) or 'none'}"
            )
    layers: dict[str, nn.Module] = {}
    available = dict(qmodel.named_modules())
    for name, config in header["layers"].items():
        float_layer: FloatLayer = available.get(name)
        _check_layer(path, name, float_layer, config)
        layers[name] = _unpack_layer(float_layer, config, _take(path, name, config, tensors))
    for name, config in header["embeddings"].items():
        embedding: Any = available.get(name)
        _check_weight(path, name, embedding, config)
        stored = _take(path, name, config, tensors)
        dtype = _EMBEDDING_TYPES[config["dtype"]]
        qparams = _unpack_qparams(config, stored)
        packed = QuantEmbedding(embedding, stored["codes"], qparams, dtype)
        layers |= dict.fromkeys(names_sharing(qmodel, embedding), packed)
    for name, config in header["recurrent"].items():
        recurrent: Any = available.get(name)
        _check_recurrent(path, name, recurrent, config)
        biases = [t for key, t in tensors.items() if key.startswith(_join(name, "bias"))]
        if biases:
            recurrent.to(biases[0].dtype)
        stored = _take(path, name, config, tensors)
        layers[name] = _unpack_recurrent(recurrent, config, stored)
    for name in header["folded"]:
        if not isinstance(available.get(name), nn.modules.batchnorm._BatchNorm | FoldedBatchNorm):
            found = type(available[name]).__name__ if name in available else "nothing"
            raise ValueError(
                f"{path}: the file is of another architecture: {name!r} is a batch norm in the file, "
                f"the model has {found}"
            )
        layers[name] = FoldedBatchNorm().eval()
    qmodel = replace_layers(qmodel, layers)
    _load_float(path, qmodel, tensors)
    if report is not None:
        qmodel.report = Report.from_dict(report)
    return qmodel.cpu()


def read_header(path: str | Path) -> dict[str, Any]:
    """What a packed file says of itself: "format", "layers", "report"; no model is needed.

    The whole file is read and its checksum verified.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    return _read(Path(path))[0]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _attention(model: nn.Module) -> list[str]:
    return sorted(name for name, m in model.named_modules() if isinstance(m, SplitAttention))


def _geometry(layer: nn.Module) -> dict[str, Any]:
    values = {key: getattr(layer, key) for key in _GEOMETRY if hasattr(layer, key)}
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    bias = layer.float_bias if isinstance(layer, QuantLayer) else layer.bias is not None
    return {**values, "bias": bias}


def _check_layer(path: str | Path, name: str, layer: FloatLayer, config: dict[str, Any]) -> None:
    _check_weight(path, name, layer, config)
    geometry = _geometry(layer)
    for key, value in config["geometry"].items():
        if geometry[key] != value:
            raise ValueError(
                f"{path}: the file is of another architecture: layer {name!r} has {key} {value!r} "
                f"in the file, {geometry[key]!r} in the model"
            )


def _check_weight(path: str | Path, name: str, layer: Any, config: dict[str, Any]) -> None:
    """The model must have a layer of the kind and size that the file has."""
    kind, shape = config["kind"], config["weight_shape"]
    if layer is None or type(layer).__name__ != kind or list(layer.weight.shape) != shape:
        found = "nothing" if layer is None else type(layer).__name__
        weight = getattr(layer, "weight", None)
        found += f" {list(weight.shape)}" if isinstance(weight, Tensor) else ""
        raise ValueError(
            f"{path}: the file is of another architecture: layer {name!r} is {kind} {shape} in the "
            f"file, the model has {found}"
        )


def _take(
    path: str | Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A layer's tensors out of the file's."""
    if missing := [part for part in config["tensors"] if _join(name, part) not in tensors]:
        raise ValueError(f"{path}: layer {name!r} lacks {', '.join(sorted(missing))}")
    return {part: tensors.pop(_join(name, part)) for part in config["tensors"]}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with no two in the same memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _float_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of everything outside packed weights."""
    for name, _, key, tensor in float_state(model):
        yield _join(name, key), tensor


# --- One layer -----------------------------------------------------------------------------------


def _pack_layer(layer: QuantLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = _pack_codes(layer.codes, layer.packed_weight().qparams)
    if layer.rank:
        tensors["adapter_a"] = _pack_adapter(layer.adapter_a, layer.adapter_bits)
        tensors["adapter_b"] = _pack_adapter(layer.adapter_b.T.contiguous(), layer.adapter_bits)
    ranges = ("x_scale", "x_zero_point", "y_scale", "y_zero_point")
    for key in ("adapter_scale", "bias", *ranges):
        if getattr(layer, key) is not None:
            tensors[key] = getattr(layer, key)
    config |= {
        "kind": layer.float_type.__name__,
        "weight_shape": list(layer.weight_shape),
        "geometry": _geometry(layer),
        "rank": layer.rank,
        "adapter_bits": layer.adapter_bits,
        "activation_bits": layer.activation_bits,
        "tensors": sorted(tensors),
    }
    return config, tensors


def _unpack_layer(
    float_layer: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantLayer:
    shape, adapter_bits = LayerShape.of(float_layer), config["adapter_bits"]
    if config["rank"]:
        a = _unpack_adapter(tensors["adapter_a"], adapter_bits, shape.columns)
        b = _unpack_adapter(tensors["adapter_b"], adapter_bits, shape.rows).T.contiguous()
    else:
        a, b = (
            torch.zeros(size, dtype=torch.float32) for size in ((0, shape.columns), (shape.rows, 0))
        )
    adapter = Adapter(a, b, tensors.get("adapter_scale"), adapter_bits)
    weight = QuantWeight(tensors["codes"], _unpack_qparams(config, tensors), adapter, shape)
    layer = QUANT_LAYERS[type(float_layer)](float_layer, weight, config["activation_bits"])
    layer.set_bias(tensors.get("bias"))
    if "x_scale" in tensors:
        layer.set_activation_range(tensors["x_scale"], tensors["x_zero_point"])
    if "y_scale" in tensors:
        layer.set_output_range(tensors["y_scale"], tensors["y_zero_point"])
    return layer.eval()


def _pack_embedding(embedding: QuantEmbedding) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = _pack_codes(embedding.codes, embedding.qparams)
    config |= {
        "kind": "Embedding",
        "weight_shape": [embedding.num_embeddings, embedding.embedding_dim],
        "dtype": str(embedding.like.dtype).removeprefix("torch."),
        "tensors": sorted(tensors),
    }
    return config, tensors


def _pack_recurrent(layer: QuantRecurrent) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in layer.scale_dtypes:
        weights[name], parts = _pack_codes(*layer.packed(name))
        weights[name]["shape"] = list(layer.get_buffer(name).shape)
        tensors |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
    kind = layer.float_type.__name__
    return {"kind": kind, "weights": weights, "tensors": sorted(tensors)}, tensors


def _check_recurrent(path: str | Path, name: str, layer: Any, config: dict[str, Any]) -> None:
    here: dict[str, list[int]] = {}
    if type(layer) in QUANT_RECURRENT:
        here = {key: list(layer.get_parameter(key).shape) for key in matrices_of(layer)}
    expected = {key: weight["shape"] for key, weight in config["weights"].items()}
    if type(layer).__name__ != config["kind"] or here != expected:
        found = "nothing" if layer is None else f"{type(layer).__name__} {here or ''}"
        raise ValueError(
            f"{path}: the file is of another architecture: layer {name!r} is {config['kind']} {expected} "
            f"in the file, the model has {found}"
        )


def _unpack_recurrent(
    layer: Any, config: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantRecurrent:
    packed = {}
    for name, weight in config["weights"].items():
        parts = {
            part: tensors[f"{name}_{part}"]
            for part in ("codes", "scale", "zero_point")
            if f"{name}_{part}" in tensors
        }
        packed[name] = parts["codes"], _unpack_qparams(weight, parts)
    bits = next(iter(config["weights"].values()))["bits"]
    made: QuantRecurrent = QUANT_RECURRENT[type(layer)].of(layer, bits, packed)
    return made


def _pack_codes(codes: Tensor, qparams: QParams) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Codes, scales and zero-points as stored, and what it takes to read them."""
    bits, zero_point = qparams.bits, qparams.zero_point
    width = zero_point_bits(zero_point, bits, qparams.symmetric)
    tensors = {"codes": codes, "scale": qparams.scale.to(qparams.scale_dtype)}
    if width == bits:
        tensors["zero_point"] = ops.pack_bits(zero_point.reshape(1, -1).to(torch.uint8), width)
    elif width:
        tensors["zero_point"] = zero_point.to(_INTEGERS[width])
    config = {"bits": bits, "scale_shape": list(zero_point.shape), "zero_point_bits": width}
    return config, tensors


def _unpack_qparams(config: dict[str, Any], tensors: dict[str, Tensor]) -> QParams:
    bits, width, shape = config["bits"], config["zero_point_bits"], config["scale_shape"]
    scale = tensors["scale"]
    if width == 0:
        zero = torch.full(shape, 2 ** (bits - 1), dtype=torch.int32)
    elif width == bits:
        zero = ops.unpack_bits(tensors["zero_point"], bits, scale.numel()).to(torch.int32)
    else:
        zero = tensors["zero_point"].to(torch.int32)
    return QParams(scale.float(), zero.reshape(shape), bits, scale.dtype, width == 0)


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
    search = values["search"]
    tuning = {**search.get("tuning", {}), "history": []}
    values["search"] = {**search, "history": [], "tuning": tuning}
    for layer in values["layers"]:
        layer["spectrum"] = []
    return values


def _encode(header: Any) -> str:
    """As metadata holds it: as plain JSON it would be a third of a very small model's file."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _decode(metadata: str) -> dict[str, Any]:
    """The inverse; ValueError or zlib.error of anything else."""
    if metadata.startswith("{"):  # format 1, so that its version can be named
        return json.loads(metadata)
    packed = base64.b64decode(metadata, validate=True)
    if base64.b64encode(packed).decode() != metadata:
        raise ValueError("it ends in bits that say nothing")
    return json.loads(zlib.decompress(packed))


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    content = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        header = _decode(metadata[_KEY])
        version = header["format"]
    except (ValueError, KeyError, TypeError, zlib.error) as error:
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
    places = dict(_float_tensors(qmodel))
    for what, keys in (
        ("lacks", places.keys() - tensors.keys()),
        ("has a layer the model lacks:", tensors.keys() - places.keys()),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:3])
            raise ValueError(f"{path}: the file is of another architecture: it {what} {names}")
    for key, tensor in places.items():
        stored = tensors[key]
        if stored.shape != tensor.shape:
            raise ValueError(
                f"{path}: the file is of another architecture: {key} is {list(stored.shape)} in the "
                f"file, {list(tensor.shape)} in the model"
            )
        if tensor.is_meta or tensor.dtype != stored.dtype:
            _replace(qmodel, tensor, stored)
        else:
            with torch.no_grad():
                tensor.copy_(stored)
    for key, tensor in (*qmodel.named_parameters(), *qmodel.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"model: {key} is on the meta device and the file does not hold it: "
                "build the model on the CPU"
            )


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put a tensor in the place of another, under every name that holds it."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
    for module in model.modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is old:
                setattr(module, name, new)
