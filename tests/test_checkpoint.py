"""pytest tests/test_checkpoint.py: shards, the index, and damaged folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.checkpoint_writer import CheckpointWriter
from quant.sources import open_checkpoint


def test_writer_streams_parts_and_joins_them(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.float16, torch.uint8]
    state = {f"t{i}": (torch.rand(9, 11) * 99).to(dtypes[i % 3]) for i in range(8)}
    writer = CheckpointWriter(tmp_path, shard_bytes=2000)
    for name, tensor in state.items():
        writer.add(name, tensor)
        if name in ("t1", "t2", "t5"):
            writer.flush()
    assert len(list(tmp_path.glob("part-*"))) == 3  # the last two are still queued
    writer.close()
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "config.json").write_text("{}")
    reader = open_checkpoint(tmp_path)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in state.items())
    assert sorted(reader.names()) == sorted(state) and "t0" in reader and "x" not in reader
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(t.numel() * t.element_size() for t in state.values())
    assert index["metadata"]["total_size"] == total


def test_one_shard_has_the_plain_name(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.add("t", torch.ones(4).view(2, 2).T)
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], torch.ones(2, 2))


def test_pytorch_bin_single_and_sharded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(open_checkpoint(tmp_path).tensor("a"), torch.ones(3))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(open_checkpoint(tmp_path).tensor("a"), torch.ones(3))


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil"),))


def test_a_pickled_command_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: holds more than tensors \(.*\)"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_damaged_folders_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def refuses(message: str, tensor: str | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            reader = open_checkpoint(folder)
            if tensor:
                reader.tensor(tensor)

    folder = tmp_path / "absent"
    refuses("no such folder")
    folder.mkdir()
    refuses("absent: holds no checkpoint; there would be config.json and weights")
    (folder / "config.json").write_text("{")
    refuses("not readable as JSON")
    (folder / "config.json").write_text("[]")
    refuses("expected a JSON object, found list")
    (folder / "config.json").write_text("{}")
    refuses("no weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    refuses("has no weight_map")
    folder = make_checkpoint()
    refuses("tensor nothing is missing", "nothing")
    shard = folder / "model-00002-of-00002.safetensors"
    name = list(load_file(shard))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    refuses("model-00002-of-00002.safetensors: damaged or truncated", name)
    shard.unlink()
    refuses("model-00002-of-00002.safetensors: shard is named in .* but missing")


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "gone")
    writer.add("t", torch.ones(2))
    with pytest.raises(OSError, match="part-00001.safetensors"):
        writer.close()
