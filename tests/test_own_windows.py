"""pytest tests/test_own_windows.py: what the model writes to calibrate on, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finish, start
from test_cli import cli
from test_resume import assert_same, content
from torch import Tensor
from transformers import LlamaForCausalLM

from calib.capture import Budget
from calib.hidden import Storage
from quant import QuantConfig, RunOptions, quantize_checkpoint
from quant import own_windows as module
from quant.checkpoint import llama_config
from quant.geometry import linear_shapes
from quant.llama.config import LlamaConfig
from quant.loader import load_model
from quant.own_windows import bits_in_memory, own_windows, piece_bytes, rows_at_a_time
from quant.plan import make_plan
from quant.room import check_room, fit_memory
from quant.solvers.gptq_options import GPTQOptions
from quant.sources import open_checkpoint
from quant.units import at_least
from quant.workload import Job

Make = Callable[..., Path]


def test_windows_are_continued_token_by_token(
    make_checkpoint: Make, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache, through transformers: an id where its share of [0, 1) holds the number
    drawn. Pieces of 20, each with 10 tokens of the text.
    """
    monkeypatch.setattr(module, "PIECE", 20)
    monkeypatch.setattr(module, "rows_at_a_time", lambda *given: 3)
    folder, text, said = make_checkpoint(), windows[:4, :40], []
    model = load_model(folder, "cpu")
    found = own_windows(model, text, 4, wrote=lambda *numbers: said.append(numbers))
    assert found.shape == (4, 40) and found.dtype == torch.int64
    assert said[0] == (3, 80) and said[-1] == (80, 80)
    draws = torch.rand(8, 10, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([text[:, 10:20], text[:, 20:30]])
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for draw in draws.split(1, dim=1):
        with torch.no_grad():
            upto = oracle(ids).logits[:, -1].double().softmax(-1).cumsum(-1)
        ids = torch.cat([ids, (upto <= draw).sum(-1, keepdim=True)], 1)
    assert torch.equal(found, ids.view(4, 40))
    assert torch.equal(found[1:3], own_windows(model, text, 4, slice(1, 3)))


def test_long_windows_are_made_of_pieces(make_checkpoint: Make, windows: Tensor) -> None:
    """Of 300 tokens: two of 150, that begin with 32 of the text."""
    model = load_model(make_checkpoint(), "cpu")
    text = torch.cat([windows, windows.flip(0)] * 3, 1)[:, :299]
    found = own_windows(model, text, 2)
    assert found.shape == (2, 299)
    assert torch.equal(found[0, :32], text[0, 133:165])
    assert torch.equal(found[0, 150:182], text[1, 133:165])
    assert torch.equal(found[1, 150:182], text[3, 133:165])


@pytest.mark.parametrize(("kv_heads", "rows"), [(2, 32), (1300, 25), (1 << 14, 16)])
def test_fewer_are_written_at_a_time_where_their_keys_take_much(kv_heads: int, rows: int) -> None:
    llama = LlamaConfig(64, 32, 48, 4, 4, kv_heads, 8)
    assert rows_at_a_time(llama, "cpu") == rows
    assert rows_at_a_time(llama, "cuda") == (256 if kv_heads == 2 else rows)


def test_damaged_models_are_told(make_checkpoint: Make, windows: Tensor) -> None:
    model = load_model(make_checkpoint(), "cpu", "float32")
    model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="own windows: the model's logits are not finite"):
        own_windows(model, windows, 1)


def test_a_run_keeps_them(make_checkpoint: Make, windows: Tensor, tmp_path: Path) -> None:
    """Stopped and resumed it reads them, whole, or writes them again; padding stays padding."""
    source, config = make_checkpoint(), QuantConfig(4, 64)
    solver, mask = GPTQOptions(own=3), torch.ones_like(windows)
    mask[0, 50:] = 0
    written: list[int] = []

    def run(name: str, **options: Any) -> None:
        options = RunOptions(on_write=lambda done, total: written.append(total), **options)
        quantize_checkpoint(source, tmp_path / name, windows, config, solver, options, mask)

    run("quiet")
    assert written.pop() == 3 * 32
    cases = ((1, 0, b"", 0), (1, 8, b"", 3 * 32), (1, 8, b"damaged.", 3 * 32), (0, 0, b"", 0))
    for layer, cut, end, again in cases:

        def stop(step: Any, layer: int = layer) -> None:
            if step.layer == layer:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run("out", on_step=stop, overwrite=True)
        kept = tmp_path / "out.partial" / "own-windows"
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) - cut] + end)
        written.clear()
        run("out", resume=True, overwrite=True)
        assert sum(written[-1:]) == again
        assert_same(tmp_path / "quiet", tmp_path / "out")
    plain = tmp_path / "plain"
    own = own_windows(load_model(source, "cpu", bits=bits_in_memory("cpu")), windows, 3)
    more = torch.stack([windows[:3], own], 1).flatten(0, 1)
    more, padding = torch.cat([more, windows[3:]]), torch.ones_like(own)
    mask = torch.cat([mask[:1], padding[:1], mask[1:2], padding[1:], mask[2:]])
    quantize_checkpoint(source, plain, more, config, attention_mask=mask)
    assert (plain / "model.safetensors").read_bytes() == (
        tmp_path / "quiet" / "model.safetensors"
    ).read_bytes()


def test_another_run_is_refused_before_anything_is_written(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one process and by two; and so are other windows than those that were written before."""
    source, config = make_checkpoint("source"), QuantConfig(4, 64)
    torch.save(windows, tmp_path / "windows.pt")

    def run(own: int, length: int = 64, **options: Any) -> None:
        text, solver = windows[:, :length], GPTQOptions(own=own)
        quantize_checkpoint(source, tmp_path / "out", text, config, solver, RunOptions(**options))

    def stop(step: Any) -> None:
        if step.layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(3, on_step=stop)
    partial = tmp_path / "out.partial"
    before, written = content(partial), []
    for arguments, told in (((2,), "own was 3, now 2"), ((3, 50), "windows was 8 x 64,.* 8 x 50")):
        with pytest.raises(ValueError, match=f"cannot be continued, .*{told}"):
            run(*arguments, resume=True, on_write=lambda *numbers: written.append(numbers))
        assert content(partial) == before and written == []
    body = """
    from quant import QuantConfig, GPTQOptions, RunOptions, quantize_checkpoint
    windows, again = torch.load(folder / "windows.pt"), RunOptions(resume=True)
    solver, config = GPTQOptions(own=5), QuantConfig(4, 64)
    quantize_checkpoint(folder / "source", folder / "out", windows, config, solver, again)
    """
    results = finish(start(body, 2, tmp_path))
    assert [code for code, _, _ in results] == [2, 2]
    assert [err.count("own was 3, now 5") for _, _, err in results] == [1, 0]
    assert content(partial) == before
    (partial / "own-windows").write_bytes(before["own-windows"][:-8] + b"damaged.")
    before = content(partial)
    monkeypatch.setattr(module, "_SEED", 1)
    with pytest.raises(ValueError, match="own-windows: is damaged, and .* writes other windows"):
        run(3, resume=True)
    assert content(partial) == before


def test_processes_write_the_same(make_checkpoint: Make, windows: Tensor, tmp_path: Path) -> None:
    """Two, with an odd number to write: the windows are those of one process."""
    torch.save(windows, tmp_path / "windows.pt")
    make_checkpoint("source")
    body = """
    from quant import QuantConfig, GPTQOptions, quantize_checkpoint
    windows = torch.load(folder / "windows.pt")
    solver = GPTQOptions(own=3)
    quantize_checkpoint(folder / "source", folder / "two", windows, QuantConfig(4, 64), solver)
    """
    results = finish(start(body, 2, tmp_path))
    assert [code for code, _, _ in results] == [0, 0], results
    quantize_checkpoint(
        tmp_path / "source", tmp_path / "one", windows, QuantConfig(4, 64), GPTQOptions(own=3)
    )
    one, two = (
        json.loads((tmp_path / name / "quantize_report.json").read_text())["calibration"]
        for name in ("one", "two")
    )
    assert one == two and one["windows"] == len(windows) + 3


def test_the_command_adds_them(tmp_path: Path) -> None:
    words = ["--samples", 4, "--seq-len", 64, "--own-windows", 3, "--effort", "fast"]
    planned = cli("quantize", "--output", tmp_path / "out", *words, "--plan", cwd=tmp_path)
    assert planned.returncode == 0 and "plan: 4 layers, 448 tokens" in planned.stdout
    reports = []
    for name in ("one", "two"):
        run = cli("quantize", "--output", tmp_path / name, *words, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert "256 tokens of stdlib and 192 of the model's own" in run.stdout
        reports.append(json.loads((tmp_path / name / "quantize_report.json").read_text()))
    assert reports[0]["calibration"] == reports[1]["calibration"]
    assert reports[0]["calibration"]["windows"] == 7
    names = ("one", "two")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in names]
    assert same[0] == same[1]


def test_plan_counts_what_is_written(
    make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operations a weight, and the model in memory, with 8 bits for a kernel of ours or as it
    is stored, and its keys and values.
    """
    llama = llama_config(open_checkpoint(make_checkpoint()))
    job = Job(llama, QuantConfig(4, 32), 8, 64, 2)
    one, more = make_plan(job), make_plan(replace(job, own=5))
    weights = llama.num_hidden_layers * sum(a * b for a, b in linear_shapes(llama).values())
    head = llama.vocab_size * llama.hidden_size
    assert more.flops["writing"] == 2 * (weights + head) * 5 * 64 and more.cost > one.cost
    assert one.writing == 0 and one.memory == more.memory
    assert more.disk - one.disk == 8 * 5 * 64  # the ids
    kept = 300_000_000 + 700 * llama.vocab_size + 5 * piece_bytes(llama)
    for bits, model in (
        (8, 2 * head + (weights + head) * 34 / 32),
        (None, 2 * (weights + 2 * head) + 4 * head),
    ):
        monkeypatch.setattr("quant.peak_memory.bits_in_memory", lambda device, bits=bits: bits)
        assert make_plan(replace(job, own=5)).writing == int(kept + model)
    job = replace(job, llama=replace(llama, num_hidden_layers=20000), own=5)
    deep = make_plan(job)
    assert deep.memory == deep.writing
    monkeypatch.setattr("quant.room.available_memory", lambda: 10**9)
    with pytest.raises(ValueError, match="are needed and .* are free; pass --own-windows 0"):
        check_room(deep, Path("out"), None)
    saving = {"storage": Storage(spill=Path()), "budget": Budget(256, 0)}
    least = make_plan(replace(job, own=0, windows=8 - 5, **saving)).memory
    told = "the least this model takes .*; pass --max-memory [0-9.]*GB, or --own-windows 0"
    with pytest.raises(ValueError, match=told + "$"):
        fit_memory(job, least, Path())
    with pytest.raises(ValueError, match=f"{told} and --max-memory {at_least(least)}$"):
        fit_memory(job, least - 1, Path())
