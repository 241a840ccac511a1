"""Files that a crash cannot tear: written under another name, brought to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".tmp"


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name; then it is on the disk, and named `path`.

    Raises:
        OSError: it cannot be written; nothing of it stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> OSError:
    """What to raise where `path` could not be written."""
    advice = "; free some space" if error.errno == errno.ENOSPC else ""
    return OSError(f"{path}: cannot be written ({error}){advice}")


def sync(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()
