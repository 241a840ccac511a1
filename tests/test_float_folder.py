"""pytest tests/test_float_folder.py: export to plain Llama folders, and their shards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import background
from quant.config import QuantConfig
from quant.export import Source, export
from quant.formats.rounding import Rounding
from quant.grid import Grid, QuantizedTensor
from quant.loader import load_model
from quant.sources import open_checkpoint
from quant.stream_writer import StreamWriter

Make = Callable[..., Path]


def entries(folder: Path) -> dict[str, Any]:
    return dict(Source.open(folder).entries())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float_folders(quantized: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    source = quantized(QuantConfig(4, 64, symmetric=False))
    done = export(source, tmp_path / "float", dtype)
    mine, theirs = entries(source), entries(tmp_path / "float")
    wanted = getattr(torch, dtype)
    for name, value in mine.items():
        if isinstance(value, QuantizedTensor):
            assert torch.equal(theirs[f"{name}.weight"], value.dequantize().to(wanted))
        else:
            assert torch.equal(theirs[name], value.to(wanted))
    assert bool(done.notes) == (dtype != "float32")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert config["torch_dtype"] == dtype and "quantization_config" not in config
    if dtype == "float32":
        ids = torch.arange(20)[None]
        load = lambda path: load_model(path, "cpu", precision="exact")(ids)  # noqa: E731
        assert (load(source) - load(tmp_path / "float")).abs().max() < 1e-4


def test_a_value_too_large_for_float16_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(dtype=torch.float32)
    export(source, tmp_path / "ok", "float16")
    path = source / "model-00001-of-00002.safetensors"
    state = load_file(path)
    name = next(iter(state))
    state[name][0, 0] = 1e6
    save_file(state, path)
    with pytest.raises(ValueError, match=f"{name}: holds values that are not finite"):
        export(source, tmp_path / "bad", "float16")


def test_shards_split_by_size_and_by_header(tmp_path: Path) -> None:
    """Many tensors in little room for names: several whole shards, in the order of arrival."""
    tensors = {f"{'name' * 30}.{i}": torch.full((3, i + 1), i) for i in range(40)}
    (tmp_path / "a").mkdir()
    for sizes in ({"tensors": 1}, {"tensors": 100, "shard_bytes": 2000}):
        writer = StreamWriter(tmp_path / "a", **sizes)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        (tmp_path / "a" / "config.json").write_text("{}")
        reader = open_checkpoint(tmp_path / "a")
        assert reader.names() == list(tensors)
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in tensors.items())
        assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 3
        for file in (tmp_path / "a").iterdir():
            file.unlink()


def test_the_extremes_of_a_grid_decide_for_float16() -> None:
    """A value that float16 cannot hold is refused; a scale alone is not a value."""
    codes = torch.full((2, 64), 8, dtype=torch.uint8)
    scales = torch.full((2, 2), 60000.0)
    grid = Grid(scales, torch.full((2, 2), 8, dtype=torch.uint8), 4)
    rounding = Rounding()
    assert not rounding.round_grid("a", QuantizedTensor(codes, grid), torch.float16).any()
    assert not rounding.notes()
    codes[1, 40] = 10
    with pytest.raises(ValueError, match="b: holds values that are not finite in float16"):
        rounding.round_grid("b", QuantizedTensor(codes, grid), torch.float16)
    scales.fill_(1 + 2**-10)  # times 3 it needs a bit more than float16 has
    codes[1, 40] = 11
    assert rounding.round_grid("c", QuantizedTensor(codes, grid), torch.float32).any()
    assert not rounding.notes()
    rounding.round_grid("d", QuantizedTensor(codes, grid), torch.float16)
    assert "float16, by at most 0.00049 of their size, or 3e-08 (d is" in rounding.notes()[0]


def test_a_failed_write_is_told_and_waited_for(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes hands its error over, and has ended when the folder is removed."""
    source, real, seen = quantized(QuantConfig(4, 64)), background._write, []

    def slow(file: Path, place: int, tensor: torch.Tensor) -> None:
        time.sleep(0.05)
        seen.append(file.is_file())
        real(file, place, tensor)

    def full(file: Path, place: int, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background, "_write", slow)
    broken = lambda self, name, qt: (_ for _ in ()).throw(ValueError("no"))  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr("quant.formats.float_folder.Writer.add_quantized", broken)
        with pytest.raises(ValueError, match="^no$"):
            export(source, tmp_path / "float", "float32")
    time.sleep(0.2)
    assert seen and all(seen)
    monkeypatch.setattr(background, "_write", full)
    with pytest.raises(OSError, match="float: cannot be written, the disk is full"):
        export(source, tmp_path / "float", "float32")
    with pytest.raises(OSError, match="float.gguf: cannot be written, the disk is full"):
        export(source, tmp_path / "float.gguf", "gguf")
    assert not [path for path in tmp_path.iterdir() if "float" in path.name]
