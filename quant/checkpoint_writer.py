"""A writer of checkpoint folders that never holds more than a layer.

What was added goes to disk as a durable part whenever the caller flushes; at the end the parts are
joined into shards by copying bytes. Without the joining, a small model would be dozens of files.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_PART_BYTES = 1 << 30  # a part is written at the latest when it holds this much


class CheckpointWriter:
    """Streams tensors into a folder that the caller made: durable parts first, shards at the end.

    Args:
        path: the folder.
        shard_bytes: parts are joined into shards of about this much.
    """

    def __init__(self, path: Path, shard_bytes: int = 4 << 30) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._parts: list[Path] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor for the next part."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes > _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the queued tensors as one durable part and free them."""
        if not self._pending:
            return
        part = self.path / f"part-{len(self._parts) + 1:05d}.safetensors"
        try:
            save_file(self._pending, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{part}: cannot be written ({error}); is the disk full?") from error
        _sync(part)
        self._parts.append(part)
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Join the parts into shards, and write the index last; one shard needs no index."""
        self.flush()
        groups = self._groups()
        if len(groups) == 1:
            _join(groups[0], self.path / "model.safetensors")
            return
        weight_map, total_bytes = {}, 0
        for number, parts in enumerate(groups, 1):
            shard = self.path / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            header, size_bytes = _join(parts, shard)
            weight_map.update(dict.fromkeys(header, shard.name))
            total_bytes += size_bytes
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        file = self.path / "model.safetensors.index.json"
        file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _groups(self) -> list[list[Path]]:
        """The parts of each shard."""
        groups: list[list[Path]] = []
        room = 0
        for part in self._parts:
            size = part.stat().st_size
            if not groups or size > room:
                groups.append([])
                room = self.shard_bytes
            groups[-1].append(part)
            room -= size
        return groups


def _join(parts: list[Path], target: Path) -> tuple[list[str], int]:
    """Make one safetensors file of several by moving the offsets in their headers; remove them.

    A file is the header's length (8 bytes, little endian), the header (JSON), and the data.

    Returns:
        The names in it, and the bytes of its data.
    """
    header: dict[str, Any] = {}
    starts, end = [], 0
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            header[name] = {**entry, "data_offsets": [end + o for o in entry["data_offsets"]]}
        starts.append(8 + length)
        end += part.stat().st_size - starts[-1]
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, output, 1 << 24)
    _sync(target)
    for part in parts:
        part.unlink()
    return list(header), end


def _sync(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
