"""Several processes on this machine, joined as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUP = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from cli import one_line_errors
from quant import distributed, watch
"""


def start(body: str, world: int, folder: Path, setup: str = "") -> list[subprocess.Popen[str]]:
    """`world` processes that run `setup`, then `body` as a command; they find `rank` and `folder`
    there.
    """
    script = folder / "script.py"
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    script.write_text(
        f"{SETUP}folder = Path({str(folder)!r})\n{setup}"
        f"@one_line_errors\n@distributed.joined()\ndef command():\n"
        f"    rank = distributed.rank()\n{indented}\n"
        "import typer\ntry:\n    command()\n"
        "except typer.Exit as end:\n    sys.exit(end.exit_code)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    processes = []
    for rank in range(world):
        settings = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{key: str(value) for key, value in settings.items()}}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script)], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, outputs, strict=True)]
