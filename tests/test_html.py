"""Reports as pages: whole, self-contained, escaped, the same each time."""

from __future__ import annotations

import builtins
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cora
from cora.tables import comparison_table, format_metric, metrics_of, text_table

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def report() -> cora.Report:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.Flatten(),
    ).append(nn.Linear(12 * 36, 4))
    calibration = cora.Calibration(model, [torch.randn(8, 3, 10, 10)], 8, fold_bn=False)
    search = cora.SearchConfig("gate", iterations=6, batch_size=4)
    qmodel = cora.quantize(
        model,
        calibration,
        cora.QuantSpec(bits=2),
        search=search,
        tune=cora.TuneConfig(iterations=6),
        progress=False,
    )
    cora.compare(model, calibration, qmodel, progress=False)
    return qmodel.report


class Checker(HTMLParser):
    """Balanced tags, and nothing fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                assert value is not None and value.startswith("data:image/")
                self.images += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> int:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == [] and "<script" not in page
    return checker.images


def test_page_is_whole_and_self_contained(report: cora.Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.to_html(path)
    page = path.read_text()
    assert check(page) == 5  # comparison, ranks, spectra, search, tuning
    for layer in report.layers:
        assert f"<td>{layer.name}</td>" in page
    assert "BatchNorm2d" in page and "searched ranks" in page
    assert path.stat().st_mode & 0o444 and list(tmp_path.iterdir()) == [path]


def test_same_report_same_bytes(report: cora.Report, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        report.to_html(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_report_of_a_file_has_no_spectra(report: cora.Report, tmp_path: Path) -> None:
    values = report.to_dict()
    values["search"]["history"] = values["search"]["tuning"]["history"] = []
    for layer in values["layers"]:
        layer["spectrum"] = []
    cora.Report.from_dict(values).to_html(tmp_path / "r.html")
    assert check((tmp_path / "r.html").read_text()) == 2


def test_many_layers_and_odd_values(report: cora.Report, tmp_path: Path) -> None:
    values = report.to_dict()
    values["layers"] = [{**values["layers"][0], "name": f"layer{i}"} for i in range(70)]
    values["layers"][3] |= {"residual_after": 0.0, "sqnr_db": float("inf"), "spectrum": [0.0, 0.0]}
    values["layers"][4] |= {"spectrum": [1.0]}
    values["search"]["history"][0]["loss"] = 0.0
    values["comparison"] = []
    cora.Report.from_dict(values).to_html(tmp_path / "r.html")
    assert check((tmp_path / "r.html").read_text()) == 4  # ranks, spectra, search, tuning


def test_everything_is_escaped(report: cora.Report, tmp_path: Path) -> None:
    values = report.to_dict()
    nasty = "<b>&\"'"
    values["layers"][0]["name"] = values["comparison"][0]["row"] = nasty
    values["settings"]["skip"] = [nasty]
    cora.Report.from_dict(values).to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    check(page)
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_matplotlib_missing_is_said(
    report: cora.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.to_html(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(report: cora.Report, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.to_html(tmp_path / "none" / "r.html")


def test_tables() -> None:
    rows = [
        {"row": "float", "bits_per_weight": 32.0, "total_bits": 8192, "top1": 0.5, "kl": 0.0},
        {"row": "x", "bits_per_weight": 3.0, "total_bits": 819.2, "kl": 0.25, "samples": 3.0},
    ]
    assert metrics_of(rows) == ["top1", "kl"]
    assert metrics_of([{"kl": 1, "mine": 2, "f1": 3}]) == ["mine", "f1", "kl"]
    head, cells = comparison_table(rows)
    assert head == ["", "bits/weight", "KiB", "top1", "kl"]
    assert cells[1] == ["x", "3.00", "0.1", "-", "0.25"]
    lines = text_table(head, cells).splitlines()
    assert len(lines) == 4 and re.fullmatch(r"float +32\.00 +1\.0 +50\.00 % +0", lines[2])
    assert format_metric("relative_error", 1e-9) == "1e-09"
