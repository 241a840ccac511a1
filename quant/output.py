"""Output folders: they appear whole under their final name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, renamed to `path` when the block ends well, else removed.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    refuse_existing(path, overwrite)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A file name to write to, renamed to `path` when the block ends well, else removed.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or is a folder.
    """
    refuse_existing(path, overwrite and not path.is_dir())
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `path` exists and may not be replaced."""
    if obstacle := existing(path, overwrite):
        raise FileExistsError(obstacle)


def existing(path: Path, overwrite: bool) -> str:
    """What to say where `path` exists and may not be replaced, else ""."""
    if not path.exists() or overwrite:
        return ""
    return f"{path}: exists already; choose another --output or pass --overwrite"


def remember(path: Path) -> None:
    """Note the checkpoint made last, for commands that are given no model."""
    note = _note_path()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(str(path.resolve()), encoding="utf-8")


def last_output() -> Path:
    """The checkpoint made last.

    Raises:
        ValueError: none was made yet, or it is gone.
    """
    note = _note_path()
    if not note.is_file():
        raise ValueError(
            "no --model given and nothing quantized yet; make one with: python cli.py quantize "
            "--bits 4"
        )
    path = Path(note.read_text(encoding="utf-8"))
    if not path.is_dir():
        raise ValueError(
            f"{path}: the last quantized checkpoint is gone; pass --model or run: python cli.py "
            "quantize"
        )
    return path


def _note_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "llama-gptq" / "last"
