"""pytest tests/test_bench.py: what is timed is what it says, and the report adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant.bench import bench_kernels
from quant.contenders import CONTENDERS
from quant.grid import Grid, QuantizedTensor
from quant.roofline import plot

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_multiply_by_the_same_matrix(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 128), generator=generator, dtype=torch.uint8)
    scales = torch.rand(64, 2, generator=generator).half().float()
    qt = QuantizedTensor(codes, Grid(scales, torch.full((64, 2), 8, dtype=torch.uint8), 4))
    x = torch.randn(3, 128, generator=generator)
    expected = x @ qt.dequantize().T
    for mode in CONTENDERS[name].MODES:
        try:
            calls, size = CONTENDERS[name].build(mode, qt, 2)
        except ImportError as missing:
            pytest.skip(str(missing))
        assert len(calls) == 2 and size >= codes.numel() // 2
        for call in calls:
            result = call(x)
            y = torch.as_tensor(result[0] if isinstance(result, list) else result).float()
            assert (y - expected).norm() < 2e-2 * expected.norm(), mode


def test_figures_add_up(tmp_path: Path) -> None:
    machine = {"read_gb_s": 10.0, "sgemm_gflop_s": 100.0}
    rows = list(bench_kernels(machine, ((576, 64),), (1, 3), 0.001, rotated_bytes=40_000))
    assert {(row.m, row.cold) for row in rows} == {(1, True), (1, False), (3, True), (3, False)}
    for row in rows:
        assert row.group_size == 64
        assert row.gop_s == pytest.approx(2 * row.m * 576 * 64 / row.ms / 1e6, rel=0.02)
        roof = min(machine["sgemm_gflop_s"], row.gop_s / row.gb_s * machine["read_gb_s"])
        assert row.roof_share == pytest.approx(row.gop_s / roof, rel=0.1, abs=1e-3)
    pytest.importorskip("matplotlib")
    plot(machine, rows, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_command_lines(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "cli.py", "bench", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    bad = run("kernels", "--shapes", "100x64")
    assert bad.returncode == 2
    assert bad.stderr == (
        "error: --shapes 100x64: K 100 is not a multiple of 32, the smallest group\n"
    )
    assert "--rows: 'many' is not a positive number" in run("kernels", "--rows", "many").stderr
    file = tmp_path / "decode.json"
    bundled = str(ROOT / "quant" / "bundled")
    options = ["--prompt-tokens", "8", "--new-tokens", "2", "--threads", "1", "--json", str(file)]
    assert "tokens/s" in run("decode", "--model", bundled, *options).stdout
    report = json.loads(file.read_text())
    assert report["tokens_per_s"] > 0 and report["prefill_tokens_per_s"] > 0
    assert report["threads"] == 1 and report["new_tokens"] == 2
