"""pytest tests/test_output.py: no output replaces the source, or what is no checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import cli

from quant.output import existing, whole_file, whole_folder

QUANTIZE = ["quantize", "--model", "tiny", "--overwrite", "--output"]
EXPORT = ["export", "--to", "float32", "--overwrite", "tiny"]
CONVERT = ["convert", "--overwrite", "tiny"]
REFUSED: dict[str, tuple[list[str], str]] = {
    "quantize": ([*QUANTIZE, "tiny"], "tiny: is the checkpoint to read (tiny)"),
    "another spelling": ([*QUANTIZE, "notes/../tiny"], "is the checkpoint to read (tiny)"),
    "inside": ([*QUANTIZE, "tiny/w4"], "tiny/w4: is inside the checkpoint to read (tiny)"),
    "around": ([*QUANTIZE, "."], ".: contains the checkpoint to read (tiny)"),
    "export": ([*EXPORT, "tiny"], "tiny: is the checkpoint to read (tiny)"),
    "convert": ([*CONVERT, "tiny"], "tiny: is the checkpoint to read (tiny)"),
    "no checkpoint": ([*QUANTIZE, "notes"], "notes: holds a.txt, b.txt, c.txt and 1 more and no"),
    "export there": ([*EXPORT, "notes"], "notes: holds a.txt"),
    "convert there": ([*CONVERT, "notes"], "notes: holds a.txt"),
    "a file": ([*QUANTIZE, "a.txt"], "a.txt: is a file where a folder is to be made"),
    "the root": ([*CONVERT, "/"], "/: contains the checkpoint to read (tiny)"),
    "here": (["quantize", "--overwrite", "--output", "."], ".: cannot be replaced while it is in"),
    "spill": (["quantize", "--plan", "--spill", "nowhere"], "spill nowhere: no folder that can be"),
    "gguf": (
        ["export", "--to", "gguf", "--overwrite", "tiny", "a.gguf"],
        "a.gguf: is a file that is not GGUF; --overwrite leaves it alone, choose another output",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_overwrite_leaves_everything_else_alone(
    make_checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    make_checkpoint("tiny")
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "a.gguf", "notes/a.txt", "notes/b.txt", "notes/c.txt", "notes/d.txt"):
        (tmp_path / name).write_text("years of work")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments, message = REFUSED[case]
    run = cli(*arguments, cwd=tmp_path)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert message in run.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("whole", [whole_folder, whole_file])
def test_a_full_disk_is_told_with_the_output(tmp_path: Path, whole: Any) -> None:
    full = r"out: cannot be written, the disk is full; free some space$"
    with pytest.raises(OSError, match=full), whole(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="^other$"), whole(tmp_path / "out"):
        raise FileNotFoundError("other")
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_checkpoints_and_what_is_empty(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    assert "exists already" in existing(folder, overwrite=False, folder=True)
    assert not existing(folder, overwrite=True, folder=True)
    assert not existing(file, overwrite=True, folder=False)
    (folder / "config.json").write_text("{}")
    file.write_bytes(b"GGUF and so on")
    assert not existing(folder, overwrite=True, folder=True)
    assert not existing(file, overwrite=True, folder=False)
