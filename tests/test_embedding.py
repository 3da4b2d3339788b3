"""Packed embeddings against rows dequantized by hand, in models, in files, in reports."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cora
from cora import SearchConfig, ops
from cora.embedding import QuantEmbedding, pack_embeddings
from cora.serialization import read_header

QUICK = {"progress": False, "tune": None, "propagate": False, "search": SearchConfig(iterations=2)}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (50, 64)])
def test_lookup(bits: int, rows: int, columns: int) -> None:
    torch.manual_seed(bits)
    embedding = nn.Embedding(rows, columns)
    packed = QuantEmbedding.from_float(embedding, bits)
    codes = ops.unpack_bits(packed.codes, bits, columns).double()
    expected = (packed.scale.double() * (codes - packed.zero_point)).float()
    torch.testing.assert_close(packed.weight, expected, atol=1e-7, rtol=1e-6)
    for shape in ((), (4,), (2, 3), (0,), (2, 0, 3)):
        ids = torch.randint(0, rows, shape)
        found = packed(ids)
        assert torch.equal(found, packed.weight[ids]) and found.shape == (*shape, columns)
    span = embedding.weight.amax(1) - embedding.weight.amin(1)
    worst = (packed.weight - embedding.weight).abs().amax(1)
    if bits == 8:  # the range with the least error is all of it
        assert bool((worst <= span / 255 * 0.51 + 1e-6 + 1e-3 * span).all())
    weight = embedding.weight.detach()
    error = (packed.weight - weight).square().sum() / weight.square().sum()
    assert float(error) < 0.3 * 4.0 ** (2 - bits)


def test_rows_that_are_constant_stay_exact() -> None:
    embedding = nn.Embedding(5, 16, padding_idx=2)
    with torch.no_grad():
        embedding.weight[3] = 0.25
    packed = QuantEmbedding.from_float(embedding, 2)
    assert not packed.weight[2].any() and bool((packed.weight[3] == 0.25).all())
    assert packed.padding_idx == packed.to_float().padding_idx == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    packed = QuantEmbedding.from_float(nn.Embedding(9, 6), 4)
    ids, before = torch.arange(9), copy.deepcopy(packed.state_dict())
    rows = packed(ids)
    packed.to(dtype)
    assert packed(ids).dtype == dtype and torch.equal(packed(ids), rows.to(dtype))
    assert all(torch.equal(value, before[key]) for key, value in packed.state_dict().items())
    assert packed.scale.dtype == torch.float32
    half = QuantEmbedding.from_float(nn.Embedding(9, 6, dtype=dtype), 4)
    assert half(ids).dtype == dtype


def test_compiles() -> None:
    packed = QuantEmbedding.from_float(nn.Embedding(9, 6), 3)
    ids = torch.tensor([[1, 8], [0, 3]])
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), packed(ids))


@pytest.mark.parametrize("bits", [0, 1, 9, True, 4.5, "8"])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ValueError, match="embedding_bits must be None or 2..8, got"):
        QuantEmbedding.from_float(nn.Embedding(3, 3), bits)
    with pytest.raises(ValueError, match="embedding_bits must be None or 2..8, got"):
        cora.quantize(Bag(), torch.randint(0, 23, (8, 5)), embedding_bits=bits, progress=False)


class Bag(nn.Module):
    """Words and places, summed: both embeddings packed, a third one that changes its rows not."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(23, 16), nn.Embedding(5, 16)
        self.normed = nn.Embedding(23, 16, max_norm=1.0)
        self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 23, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1])) + self.normed(tokens)
        return self.head(self.middle(x).relu().mean(1))


def test_in_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = Bag().eval(), torch.randint(0, 23, (64, 5))
    qmodel = cora.quantize(model, tokens, target_bits=6, embedding_bits=6, **QUICK)
    kinds = {name: type(m) for name, m in qmodel.named_modules()}
    assert kinds["words"] is kinds["places"] is QuantEmbedding
    assert kinds["normed"] is nn.Embedding and kinds["head"] is cora.QuantLinear
    report = qmodel.report
    assert [(e.name, e.rows, e.columns, e.bits) for e in report.by_rows] == [
        ("words", 23, 16, 6), ("places", 5, 16, 6),
    ]  # fmt: skip
    assert [entry.name for entry in report.float_entries] == ["normed"]
    totals = report.totals
    assert totals["row_bits"] == sum(e.stored_bits for e in report.by_rows)
    assert all(0 < e.weight_error < 1e-2 for e in report.by_rows)
    assert totals["bits_per_weight"] < 8  # embeddings are not among its weights
    lines = str(report).splitlines()
    assert any("words" in line and "23x16" in line and " dB" in line for line in lines)
    with torch.no_grad():
        found, oracle = qmodel(tokens), cora.dequantize(qmodel)(tokens)
    torch.testing.assert_close(found, oracle, atol=1e-5, rtol=1e-4)
    path = tmp_path / "m.safetensors"
    cora.save(qmodel, path)
    header = read_header(path)
    stored = 8 * (path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little"))
    assert stored == totals["total_bits"] and set(header["embeddings"]) == {"words", "places"}
    loaded = cora.load(path, Bag())
    with torch.no_grad():
        assert torch.equal(loaded(tokens), found)
    assert loaded.report.by_rows == report.by_rows
    cora.save(loaded, tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_left_float() -> None:
    model, tokens = Bag().eval(), torch.randint(0, 23, (32, 5))
    qmodel = cora.quantize(model, tokens, target_bits=6, skip=["w*"], **QUICK)
    assert [e.name for e in qmodel.report.by_rows] == ["places"]
    why = {entry.name: entry.reason for entry in qmodel.report.float_entries}
    assert why["words"] == "named in skip"
    qmodel = cora.quantize(model, tokens, target_bits=6, embedding_bits=None, **QUICK)
    assert qmodel.report.by_rows == [] and torch.equal(qmodel.words.weight, model.words.weight)


def test_bad_weights_are_named() -> None:
    model = Bag()
    with torch.no_grad():
        model.places.weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match="places: weight must be finite, got NaN or inf"):
        pack_embeddings(model, 8)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model, tokens = Bag().eval(), torch.randint(0, 23, (32, 5))
    cora.save(cora.quantize(model, tokens, target_bits=6, **QUICK), tmp_path / "m")
    other = Bag()
    other.places = nn.Embedding(6, 16)
    message = (
        r"layer 'places' is Embedding \[5, 16\] in the file, the model has Embedding \[6, 16\]"
    )
    with pytest.raises(ValueError, match=message):
        cora.load(tmp_path / "m", other)
    other.places = None
    with pytest.raises(ValueError, match="the model has nothing"):
        cora.load(tmp_path / "m", other)
