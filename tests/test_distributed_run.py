"""pytest tests/test_distributed_run.py: two processes quantize as one does, also after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import finish, start
from safetensors.torch import load_file

from quant import QuantConfig, RTNOptions, RunOptions, quantize_checkpoint

Make = Callable[..., Path]
QUANTIZE = """
from quant import QuantConfig, RTNOptions, RunOptions, quantize_checkpoint
windows, source = torch.load(folder / "windows.pt"), folder / "source"
config = QuantConfig(group_size=32)
"""


@pytest.fixture
def source(make_checkpoint: Make, tmp_path: Path, windows: torch.Tensor) -> Path:
    torch.save(windows, tmp_path / "windows.pt")
    return make_checkpoint("source", num_hidden_layers=3)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bytes(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_two_processes_equal_one(source: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    """Two such runs agree in every byte. With one process, what looks at no sum over tokens agrees
    exactly, and GPTQ's scales and losses within the effect of float32 summation order.
    """
    body = """
    for name in ("first", "second"):
        report = quantize_checkpoint(source, folder / name, windows, config)
    torch.save([line.relative_error for line in report.linears], folder / f"errors-{rank}.pt")
    quantize_checkpoint(source, folder / "rtn", windows, config, RTNOptions())
    """
    results = finish(start(body, 2, tmp_path, QUANTIZE))
    assert [code for code, _, _ in results] == [0, 0], results
    assert_same_bytes(tmp_path / "first", tmp_path / "second")

    config = QuantConfig(group_size=32)
    report = quantize_checkpoint(source, tmp_path / "one", windows, config)
    quantize_checkpoint(source, tmp_path / "one-rtn", windows, config, RTNOptions())
    assert_same_bytes(tmp_path / "rtn", tmp_path / "one-rtn")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "first")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".scales"):  # chosen with diag(H): a near tie may fall to the other side
            assert (one[name] == two[name]).float().mean() > 0.9, name
        elif not name.endswith(".qweight"):
            assert torch.equal(one[name], two[name]), name
    expected = torch.tensor([line.relative_error for line in report.linears])
    for rank in (0, 1):
        errors = torch.tensor(torch.load(tmp_path / f"errors-{rank}.pt"))
        assert ((errors - expected).abs() / expected).max() < 0.03
        assert abs(errors.mean() / expected.mean() - 1) < 0.005


def test_a_killed_run_resumes(source: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    """A process is killed in the last layer; two processes resume to the bytes of an undisturbed
    run, and one to its losses.
    """
    body = """
    def on_step(step):
        if rank == 1 and step.layer == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    watch.BEAT_S = 0.2
    whole = quantize_checkpoint(source, folder / "whole", windows, config)
    options = RunOptions(on_step=on_step)
    quantize_checkpoint(source, folder / "killed", windows, config, run_options=options)
    """
    (code, _, error), _ = finish(start(body, 2, tmp_path, QUANTIZE))
    assert code == 2 and "of 2 stopped; finished layers are kept" in error
    partial = tmp_path / "killed.partial"
    partial.rename(tmp_path / "two.partial")
    copy = tmp_path / "one.partial"
    copy.mkdir()
    for file in (tmp_path / "two.partial").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    body = """
    seen = []
    options = RunOptions(resume=True, on_step=lambda step: seen.append(step.layer))
    quantize_checkpoint(source, folder / "two", windows, config, run_options=options)
    assert set(seen) and 0 not in seen
    """
    results = finish(start(body, 2, tmp_path, QUANTIZE))
    assert [code for code, _, _ in results] == [0, 0], results
    assert_same_bytes(tmp_path / "two", tmp_path / "whole")
    resume = RunOptions(resume=True)
    config = QuantConfig(group_size=32)
    quantize_checkpoint(source, tmp_path / "one", windows, config, run_options=resume)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    finished = [n for n in one if n.startswith("model.layers.0.")]
    assert finished and all(torch.equal(one[n], two[n]) for n in finished)
