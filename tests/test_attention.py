"""Split attention against torch's own, alone and in torch's transformers; packed and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import quantize
from torch import Tensor, nn

import cora
from cora import Calibration, QuantLinear, SearchConfig
from cora.attention import SplitAttention, split_attention

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(**{"embed_dim": 24, "num_heads": 3, **options}).eval()
    for parameter in layer.parameters():  # biases begin as zeros
        nn.init.normal_(parameter, std=0.2)
    return layer


@pytest.mark.parametrize(
    "options",
    [
        {}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 7, "batch_first": True},
        {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True},
        {"num_heads": 1}, {"dropout": 0.3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "masks", ["none", "attention", "heads", "padding", "both", "floats", "causal"]
)
@pytest.mark.parametrize("weights", ["no weights", "mean", "every head"])
def test_as_torch(options: dict[str, Any], masks: str, weights: str) -> None:
    layer = attention(**options)
    split = split_attention(copy.deepcopy(layer))
    assert isinstance(split, SplitAttention)
    n, length, source = 4, 5, 5 if masks == "causal" else 6
    sizes = [(n, length, 24), (n, source, layer.kdim), (n, source, layer.vdim)]
    inputs = [torch.randn(size) for size in sizes]
    if not layer.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    hidden = torch.rand(length, source) < 0.3
    hidden[:, 0] = False  # a row of which nothing is seen has no mean
    padding = torch.zeros(n, source, dtype=torch.bool)
    padding[1, -2:] = padding[3, -1] = True
    kwargs: dict[str, Any] = {
        "none": {},
        "attention": {"attn_mask": hidden},
        "heads": {"attn_mask": torch.randn(n * layer.num_heads, length, source)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "floats": {
            "attn_mask": torch.randn(length, source), "key_padding_mask": torch.randn(n, source),
        },
        "causal": {"attn_mask": torch.ones(length, source).triu(1).bool(), "is_causal": True},
    }[masks]  # fmt: skip
    kwargs |= {"need_weights": weights != "no weights", "average_attn_weights": weights == "mean"}
    with torch.no_grad():
        expected, expected_weights = layer(*inputs, **kwargs)
        found, found_weights = split(*inputs, **kwargs)
    torch.testing.assert_close(found, expected, **CLOSE)
    if weights == "no weights":
        assert found_weights is None
    else:
        torch.testing.assert_close(found_weights, expected_weights, **CLOSE)


def test_without_a_batch() -> None:
    layer = attention()
    split = split_attention(copy.deepcopy(layer))
    x, y = torch.randn(5, 24), torch.randn(7, 24)
    hidden = torch.tensor([False] * 5 + [True] * 2)
    with torch.no_grad():
        for found, expected in zip(
            split(x, y, y, key_padding_mask=hidden),
            layer(x, y, y, key_padding_mask=hidden),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_causal_needs_its_mask() -> None:
    x = torch.randn(2, 3, 24)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal, got None"):
        split_attention(attention(batch_first=True))(x, x, x, is_causal=True)


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(x.mean(1))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(24, 3, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        return self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True)


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformers_of_torch(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(batch_first).eval()
    tokens = torch.randint(0, 31, (6, 9))
    split = split_attention(copy.deepcopy(model))
    padding = torch.zeros(6, 9, dtype=torch.bool) if batch_first else None
    if padding is not None:
        padding[2, -3:] = True
    for masks in ({}, {"padding": padding}) if batch_first else ({},):
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with context():
                expected, found = model(tokens, **masks), split(tokens, **masks)
                # Where there is padding torch's own gives zeros, and only without gradients.
                if masks:
                    expected, found = expected[:2], found[:2]
                torch.testing.assert_close(found, expected, **CLOSE)


def test_all_projections_are_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = Encoder().eval(), torch.randint(0, 31, (96, 9))
    before = copy.deepcopy(model.state_dict())
    qmodel = cora.quantize(model, tokens, target_bits=5, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    packed = [name for name, m in qmodel.named_modules() if isinstance(m, QuantLinear)]
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    first = [f"encoder.layers.0.self_attn.{name}" for name in names]
    assert packed[:4] == first and len(packed) == 2 * 6 + 1
    assert {e.kind for e in qmodel.report.float_entries} == {"LayerNorm"}
    with torch.inference_mode():
        expected, found = model(tokens), qmodel(tokens)
        oracle = cora.dequantize(qmodel)(tokens)
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-3)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    cora.save(qmodel, tmp_path / "m")
    loaded = cora.load(tmp_path / "m", Encoder())
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), found)
    cora.save(loaded, tmp_path / "again")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "again").read_bytes()

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, 5)

    with pytest.raises(ValueError, match=r"its attention is encoder.layers.0.self_attn, .*none"):
        cora.load(tmp_path / "m", Other())


def test_quantized_inputs_and_masks() -> None:
    torch.manual_seed(0)
    model = Translator().eval()
    batches = [{"x": torch.randn(16, 7, 24), "y": torch.randn(16, 5, 24)} for _ in range(3)]
    qmodel = cora.quantize(
        model, batches, cora.QuantSpec(8), activation_bits=8, progress=False, tune=None,
        search=SearchConfig("gate", iterations=4),
    )  # fmt: skip
    with torch.no_grad():
        expected, found = model(**batches[0]), qmodel(**batches[0])
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_skipped_and_subclassed(tmp_path: Path) -> None:
    class Own(nn.MultiheadAttention):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = attention(batch_first=True), Own(24, 2, batch_first=True)
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x, x, x, need_weights=False)[0]
            return self.head(self.second(x, x, x)[0])

    model, x = Model().eval(), torch.randn(40, 5, 24)
    calibration = Calibration(model, x)
    assert "first.q_proj" in calibration.layers
    qmodel = quantize(model, calibration, skip=["first.*"], rank_budget=0)
    why = {entry.name: entry.reason for entry in qmodel.report.float_entries}
    assert why["first.q_proj"] == "named in skip"
    assert why["second"] == "Own reads its weights itself"
    cora.save(qmodel, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(cora.load(tmp_path / "m", Model())(x), qmodel(x))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.first.in_proj_weight[3, 3] += 1
    with pytest.raises(ValueError, match=r"layer 'first.q_proj' differs"):
        calibration.check(changed)


class Patches(nn.Module):
    """A vision transformer's first block and head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.kind, self.head = nn.Embedding(3, 24), nn.Linear(24, 5)

    def forward(self, image: Tensor, kind: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.kind(kind)[:, None]
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


def test_fused() -> None:
    torch.manual_seed(0)
    model = Patches().eval()
    batches = [{"image": torch.randn(32, 3, 16, 16), "kind": torch.randint(0, 3, (32,))}]
    options = {"activation_bits": 8, "progress": False, "tune": None}
    qmodel = cora.quantize(model, batches, target_bits=5, **options)
    fast = cora.fuse(qmodel, batches[0])
    lines = {line.split()[0]: line for line in str(fast).splitlines()}
    assert (
        "quantize + Linear + add" in lines["attention.out_proj"]
        and "QuantEmbedding" in lines["kind_1"]
    )
    with torch.no_grad():
        expected, found = qmodel(**batches[0]), fast(**batches[0])
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_model_that_reads_the_weights_itself() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention(batch_first=True), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            mean = x @ self.attention.in_proj_weight.mean(0)
            return self.head(self.attention(x, x, x)[0] + mean[..., None])

    model, x = Own().eval(), torch.randn(24, 5, 24)
    calibration = Calibration(model, x)
    assert list(calibration.layers) == ["head"] and not calibration.restructured
    calibration.check(model)
    qmodel = quantize(model, calibration, rank_budget=0)
    assert type(qmodel.attention) is nn.MultiheadAttention
    why = {entry.name: entry.reason for entry in qmodel.report.float_entries}
    assert why["attention"] == "MultiheadAttention reads its weights itself"
