"""Seeded damage for the tests of readers, bytes and values of JSON; and how a reader may end."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Every message says which file, key or tensor is at fault.
NAMES_ITS_PLACE = re.compile(
    r"\.(json|safetensors|bin|pth|gguf|model)\b|model\.\S|lm_head|embed_tokens|weight|tensor "
    r"|quantization|bits|group_size|/[\w.]+: "
)
ROOM = 256 << 20  # bytes that a reader of a file below 2 MB may take
NUMBERS = (0, 1, 2, 127, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LONG_NUMBERS = (*NUMBERS, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"),
    "", "x", "../x", "4", [], [[]], {}, {"a": {}}, [1, 2], "\ud800",
)  # fmt: skip


def damaged_bytes(data: bytes, reach: int, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged copies; most damage falls into the first `reach` bytes."""
    generator = random.Random(seed)
    for _ in range(count):
        copy_ = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            limit = reach if generator.random() < 0.8 else len(copy_)
            _damage(copy_, generator.randrange(max(1, min(limit, len(copy_)))), generator)
        yield bytes(copy_)


def _damage(data: bytearray, place: int, generator: random.Random) -> None:
    """One change at a place."""
    kind = generator.randrange(7)
    if not data:
        return
    if kind == 0:
        data[place] ^= 1 << generator.randrange(8)
    elif kind == 1:
        data[place] = generator.randrange(256)
    elif kind == 2:
        data[place : place + 4] = struct.pack("<I", generator.choice(NUMBERS))
    elif kind == 3:
        data[place : place + 8] = struct.pack("<Q", generator.choice(LONG_NUMBERS))
    elif kind == 4:
        del data[place : place + generator.randint(1, 16)]
    elif kind == 5:
        data[place:place] = generator.randbytes(generator.randint(1, 16))
    elif generator.random() < 0.3:
        del data[place:]


def damaged_objects(value: dict[str, Any], seed: int, count: int) -> Iterator[bytes]:
    """`count` copies of a JSON file: a value replaced, a key dropped, or its bytes damaged."""
    generator = random.Random(seed)
    for index in range(count):
        if index % 4 == 3:
            text = json.dumps(value).encode()
            yield next(damaged_bytes(text, len(text), generator.randrange(1 << 30), 1))
            continue
        copy_ = copy.deepcopy(value)
        holder, key = generator.choice(list(_places(copy_)))
        if generator.random() < 0.2:
            del holder[key]
        else:
            holder[key] = generator.choice(VALUES)
        yield json.dumps(copy_).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process grow by ROOM at most, where the system can say so."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def ends_well(read: Callable[[], Any]) -> bool:
    """Whether the file was read; if not, the error is one of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except (ValueError, OSError) as error:
        assert NAMES_ITS_PLACE.search(str(error)), f"no place in: {error!r}"
        assert not isinstance(error, UnicodeError), repr(error)
        return False
    return True
