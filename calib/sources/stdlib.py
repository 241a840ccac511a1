"""The Python standard library as text: on every machine, without a download.

One module in twenty, chosen by a hash of its name and thus the same for every Python, is held out:
the bundled model was not trained on it, and nothing is calibrated on it.
"""

from __future__ import annotations

import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

# Tests, other programs that live in the same folder, and files that are tables rather than text.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "encodings",
}
_SKIPPED |= {"ensurepip", "__pycache__", "pydoc_data", "config"}
_SAMPLE = Path(__file__).with_name("sample.txt")


def modules(root: Path | None = None) -> list[tuple[str, Path]]:
    """(name relative to the library, path) of its modules, sorted by name."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not any(part in _SKIPPED or part.startswith("config-") for part in relative.parts):
            found.append((relative.as_posix(), path))
    return sorted(found)


def is_held_out(name: str) -> bool:
    """Whether the module of this relative name is kept for evaluation."""
    return zlib.crc32(name.encode()) % 20 == 0


def documents(root: Path | None = None) -> Iterator[str]:
    """The text of every module that is not held out; a bundled sample where a Python comes without
    sources.
    """
    found = [path for name, path in modules(root) if not is_held_out(name)]
    if not found:
        warnings.warn(
            "this Python comes without its sources; calibrating on a small bundled text",
            stacklevel=2,
        )
        found = [_SAMPLE]
    for path in found:
        yield path.read_text(encoding="utf-8", errors="replace")
