"""The header of a GGUF file: keys with their values, and where each tensor lies.

Little endian: magic "GGUF", version, number of tensors, number of keys; the keys (name, type,
value); for each tensor its name, dimensions (the fastest first), type and offset from the start of
the data, which is aligned. Every length is compared with what is left of the file before anything
is made of it. Specification: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_NAME = _MAX_ENTRIES = 65535  # of keys and of tensors; a 70B model has 723 tensors
_MAX_ITEMS = 1 << 22  # of an array, which becomes a list; vocabularies have below 2^19


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape (slowest dimension first), type number, and offset in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Cursor:
    """Reads a file's bytes from front to back, and refuses to pass the end."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > len(self.data) - self.position:
            raise ValueError(
                f"{self.path}: {what} of {count} bytes at byte {self.position} is beyond the end "
                f"of the file ({len(self.data)} bytes); it is truncated or damaged"
            )
        start, self.position = self.position, self.position + count
        return self.data[start : self.position].tobytes()

    def number(self, form: str, what: str) -> Any:
        """The next number in one of struct's formats."""
        return struct.unpack("<" + form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, limit: int = 1 << 40) -> str:
        """The next string."""
        length = self.number("Q", f"length of {what}")
        if length > limit:
            raise ValueError(f"{self.path}: {what} is {length} bytes long; the file is damaged")
        return self.take(length, what).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Any:
        """The next value of a type number; arrays become lists."""
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, key), dtype)[0].item()
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: key {key} has the unknown type {kind}")
        inner, count = self.number("I", key), self.number("Q", key)
        if count > _MAX_ITEMS:
            raise ValueError(f"{self.path}: key {key} is an array of {count} values; it is damaged")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize, key), dtype).tolist()
        if inner != _STRING or count * 8 > len(self.data) - self.position:
            raise ValueError(
                f"{self.path}: key {key} is an array of {count} values of type {inner}; the file "
                "is damaged"
            )
        return [self.text(f"{key}[{index}]") for index in range(count)]


def read_header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """(keys, tensors by name) of a GGUF file whose bytes are `data`.

    Raises:
        ValueError: not a GGUF file of version 2 or 3, truncated, or a length that lies.
    """
    cursor = Cursor(path, data)
    if cursor.take(4, "magic") != b"GGUF":
        raise ValueError(f"{path}: does not begin with GGUF; not a GGUF file")
    version = cursor.number("I", "version")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version} is not supported; 2 and 3 are")
    num_tensors, num_keys = cursor.number("Q", "tensor count"), cursor.number("Q", "key count")
    for what, count in (("tensors", num_tensors), ("keys", num_keys)):
        if count > _MAX_ENTRIES:
            raise ValueError(f"{path}: {count} {what} by its header are too many; it is damaged")
    keys: dict[str, Any] = {}
    for index in range(num_keys):
        key = cursor.text(f"name of key {index}", _MAX_NAME)
        keys[key] = cursor.value(cursor.number("I", f"type of {key}"), key)
    infos = {}
    for index in range(num_tensors):
        name = cursor.text(f"name of tensor {index}", _MAX_NAME)
        infos[name] = _tensor_info(cursor, name)
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise ValueError(f"{path}: general.alignment is {alignment!r:.40}")
    start = -(-cursor.position // alignment) * alignment
    return keys, {
        name: TensorInfo(info.shape, info.kind, start + info.offset) for name, info in infos.items()
    }


def _tensor_info(cursor: Cursor, name: str) -> TensorInfo:
    """The next entry of the table of tensors, with its offset from the start of the data."""
    count = cursor.number("I", f"dimensions of {name}")
    if not 0 < count <= _MAX_DIMENSIONS:
        raise ValueError(f"{cursor.path}: tensor {name} has {count} dimensions")
    shape = tuple(cursor.number("Q", f"shape of {name}") for _ in range(count))[::-1]
    kind, offset = cursor.number("I", f"type of {name}"), cursor.number("Q", f"offset of {name}")
    if 0 in shape or math.prod(shape) > 1 << 48:
        raise ValueError(f"{cursor.path}: tensor {name} has the shape {shape}")
    return TensorInfo(shape, kind, offset)
