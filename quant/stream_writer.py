"""A writer of checkpoint folders that puts every tensor straight into its place in a shard.

A safetensors file begins with its header, which is known only at the end. Room for it is therefore
left at the start of the shard, and filled with spaces behind the header, as the format allows. A
shard is closed when it is large enough or when its header would not fit. Unlike CheckpointWriter
nothing is written twice, and an interrupted run leaves nothing of use.

One tensor is written in a thread of its own while the caller makes the next one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.background import TensorWriter

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class StreamWriter:
    """Streams tensors into the shards of a folder that the caller made.

    Args:
        path: the folder.
        tensors: about how many tensors come; decides the room for a header.
        shard_bytes: a shard is closed when it holds this much.
    """

    def __init__(self, path: Path, tensors: int, shard_bytes: int = 4 << 30) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self._room = max(1024, 150 * tensors) // 8 * 8  # the header of a shard, in bytes
        self._shards: list[tuple[Path, list[str]]] = []
        self._file: Path | None = None
        self._header: dict[str, Any] = {}
        self._header_bytes = self._position = self._total_bytes = 0
        self._tensors = TensorWriter()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, which must stay as it is until the next call.

        Raises:
            OSError: it, or the one before it, cannot be written.
        """
        tensor = tensor.detach().cpu().contiguous()
        size_bytes = tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [1 << 40] * 2}
        entry_bytes = len(json.dumps({name: entry}))  # as long as it can become
        if self._position and (
            self._position + size_bytes > self.shard_bytes
            or self._header_bytes + entry_bytes > self._room
        ):
            self._finish_shard()
        file = self._file or self._start_shard(entry_bytes)
        self._tensors.write(file, 8 + self._room + self._position, tensor)
        end = self._position + size_bytes
        self._header[name] = {**entry, "data_offsets": [self._position, end]}
        self._header_bytes, self._position = self._header_bytes + entry_bytes, end
        self._total_bytes += size_bytes

    def flush(self) -> None:
        """Wait until what was added is written.

        Raises:
            OSError: it cannot be.
        """
        self._tensors.wait()

    def close(self) -> None:
        """Finish the last shard, give the shards their names, and write the index last; one shard
        needs no index.
        """
        if self._file:
            self._finish_shard()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.path / "model.safetensors")
            return
        weight_map = {}
        for number, (part, names) in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            part.rename(self.path / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        index_file = self.path / "model.safetensors.index.json"
        index_file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _start_shard(self, entry_bytes: int) -> Path:
        """Begin the next shard, behind the room for its header."""
        self._header = {"__metadata__": {"format": "pt"}}
        self._header_bytes = len(json.dumps(self._header))
        self._position = 0
        self._room = max(self._room, self._header_bytes + entry_bytes)
        self._file = self.path / f"part-{len(self._shards) + 1:05d}.safetensors"
        self._file.write_bytes(b"")
        return self._file

    def _finish_shard(self) -> None:
        """Write the header into its room and wait until the shard is on the disk."""
        assert self._file
        self.flush()
        text = json.dumps(self._header, separators=(",", ":")).encode()
        with self._file.open("r+b") as opened:
            opened.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
            opened.flush()
            os.fsync(opened.fileno())
        names = [name for name in self._header if name != "__metadata__"]
        self._shards.append((self._file, names))
        self._file = None
