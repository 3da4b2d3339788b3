"""The packed file: what comes back is what was saved, and nothing else is taken for it."""

from __future__ import annotations

import copy
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import LAYERS, Net, assert_same_state, batches, make_layer, quantize, state, trained_net
from torch import Tensor, nn

import cora
from cora import QuantSpec, SearchConfig
from cora.serialization import _decode, _encode


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for key, value in x.items():
        assert value.dtype == y[key].dtype and torch.equal(value, y[key]), key


@pytest.fixture(scope="module")
def qnet() -> nn.Module:
    return quantize(trained_net(), activation_bits=8)


@pytest.fixture
def file(qnet: nn.Module, tmp_path: Path) -> Path:
    cora.save(qnet, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize(
    "options",
    [
        {}, {"rank_budget": 0}, {"activation_bits": 8},
        {"activation_bits": 4, "activation": "dynamic"},
        *({"adapter_bits": bits} for bits in (2, 3, 5, 7, 16, 32)),
        *({"spec": QuantSpec(bits)} for bits in (2, 5, 6, 7, 8)),
        {"spec": QuantSpec(4, "per_tensor", symmetric=True)},
        {"spec": QuantSpec(8, symmetric=True)},
        {"spec": {"stem": QuantSpec(3, "per_group", 9), "body.*": QuantSpec(6, clip="minmax")}},
        {"skip": ["stem"]}, {"fold_bn": False}, {"bias_correction": False},
        {"search": SearchConfig("gate", iterations=4)},
    ],
    ids=str,
)  # fmt: skip
def test_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    net, path = trained_net(), tmp_path / "m.safetensors"
    net.register_buffer("cached", torch.zeros(3), persistent=False)
    qmodel = quantize(net, **options)
    before = state(qmodel)
    cora.save(qmodel, path)
    assert_same_state(before, state(qmodel))
    architecture = Net()
    blank = state(architecture)
    loaded = cora.load(path, architecture)
    assert_same_state(blank, state(architecture))
    assert_same_model(qmodel, loaded)
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), qmodel(x))
    assert not any(m.training for m in loaded.modules())
    for layer in loaded.modules():
        if isinstance(layer, cora.QuantLayer):
            twin = layer.packed_weight().qparams
            assert torch.equal(twin.scale.to(twin.scale_dtype).float(), twin.scale)
    assert qmodel.report.totals["total_bits"] == pytest.approx(tensor_bits(path), rel=0.01)
    cora.save(loaded, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_kind(name: str, tmp_path: Path) -> None:
    layer, x = make_layer(name)
    qmodel = quantize(layer, x, rank_budget=1.0, activation_bits=8)
    cora.save(qmodel, tmp_path / "m")
    loaded = cora.load(tmp_path / "m", make_layer(name)[0])
    assert type(loaded) is type(qmodel) and torch.equal(loaded(x), qmodel(x))
    assert qmodel.report.totals["total_bits"] == tensor_bits(tmp_path / "m")


def tensor_bits(path: Path) -> int:
    """Bits of the file behind its header."""
    with path.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return 8 * (path.stat().st_size - 8 - header)


@pytest.mark.parametrize("bits", [3, 7, 8])
@pytest.mark.parametrize("offset", [3.0, -3.0, 1e6])
def test_zero_points_outside_the_codes(bits: int, offset: float, tmp_path: Path) -> None:
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.add_(offset)
    qmodel = quantize(layer, torch.randn(20, 16), QuantSpec(bits, clip="minmax"), rank_budget=0)
    zero = qmodel.zero_point
    assert ((zero < 0) | (zero >= 2**bits)).any()
    cora.save(qmodel, tmp_path / "m")
    loaded = cora.load(tmp_path / "m", layer)
    assert torch.equal(loaded.zero_point, zero)
    assert qmodel.report.totals["total_bits"] == tensor_bits(tmp_path / "m")


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for run in "ab":
        torch.manual_seed(ord(run))
        config = SearchConfig("gate", iterations=12)
        cora.save(quantize(trained_net(), search=config, activation_bits=8), tmp_path / run)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_report_comes_back(qnet: nn.Module, file: Path) -> None:
    report, loaded = qnet.report, cora.load(file, Net()).report
    assert loaded.totals == report.totals and loaded.settings == report.settings
    assert loaded.search["ranks"] == report.search["ranks"]
    assert [layer.stored_bits for layer in loaded.layers] == [
        layer.stored_bits for layer in report.layers
    ]
    assert str(loaded) == str(report)
    assert cora.serialization.read_header(file)["report"]["totals"] == report.totals
    stripped = copy.deepcopy(qnet)
    del stripped.report
    cora.save(stripped, file)
    assert not hasattr(cora.load(file, Net()), "report")


# --- Architectures -------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding used twice under two names, a weight that float and packed modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(9, 6), nn.Embedding(9, 6)
        self.decoder.weight = self.encoder.weight
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.encoder.weight
        self.register_buffer("offset", torch.ones(6))
        self.register_buffer("part", self.offset[:3])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.middle(self.encoder(tokens) * self.offset + self.decoder(tokens))
        return self.head(x) + self.part.sum()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [None, 5])
def test_tied_weights_and_meta_architectures(
    device: str, dtype: torch.dtype, bits: int | None, tmp_path: Path
) -> None:
    model, tokens = Tied(), torch.randint(0, 9, (12, 4))
    with torch.no_grad():
        model.offset.copy_(torch.arange(6.0))
    qmodel = quantize(model, tokens, rank_budget=0.3, embedding_bits=bits)
    cora.save(qmodel, tmp_path / "m")
    with torch.device(device):
        architecture = Tied().to(dtype)
    loaded = cora.load(tmp_path / "m", architecture)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert all(t.is_meta == (device == "meta") for t in architecture.state_dict().values())
    assert torch.equal(loaded(tokens), qmodel(tokens))
    assert len(qmodel.report.by_rows) == (0 if bits is None else 1)
    if bits is None:
        assert loaded.decoder.weight is loaded.encoder.weight
    else:
        assert loaded.decoder is loaded.encoder and qmodel.decoder is qmodel.encoder


def test_recurrent_layers_on_the_meta_device(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 4, bidirectional=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    x = torch.randn(10, 5, 6)
    qmodel = quantize(Recurrent(), x, rank_budget=0.3)
    cora.save(qmodel, tmp_path / "m")
    with torch.device("meta"):
        architecture = Recurrent()
    assert torch.equal(cora.load(tmp_path / "m", architecture)(x), qmodel(x))


def test_a_buffer_that_the_file_cannot_hold(qnet: nn.Module, file: Path) -> None:
    with torch.device("meta"):
        architecture = Net()
        architecture.register_buffer("positions", torch.arange(4), persistent=False)
    with pytest.raises(ValueError, match="positions .*meta"):
        cora.load(file, architecture)


def stem(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(
        **{
            "in_channels": 3,
            "out_channels": 12,
            "kernel_size": 3,
            "padding": 1,
            "bias": False,
            **options,
        }
    )


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("head", nn.Linear(16, 7), r"layer 'head' is Linear \[5, 16\] .* has Linear \[7, 16\]"),
        ("head", nn.Linear(16, 5, bias=False), "layer 'head'.*bias"),
        ("head", nn.Identity(), "layer 'head' is Linear .* has Identity"),
        ("head", None, "layer 'head' is Linear .* has nothing"),
        ("body", nn.Conv2d(16, 16, 3), "layer 'body.0' .* has nothing"),
        ("stem", stem(stride=2), "layer 'stem'.*stride"),
        ("stem", stem(in_channels=6, groups=2), "layer 'stem'.*groups"),
        ("stem", stem(padding_mode="reflect"), "layer 'stem'.*padding_mode"),
        ("norm", nn.Identity(), "'norm' is a batch norm in the file, the model has Identity"),
        ("norm", None, "'norm' is a batch norm in the file, the model has nothing"),
        ("extra", nn.Linear(3, 3), "lacks extra.bias, extra.weight"),
    ],
)
def test_other_architectures(file: Path, name: str, module: nn.Module | None, message: str) -> None:
    net = Net()
    setattr(net, name, module)
    with pytest.raises(ValueError, match=f"of another architecture: .*{message}"):
        cora.load(file, net)


def test_a_packed_model_is_no_architecture(qnet: nn.Module, file: Path) -> None:
    with pytest.raises(ValueError, match="model has QuantConv2d"):
        cora.load(file, qnet)


# --- Damaged and foreign files -------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """The file with its header and tensors edited, in safetensors' own form."""
    with safetensors.safe_open(path, framework="pt") as stream:
        header = _decode(stream.metadata()["cora"])
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    change(header, tensors)
    safetensors.torch.save_file(tensors, path, {"cora": _encode(header)})


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{file.name}: not a whole safetensors file"):
        cora.load(file, Net())


def test_any_flipped_byte_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    padding = len(header) - len(header.rstrip())
    positions = [
        0,
        7,
        9,
        8 + length // 2,
        8 + length - padding - 2,
        8 + length,
        8 + length + 500,
        len(content) - 1,
    ]
    generator = torch.Generator().manual_seed(0)
    positions += torch.randint(8, len(content), (60,), generator=generator).tolist()
    for position in positions:
        if 8 + length - padding <= position < 8 + length:
            continue  # blanks behind the header hold nothing
        damaged = bytearray(content)
        damaged[position] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=file.name):
            cora.load(file, Net())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format=3), "format version 2 was expected, got 3"),
        (lambda h, t: h.update(format="2"), "format version 2 was expected, got '2'"),
        (lambda h, t: h.pop("format"), "header was altered or damaged"),
        (lambda h, t: h.pop("sha256"), "checksum does not match"),
        (lambda h, t: h["layers"].pop("head"), "checksum does not match"),
        (lambda h, t: h["report"]["totals"].update(total_bits=1), "checksum does not match"),
        (lambda h, t: t.pop("head.codes"), "checksum does not match"),
        (lambda h, t: t.update(more=torch.ones(1)), "checksum does not match"),
        (
            lambda h, t: t.update({"stem.bias": t["stem.bias"].half()}),
            "checksum does not match",
        ),
        (lambda h, t: t.update({"head.scale": t["head.scale"] * 2}), "checksum does not match"),
    ],
)
def test_tampered(file: Path, change: Callable[..., Any], message: str) -> None:
    rewrite(file, change)
    with pytest.raises(ValueError, match=f"{file.name}: .*{message}"):
        cora.load(file, Net())


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="a safetensors file, but not one that cora.save wrote"):
        cora.load(path, Net())
    for content in ("[]", "{", "", "bnVsbA==", *(_encode(x) for x in ([], 3, "x", None))):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"cora": content})
        with pytest.raises(ValueError, match="header was altered or damaged"):
            cora.load(path, Net())
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"cora": '{"format":1}'})
    with pytest.raises(ValueError, match="format version 2 was expected, got 1"):
        cora.load(path, Net())
    torch.save(Net().state_dict(), path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        cora.load(path, Net())
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            cora.load(missing, Net())
    for model in (None, Net):
        with pytest.raises(TypeError, match="model must be an nn.Module, the float architecture"):
            cora.load(path, model)


# --- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_nothing_half_written(
    qnet: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    error: BaseException,
) -> None:
    def fail(*_args: Any) -> None:
        raise error

    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        cora.save(qnet, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    cora.save(qnet, path)
    assert list(tmp_path.iterdir()) == [path] and cora.load(path, Net()) is not None


def test_save_errors(qnet: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qmodel: expected a model with packed layers, found none"):
        cora.save(Net(), tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="the folder .*nowhere does not exist"):
        cora.save(qnet, tmp_path / "nowhere" / "m")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder: expected a file, this is a folder"):
        cora.save(qnet, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_file_takes_the_umask(qnet: nn.Module, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        cora.save(qnet, tmp_path / "m")
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640
