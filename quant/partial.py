"""The folder a run works in: it outlives a crash, and has one owner at a time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from quant.durable import sync, sync_folder
from quant.output import refuse_existing

STATE = "state.json"  # what a run has finished; it makes a partial folder worth keeping
OWN_WINDOWS = "own-windows"  # what the model wrote for this run to calibrate on
_LOCK = "lock"


@contextmanager
def partial_folder(path: Path, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """The folder beside `path` in which a run works; it is renamed to `path` when the block ends
    well. After a failure it stays if a layer was finished, so that the run can be resumed.

    Args:
        path: the output.
        resume: continue in the folder of an earlier run, if there is one.
        overwrite: replace `path`, and throw away the folder of an earlier run unless resumed.

    Raises:
        FileExistsError: `path`, or the folder of an earlier run, exists; or `path` is no
            checkpoint; or there is something else in the folder's place.
        BlockingIOError: another process works on the same output.
    """
    refuse_existing(path, overwrite, folder=True)
    partial = partial_path(path)
    _refuse(in_the_way(path))
    partial.mkdir(parents=True, exist_ok=True)
    lock = _lock(partial, path)
    try:
        _refuse(in_the_way(path, resume, overwrite))
        if not resume or not (partial / STATE).exists():
            _empty(partial)
        yield partial
        _publish(partial, path, lock)
    finally:
        if partial.exists() and not (partial / STATE).exists():
            _let_go_on_windows(lock)
            shutil.rmtree(partial)
        lock.close()
    remove_notes(path)


def is_finished(path: Path, resume: bool = True, overwrite: bool = False) -> bool:
    """Whether a run that goes on with `path` finds it complete: an earlier one was killed after it
    gave the folder its name, and before it removed its notes.
    """
    return resume and not overwrite and (path / STATE).is_file()


def remove_notes(path: Path) -> None:
    """Remove what is no part of a checkpoint, last what `is_finished` looks for."""
    for name in (OWN_WINDOWS, _LOCK, STATE):
        (path / name).unlink(missing_ok=True)


def _refuse(obstacle: str) -> None:
    if obstacle:
        raise FileExistsError(obstacle)


def partial_path(path: Path) -> Path:
    """Where a run works whose output will be `path`."""
    return path.with_name(f"{path.name}.partial")


def in_the_way(path: Path, resume: bool = True, overwrite: bool = False) -> str:
    """What to say where a run that makes `path` may not work in the partial folder, else ""."""
    partial = partial_path(path)
    if (partial / STATE).exists() and not (resume or overwrite):
        return (
            f"{partial}: an earlier run stopped here; pass --resume to continue it, or --overwrite "
            "to start again"
        )
    ours = not partial.exists() or (partial / _LOCK).is_file()
    if ours or (partial.is_dir() and not any(partial.iterdir())):
        return ""
    return (
        f"{partial}: is not the folder of an earlier run, and this one would work there; move it, "
        "or choose another --output"
    )


def kept(path: Path) -> str:
    """Where the finished layers of a run stay whose output is `path`, or "" if there are none."""
    partial = partial_path(path)
    return f"finished layers are kept in {partial}" if (partial / STATE).exists() else ""


def _publish(partial: Path, path: Path, lock: IO[bytes]) -> None:
    """Give the finished folder its name; what had it is removed afterwards."""
    for file in partial.iterdir():
        if file.name != _LOCK:
            sync(file)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    _let_go_on_windows(lock)
    partial.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _let_go_on_windows(lock: IO[bytes]) -> None:
    """Windows neither renames nor removes a folder in which a file is open."""
    if sys.platform == "win32":
        lock.close()


def _empty(partial: Path) -> None:
    """Remove everything but the lock."""
    for file in partial.iterdir():
        if file.name != _LOCK:
            file.unlink()


def _lock(partial: Path, path: Path) -> IO[bytes]:
    """Open the folder's lock file and hold it; the system lets go of it when the process ends."""
    file = (partial / _LOCK).open("ab")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), (partial / _LOCK).stat()):
                raise BlockingIOError
    except OSError:
        file.close()
        raise BlockingIOError(
            f"{path}: another process is making this checkpoint; wait for it, or choose another "
            "--output"
        ) from None
    return file
