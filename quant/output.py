"""Output folders: they appear whole under their final name, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, renamed to `path` when the block ends well, else removed.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or is no checkpoint folder.
    """
    refuse_existing(path, overwrite, folder=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with _naming(path):
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
        FileExistsError: `path` exists and `overwrite` is False, or is no GGUF file.
    """
    refuse_existing(path, overwrite, folder=False)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _naming(path):
            yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let a full disk say what was being written to it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"{path}: cannot be written, the disk is full; free some space") from error


def refuse_overlap(source: str | Path, path: str | Path) -> None:
    """Refuse an output that would replace, hold or lie within what it is made from.

    Raises:
        FileExistsError: `path` is `source`, contains it, or is inside it.
    """
    read, made = Path(source).resolve(), Path(path).resolve()
    relation = "is" if made == read else "contains" if made in read.parents else "is inside"
    if made == read or made in read.parents or read in made.parents:
        raise FileExistsError(
            f"{path}: {relation} the checkpoint to read ({source}); choose an output outside of it"
        )


def refuse_existing(path: Path, overwrite: bool, folder: bool) -> None:
    """Raise FileExistsError if `path` exists and may not be replaced by a file, or a folder."""
    if obstacle := existing(path, overwrite, folder):
        raise FileExistsError(obstacle)


def existing(path: Path, overwrite: bool, folder: bool) -> str:
    """What to say where `path` exists and may not be replaced by a folder, or a file, else ""."""
    if path.name in ("", ".."):
        return f"{path}: cannot be replaced while it is in use; name a folder to make"
    if not path.exists():
        above = next(parent for parent in path.absolute().parents if parent.exists())
        return "" if above.is_dir() else f"{path}: {above} is a file, no folder; choose another"
    if not overwrite:
        return f"{path}: exists already; choose another name or pass --overwrite"
    if found := _foreign(path, folder):
        return f"{path}: {found}; --overwrite leaves it alone, choose another output"
    return ""


def _foreign(path: Path, folder: bool) -> str:
    """What makes `path` something else than a checkpoint folder or a GGUF file; "" for nothing, and
    for what is empty.
    """
    if path.is_dir() != folder:
        kinds = ("a file", "a folder")
        return f"is {kinds[not folder]} where {kinds[folder]} is to be made"
    if folder:
        names = sorted(file.name for file in path.iterdir())
        if not names or "config.json" in names:
            return ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"holds {', '.join(names[:3])}{more} and no config.json, so is no checkpoint"
    with path.open("rb") as file:
        return "" if file.read(4) in (b"GGUF", b"") else "is a file that is not GGUF"


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
