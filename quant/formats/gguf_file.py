"""The container of GGUF version 3, written in a stream.

    u32 magic, u32 version, u64 tensors, u64 keys
    each key:     string name, u32 type, value      (string: u64 length, UTF-8 bytes)
    each tensor:  string name, u32 dimensions, u64 sizes, inner first, u32 type, u64 offset
    data, each tensor from a multiple of 32

Everything in front of the data has a size that names and dimensions give, so room is left for it;
types and offsets are filled in when all data is written.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from quant.background import TensorWriter

Value = str | bool | int | float | list[str] | list[float] | list[int]
_ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class GGUFFile:
    """One file, written tensor by tensor, each while the caller makes the next one.

    Args:
        path: the file to make.
        metadata: its keys; values keep their kind and length until `close`.
        shapes: shape of every tensor that will come, in any order.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Value], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.path, self.metadata, self._shapes = path, metadata, shapes
        self._entries: dict[str, tuple[int, int]] = {}  # type and offset
        nothing = dict.fromkeys(shapes, (0, 0))
        self._start = _aligned(len(self._head(nothing)))
        self._offset = 0
        self._tensors = TensorWriter()
        path.write_bytes(b"")

    def add(self, name: str, kind: int, data: Tensor) -> None:
        """Write the bytes of a tensor of that type.

        Raises:
            ValueError: no such tensor is expected.
        """
        if name not in self._shapes or name in self._entries:
            raise ValueError(f"{name}: a tensor that a Llama of this config.json has not, or twice")
        raw = data.contiguous().reshape(-1).view(torch.uint8)
        self._entries[name] = (kind, self._offset)
        self._tensors.write(self.path, self._start + self._offset, raw)
        self._offset += _aligned(raw.numel())

    def flush(self) -> None:
        """Wait until what was added is written.

        Raises:
            OSError: it cannot be.
        """
        self._tensors.wait()

    def close(self) -> None:
        """Fill in the head and wait until the file is on the disk.

        Raises:
            ValueError: a tensor did not come.
        """
        missing = [name for name in self._shapes if name not in self._entries]
        if missing:
            raise ValueError(
                f"tensor {missing[0]} is missing from the checkpoint ({len(missing)} in all)"
            )
        head = self._head(self._entries)
        assert _aligned(len(head)) == self._start
        self.flush()
        with self.path.open("r+b") as file:
            file.truncate(self._start + self._offset)  # the last tensor is padded, too
            file.write(head)
            file.flush()
            os.fsync(file.fileno())

    def _head(self, entries: dict[str, tuple[int, int]]) -> bytes:
        """Everything in front of the data."""
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(self.metadata))]
        for name, value in self.metadata.items():
            parts += [_string(name), _typed(value)]
        for name, (kind, offset) in entries.items():
            shape = self._shapes[name]
            sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            parts += [_string(name), sizes, struct.pack("<IQ", kind, offset)]
        return b"".join(parts)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    """The type of a value and the value; integers are u32, or i32 in arrays."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    kind = {str: _STRING, float: _F32, int: _I32}[type(value[0])]
    start = struct.pack("<IIQ", _ARRAY, kind, len(value))
    if kind == _STRING:
        return start + b"".join(_string(str(item)) for item in value)
    return start + struct.pack(f"<{len(value)}{'f' if kind == _F32 else 'i'}", *value)
