"""pytest tests/test_report_page.py: the page holds what the report says, and nothing to load."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.code_counts import BINS_PER_OCTAVE, CodeCounts
from quant.config import QuantConfig
from quant.grid import QuantizedTensor, fit_minmax, nearest_codes
from quant.pipeline import quantize_checkpoint
from quant.report import Report
from quant.report_page import add_evaluation, write_page
from quant.report_page.charts import Axis
from tests.test_cli import cli

Make = Callable[..., Path]
VOID = {"meta", "link", "br", "hr", "img", "input"}
MEASURED: dict[str, Any] = {
    "data": "/home/someone/text.txt",
    "sha256": "0" * 12,
    "bos": True,
    "precision": "exact",
    "perplexity": 12.3456,
    "windows": 5,
    "window": 64,
    "scored_tokens": 315,
    "reference": None,
}


class Page(HTMLParser):
    """Tags must be closed in order; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def quantized(make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path) -> Path:
    quantize_checkpoint(make_checkpoint(), tmp_path / "out", windows, QuantConfig(4, 64))
    return tmp_path / "out"


def page_of(folder: Path) -> Page:
    return Page((folder / "quantize_report.html").read_text(encoding="utf-8"))


def change(folder: Path, **values: Any) -> None:
    """Overwrite entries of the report."""
    file = folder / "quantize_report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_run_writes_a_page_that_loads_nothing(quantized: Path) -> None:
    page, report = page_of(quantized), Report.read(quantized)
    assert "//" not in (quantized / "quantize_report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert "url(" not in page.text and "@import" not in page.text
    for linear in report.linears:
        assert linear.name.removeprefix("model.layers.") in page.text
        assert f"{linear.relative_error:.3e}" in page.text
        assert f"{linear.rtn_relative_error:.3e}" in page.text
    assert "cli.py eval --ppl --model out" in page.text
    assert ("Nothing to note" in page.text) == (not report.warnings)


def test_every_chart_says_what_it_shows(quantized: Path) -> None:
    text = (quantized / "quantize_report.html").read_text(encoding="utf-8")
    charts = re.findall(r"<svg ([^>]*)>", text)
    labels = [re.search(r'role="img" aria-label="([^"]{20,})"', chart) for chart in charts]
    assert sum(label is not None for label in labels) == 12  # 8 errors, 2 histograms, 2 costs
    assert all(label or 'aria-hidden="true"' in c for label, c in zip(labels, charts, strict=True))


def test_what_each_layer_took_is_kept(quantized: Path) -> None:
    report = Report.read(quantized)
    assert len(report.layers) == 2
    assert 0 < sum(layer["seconds"] for layer in report.layers) <= report.seconds
    peaks = [layer["peak_memory_bytes"] for layer in report.layers]
    if report.peak_memory_bytes is not None:
        assert 0 < peaks[0] <= peaks[1] <= report.peak_memory_bytes


def test_notes_and_damping_are_shown(quantized: Path) -> None:
    linears = json.loads((quantized / "quantize_report.json").read_text())["linears"]
    linears[3] |= {"damp": 0.1, "notes": ["Cholesky failed in float64; damping raised to 0.1"]}
    linears[4] |= {"relative_error": 0.5, "rtn_relative_error": 0.25}
    change(quantized, linears=linears)
    write_page(quantized)
    text = page_of(quantized).text
    assert "damping raised to 0.1" in text
    assert "relative error 0.5 is above round-to-nearest's 0.25" in text


def test_an_evaluation_is_added_and_replaced(quantized: Path) -> None:
    assert add_evaluation(quantized, MEASURED) == quantized / "quantize_report.html"
    assert "12.3456" in page_of(quantized).text and "/home/someone" not in page_of(quantized).text
    add_evaluation(quantized, {**MEASURED, "perplexity": 11.25})
    add_evaluation(quantized, {**MEASURED, "window": 32, "perplexity": 13.5})
    text = page_of(quantized).text
    assert "12.3456" not in text and "11.2500" in text and "13.5000" in text
    assert len(Report.read(quantized).evaluations) == 2


def test_where_there_is_no_report_none_is_made(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    before = sorted(folder.iterdir())
    assert add_evaluation(folder, MEASURED) is None
    assert sorted(folder.iterdir()) == before


def test_hostile_names_are_text(quantized: Path) -> None:
    evil = "<script>alert('x')</script>\"><svg onload=alert(1)>"
    report = json.loads((quantized / "quantize_report.json").read_text())
    for linear in report["linears"]:
        linear["name"] += evil
        linear["notes"] = [evil]
    settings = {**report["settings"], evil: evil, "solver": evil}
    texts = {"versions": {evil: evil}, "calibration": {**report["calibration"], "source": evil}}
    evaluations = [{**MEASURED, "data": evil, "precision": evil}]
    tags = set(page_of(quantized).tags)
    change(
        quantized,
        **{"linears": report["linears"], "settings": settings, **texts},
        **{"model": evil, "output": evil, "evaluations": evaluations},
    )
    write_page(quantized)
    page = page_of(quantized)
    assert "script" not in page.tags and set(page.tags) <= tags | {"table", "td"}
    assert "onload" not in {name for name, _ in page.attributes}
    assert evil in page.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linears": [{"name": "x"}]}, "not a report of this version"),
        ({"linears": 5}, "not a report of this version"),
        ({"other": 5}, "not a report of this version"),
        ({"settings": {}}, "damaged"),
        ({"layers": [{"seconds": "a"}]}, "damaged"),
        ({"evaluations": [{}]}, "damaged"),
    ],
)
def test_a_damaged_report_is_refused(
    quantized: Path, changed: dict[str, Any], message: str
) -> None:
    change(quantized, **changed)
    with pytest.raises(ValueError, match=message):
        write_page(quantized)


def test_an_older_report_still_makes_a_page(quantized: Path) -> None:
    """Without counts, layers and evaluations, which were not kept at first; with a step at the end
    and an option of the solver that there were once.
    """
    report = json.loads((quantized / "quantize_report.json").read_text())
    report |= {"tuning": {"windows": 7, "held_out": 1, "before": 0.2, "after": [0.1], "kept": True}}
    report["settings"] |= {"tuning": 2}
    for linear in report["linears"]:
        del linear["counts"]
    del report["layers"], report["evaluations"]
    (quantized / "quantize_report.json").write_text(json.dumps(report))
    write_page(quantized)
    assert "Codes and scales" not in page_of(quantized).text
    assert Report.read(quantized).settings["tuning"] == 2


def test_the_report_command_and_eval(quantized: Path, tmp_path: Path) -> None:
    (quantized / "quantize_report.html").unlink()
    run = cli("report", "out", cwd=tmp_path)
    assert run.returncode == 0 and run.stdout == f"report: {Path('out/quantize_report.html')}\n"
    (tmp_path / "text.txt").write_text("some text to judge with\n" * 100)
    run = cli(*"eval --model out --data text.txt --window 64 --json".split(), cwd=tmp_path)
    assert "report: " in run.stderr and json.loads(run.stdout)["perplexity"] > 1
    assert f"{json.loads(run.stdout)['perplexity']:.4f}" in page_of(quantized).text
    for folder, message in (("absent", "no such folder"), ("tiny", "has no quantize_report.json")):
        run = cli("report", folder, cwd=tmp_path)
        assert run.returncode == 2 and message in run.stderr and len(run.stderr.splitlines()) == 1


def test_eval_goes_on_where_the_report_is_damaged(quantized: Path, tmp_path: Path) -> None:
    change(quantized, settings={})
    (tmp_path / "text.txt").write_text("some text to judge with\n" * 100)
    run = cli(*"eval --model out --data text.txt --window 64".split(), cwd=tmp_path)
    assert run.returncode == 0 and "note: the result is not kept in the report" in run.stderr


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_counts_are_those_of_the_tensor(bits: int) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(bits))
    weight[:8] *= 100
    grid = fit_minmax(weight, QuantConfig(bits, 32))
    grid.scales[0, 0] *= -1
    qt = QuantizedTensor(nearest_codes(weight, grid), grid)
    counts = CodeCounts.of(qt)
    width = 16 if bits == 8 else 1
    codes = qt.codes.flatten().tolist()
    assert counts.codes == tuple(
        sum(code // width == i for code in codes) for i in range(2 ** min(bits, 4))
    )
    sizes = [
        math.floor(math.log2(abs(s)) * BINS_PER_OCTAVE) for s in grid.scales.flatten().tolist()
    ]
    assert counts.first == min(sizes) and counts.negative_scales == 1
    assert counts.scales == tuple(sizes.count(b) for b in range(min(sizes), max(sizes) + 1))
    twice = CodeCounts.total([counts, counts])
    assert twice.codes == tuple(2 * n for n in counts.codes) and twice.first == counts.first
    assert twice.scales == tuple(2 * n for n in counts.scales) and twice.negative_scales == 2


def test_axes_hold_their_values() -> None:
    for values in ([0.0], [3.0, 7.0], [1e-5, 0.3], [0.02, 0.021], [0.0, 1e-7], [5e8, 6e8]):
        for axis in (Axis.linear(values), Axis.logarithmic(values)):
            assert axis.high >= max(values) and 2 <= len(axis.ticks()) <= 9
            assert all(0 <= axis.place(value) <= 1 for value in values)
            assert axis.place(axis.low) == 0 and axis.place(axis.high) == 1
