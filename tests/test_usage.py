"""pytest tests/test_usage.py: wrong arguments get one line, whatever the version of typer; so does
a lack of memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from test_cli import cli

from cli import one_line_errors

WRONG: dict[str, tuple[list[str], str]] = {
    "unknown option": (["quantize", "--bitz", "4"], "error: No such option: --bitz"),
    "no number": (["quantize", "--bits", "four"], "'four'"),
    "no number =": (["quantize", "--damp=a lot"], "'a lot'; see: cli.py quantize --help"),
    "twice": (["quantize", "--damp", "0.1", "--damp=much", "--samples", "2"], "'much'; see: "),
    "and back": (["quantize", "--damp=0.1", "--damp", "more"], "'more'; see: "),
    "out of range": (["bench", "decode", "--new-tokens", "0"], "'--new-tokens'"),
    "no value": (["eval", "--data"], "'--data' requires an argument; see: "),
    "no argument": (["generate"], "see: cli.py generate --help"),
    "no option": (["export", "a", "b"], "Missing option '--to'; see: cli.py export --help"),
    "extra": (["inspect", "a", "b"], "Got unexpected extra argument"),
    "command": (["quantise"], "No such command 'quantise'"),
    "commands": (["x"], "; there are quantize, eval, generate"),
    "no subcommand": (["bench"], "Missing command; there are kernels, decode; see: cli.py bench"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_line(tmp_path: Path, case: str) -> None:
    arguments, message = WRONG[case]
    run = cli(*arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: ") and "--help" in run.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    """Any other RuntimeError is a fault of ours, and is shown whole."""

    @one_line_errors
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        fail(error("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"))
    told = capsys.readouterr().err
    assert end.value.exit_code == 2 and len(told.splitlines()) == 1
    assert ("the GPU's memory is full (2.00 GiB more were wanted)" in told) == (
        error is not MemoryError
    )
    with pytest.raises(RuntimeError, match="sizes differ"):
        fail(RuntimeError("sizes differ"))
