"""Checkpoint folders: a lazy reader by tensor name over all shards, and a writer that streams shards.

The reader maps files into memory and returns one tensor at a time, in the dtype of the file. It takes a single
safetensors file, shards with an index, and the older pytorch_model*.bin (unpickled with weights_only).
The writer flushes a shard as soon as it is full, so that nothing more than one shard is ever held.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class CheckpointReader:
    """Tensors of a checkpoint folder by name.

    Attributes:
        path: the folder.
        config: `config.json` as a dict.

    Raises:
        ValueError: no such folder, no usable config.json, no weights, or a shard that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{path}: no such folder; give a folder with config.json and weights")
        self.config = read_json(self.path / "config.json")
        self._files: dict[Path, Any] = {}
        self._places = self._locate()

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> Tensor:
        """The tensor in the file's dtype, memory-mapped where the format allows.

        Raises:
            ValueError: there is no such tensor, or its shard is damaged.
        """
        if name not in self._places:
            raise ValueError(f"{self.path}: tensor {name} is missing from the checkpoint")
        shard = self._open(self._places[name])
        try:
            return shard[name] if isinstance(shard, dict) else shard.get_tensor(name)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self._places[name]}: tensor {name} cannot be read ({error})") from None

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in set(self._places.values()))

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer and generation files to another folder."""
        for name in COMPANIONS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor."""
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self.path / index).is_file():
                return self._locate_by_index(self.path / index)
        singles = ["model.safetensors", "pytorch_model.bin"]
        singles += sorted(path.name for path in self.path.glob("gptq_model-*.safetensors"))
        for name in singles:
            file = self.path / name
            if file.is_file():
                return dict.fromkeys(self._open(file).keys(), file)
        raise ValueError(f"{self.path}: no weights; expected model.safetensors, its index, or pytorch_model*.bin")

    def _locate_by_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map")
        places = {name: self.path / file for name, file in weight_map.items()}
        for file in sorted(set(places.values())):
            if not file.is_file():
                raise ValueError(f"{file}: shard is named in {index.name} but missing; download it again")
        return places

    def _open(self, file: Path) -> Any:
        """An open shard: a safetensors handle, or a dict for .bin files; kept open."""
        if file not in self._files:
            try:
                if file.suffix == ".bin":
                    self._files[file] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                else:
                    self._files[file] = safe_open(file, framework="pt")
            except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
                first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"{file}: damaged or truncated ({first_line}); download it again") from error
        return self._files[file]


class CheckpointWriter:
    """Streams tensors into shards of a folder that the caller made.

    Args:
        path: the folder.
        shard_bytes: a shard is written as soon as it holds this much.
    """

    def __init__(self, path: Path, shard_bytes: int = 1 << 30) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor; full shards go to disk."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write the last shard, give the shards their final names, and write the index last."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self.path / "model.safetensors")
            return
        count, weight_map = len(self._shards), {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self.path / final)
            weight_map.update(dict.fromkeys(names, final))
        text = json.dumps({"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}, indent=1)
        (self.path / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self.path / f"part-{index + 1:05d}.safetensors"

    def _flush(self) -> None:
        """Write the queued tensors as one durable shard and free them."""
        if not self._pending:
            return
        part = self._part(len(self._shards))
        try:
            save_file(self._pending, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{part}: cannot be written ({error}); is the disk full?") from error
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def module_names(names: Iterable[str], suffix: str) -> list[str]:
    """Names ending in `suffix`, without it."""
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
