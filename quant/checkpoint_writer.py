"""A writer of checkpoint folders that never holds more than a layer.

What was added goes to disk as a durable part whenever the caller flushes; at the end the parts are
joined into shards by copying bytes. Without the joining, a small model would be dozens of files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quant.durable import file_sha256, write_file

_PART_BYTES = 1 << 30  # a part is written at the latest when it holds this much


@dataclass(frozen=True)
class Part:
    """A durable file of the folder."""

    name: str
    size_bytes: int
    sha256: str

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is there, byte for byte."""
        file = folder / self.name
        return (
            file.is_file()
            and file.stat().st_size == self.size_bytes
            and file_sha256(file) == self.sha256
        )


class CheckpointWriter:
    """Streams tensors into a folder that the caller made: durable parts first, shards at the end.

    Args:
        path: the folder.
        shard_bytes: parts are joined into shards of about this much.

    Attributes:
        parts: what was written so far, in order; an interrupted run sets it to go on.
        shards: what the parts were joined to already; the same.
        on_shard: called when a shard is durable, before its parts are removed.
    """

    def __init__(self, path: Path, shard_bytes: int = 4 << 30) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self.parts: list[Part] = []
        self.shards: list[Part] = []
        self.on_shard: Callable[[], None] = lambda: None
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._early: list[Part] = []  # written since `take`, as there was too much
        self._lock = threading.Lock()

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor for the next part."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes > _PART_BYTES:
            self._early = self.take()()

    def flush(self) -> None:
        """Write the queued tensors as one durable part and free them."""
        self.take()()

    def take(self) -> Callable[[], list[Part]]:
        """Hand over the queued tensors: the result, called in any thread, writes them, and returns
        all parts since the last one.
        """
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        early, self._early = self._early, []
        return lambda: [*early, self._write(pending)] if pending else early

    def _write(self, tensors: dict[str, Tensor]) -> Part:
        """Make one part."""
        with self._lock:
            file = self.path / f"part-{self._number() + 1:05d}.safetensors"
            write_file(file, lambda path: _save(tensors, path))
            part = Part(file.name, file.stat().st_size, file_sha256(file))
            self.parts.append(part)
            return part

    def _number(self) -> int:
        """The highest of a part; those of an unfinished layer are gone after a stop."""
        return max((int(part.name[5:10]) for part in self.parts), default=0)

    def close(self) -> None:
        """Join the parts into shards, and write the index last; one shard needs no index."""
        self.flush()
        groups = self._groups()
        weight_map, total_bytes = {}, 0
        for name, parts in groups.items():
            shard = self.path / name
            if not self._is_joined(name):
                self.shards.append(_join([self.path / part.name for part in parts], shard))
                self.on_shard()
            for part in parts:
                (self.path / part.name).unlink(missing_ok=True)
            names, size_bytes = _contents(shard)
            weight_map.update(dict.fromkeys(names, name))
            total_bytes += size_bytes
        if len(groups) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            file = self.path / "model.safetensors.index.json"
            file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def unjoined(self) -> list[Part]:
        """The parts whose shard does not exist yet."""
        groups = self._groups().items()
        return [part for name, parts in groups if not self._is_joined(name) for part in parts]

    def _is_joined(self, shard: str) -> bool:
        return shard in [done.name for done in self.shards]

    def _groups(self) -> dict[str, list[Part]]:
        """The parts of each shard, by its name."""
        groups: list[list[Part]] = []
        room = 0
        for part in self.parts:
            if not groups or part.size_bytes > room:
                groups.append([])
                room = self.shard_bytes
            groups[-1].append(part)
            room -= part.size_bytes
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        names = (
            f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
        )
        return dict(zip(names, groups, strict=True))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; a full disk is an OSError."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _join(parts: list[Path], target: Path) -> Part:
    """Make one durable safetensors file of several by moving the offsets in their headers.

    A file is the header's length (8 bytes, little endian), the header (JSON), and the data.
    """
    header: dict[str, Any] = {}
    starts, end = [], 0
    for part in parts:
        entries, start = _header(part)
        for name, entry in entries.items():
            header[name] = {**entry, "data_offsets": [end + o for o in entry["data_offsets"]]}
        starts.append(start)
        end += part.stat().st_size - start
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()

    def copy(path: Path) -> None:
        with path.open("wb") as output:
            total.update(len(text).to_bytes(8, "little") + text)
            output.write(len(text).to_bytes(8, "little") + text)
            for part, start in zip(parts, starts, strict=True):
                with part.open("rb") as file:
                    file.seek(start)
                    while block := file.read(1 << 22):
                        total.update(block)
                        output.write(block)

    write_file(target, copy)
    return Part(target.name, target.stat().st_size, total.hexdigest())


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file, and where its data starts."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _contents(file: Path) -> tuple[list[str], int]:
    """The names in a safetensors file, and the bytes of its data."""
    entries, start = _header(file)
    return list(entries), file.stat().st_size - start
