"""Packed recurrent layers against torch's own with the weights dequantized by hand; in models, in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import cora
from cora import SearchConfig, ops
from cora.recurrent import QUANT_RECURRENT, QuantLSTM, QuantRecurrent, pack_recurrent
from cora.serialization import read_header

QUICK = {"progress": False, "tune": None, "propagate": False, "search": SearchConfig(iterations=2)}

LAYERS = [
    lambda **o: nn.LSTM(7, 5, **o),
    lambda **o: nn.LSTM(7, 6, 2, bidirectional=True, proj_size=3, **o),
    lambda **o: nn.LSTM(7, 5, bias=False, batch_first=True, **o),
    lambda **o: nn.GRU(7, 5, 2, **o),
    lambda **o: nn.GRU(7, 5, bidirectional=True, **o),
    lambda **o: nn.RNN(7, 5, nonlinearity="relu", **o),
]


def dequantized(layer: QuantRecurrent) -> dict[str, Tensor]:
    found = {}
    for name in layer.scale_dtypes:
        codes = ops.unpack_bits(
            layer.get_buffer(f"{name}_codes"), layer.bits, layer.get_buffer(name).shape[1]
        )
        zero = layer.get_buffer(f"{name}_zero_point")
        found[name] = layer.get_buffer(f"{name}_scale") * (codes.float() - zero)
    return found


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for part in output for t in flat(part)]


def same(a: Any, b: Any) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_as_torch_with_the_same_weights(make: Any, bits: int) -> None:
    torch.manual_seed(bits)
    layer = make().eval()
    before = copy.deepcopy(layer.state_dict())
    packed = QUANT_RECURRENT[type(layer)].from_float(layer, bits)
    assert isinstance(packed, type(layer))  # whoever asks is told what it is
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    twin = make().eval()
    twin.load_state_dict({**before, **dequantized(packed)})
    x = torch.randn(4, 6, 7)
    with torch.no_grad():
        same(packed(x), twin(x))
        same(packed.to_float()(x), twin(x))
        same(copy.deepcopy(packed)(x), twin(x))
        if not layer.batch_first:
            ragged = pack_sequence([torch.randn(5, 7), torch.randn(2, 7)])
            same(packed(ragged)[0].data, twin(ragged)[0].data)
    packed.flatten_parameters()  # as models do before each call
    assert type(packed.to_float()) is type(layer)
    assert packed.to_float().state_dict().keys() == before.keys()
    error = max(
        float((dequantized(packed)[n] - before[n]).abs().max()) for n in packed.scale_dtypes
    )
    if bits == 8:
        assert error < 0.01


def test_other_dtypes_and_states() -> None:
    packed = QuantLSTM.from_float(nn.LSTM(7, 5), 4)
    state = copy.deepcopy(packed.state_dict())
    assert not {"weight_ih_l0", "weight_hh_l0"} & state.keys()
    packed.double()
    x = torch.randn(3, 2, 7)
    assert packed(x.double())[0].dtype == torch.float64
    assert packed.weight_ih_l0_scale.dtype == torch.float32
    packed.float()
    other = QuantLSTM.from_float(nn.LSTM(7, 5), 4)
    other.load_state_dict(packed.state_dict())
    with torch.no_grad():
        same(other(x), packed(x))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)
        self.gru, self.head = nn.GRU(12, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        return self.head(self.gru(self.lstm(self.conv(x).relu().transpose(1, 2))[0])[0])


def test_in_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Reader().eval(), torch.randn(48, 3, 9)
    qmodel = cora.quantize(model, x, target_bits=6, recurrent_bits=6, activation_bits=8, **QUICK)
    report = qmodel.report
    names = [row.name for row in report.by_rows]
    assert len(names) == 2 * 4 + 2 and {"lstm.weight_hh_l1_reverse", "gru.weight_ih_l0"} <= set(
        names
    )
    assert {(row.kind, row.bits) for row in report.by_rows} == {("LSTM", 6), ("GRU", 6)}
    assert all(0 < row.weight_error < 1e-2 for row in report.by_rows)
    assert {e.name: e.reason for e in report.float_entries} == {"lstm": "biases", "gru": "biases"}
    with torch.no_grad():
        found = qmodel(x)
        same(cora.fuse(qmodel, x[:2])(x), found)
        expected = model(x)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    path = tmp_path / "m"
    cora.save(qmodel, path)
    assert read_header(path)["recurrent"].keys() == {"lstm", "gru"}
    stored = 8 * (path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little"))
    assert stored == report.totals["total_bits"]
    for device in ("cpu", "meta"):
        with torch.device(device):
            architecture = Reader()
        loaded = cora.load(path, architecture)
        assert isinstance(loaded.lstm, QuantLSTM)
        with torch.no_grad():
            assert torch.equal(loaded(x), found)
        cora.save(loaded, tmp_path / "again")
        assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_left_float() -> None:
    model, x = Reader().eval(), torch.randn(24, 3, 9)
    qmodel = cora.quantize(model, x, target_bits=6, skip=["gru"], **QUICK)
    with torch.no_grad():
        torch.testing.assert_close(cora.dequantize(qmodel)(x), qmodel(x), atol=1e-5, rtol=1e-4)
    assert type(qmodel.gru) is nn.GRU and type(qmodel.lstm) is QuantLSTM
    qmodel = cora.quantize(model, x, target_bits=6, recurrent_bits=None, **QUICK)
    assert type(qmodel.lstm) is nn.LSTM and qmodel.report.by_rows == []


def test_bad_input(tmp_path: Path) -> None:
    model, x = Reader().eval(), torch.randn(24, 3, 9)
    with pytest.raises(ValueError, match="recurrent_bits must be None or 2..8, got 1"):
        cora.quantize(model, x, recurrent_bits=1, **QUICK)
    with pytest.raises(TypeError, match="QuantLSTM.from_float: got a layer of GRU"):
        QuantLSTM.from_float(model.gru)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lstm.weight_hh_l0[0, 0] = torch.inf
    with pytest.raises(ValueError, match="lstm.weight_hh_l0: weight must be finite"):
        pack_recurrent(broken, 8)
    cora.save(cora.quantize(model, x, target_bits=6, **QUICK), tmp_path / "m")
    other = Reader()
    other.gru = nn.GRU(12, 6, 2, batch_first=True)
    with pytest.raises(ValueError, match=r"layer 'gru' is GRU .* in the file, the model has GRU"):
        cora.load(tmp_path / "m", other)
    other.gru = None
    with pytest.raises(ValueError, match=r"layer 'gru' is GRU .* the model has nothing"):
        cora.load(tmp_path / "m", other)
