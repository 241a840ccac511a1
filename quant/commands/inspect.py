"""`inspect`: what a checkpoint is, and what will load it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path, typer.Argument(help="Checkpoint folder, or a .gguf or llama2.c .bin file.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def inspect(path: Checkpoint, json_output: Json = False) -> None:
    """Geometry, size and format of a checkpoint, and which runtimes load it, with the rule that
    decides; for a float one, what quantizing it takes.
    """
    from quant.inspection import describe, will_it_load

    facts, verdicts = describe(path), will_it_load(path)
    if json_output:
        print(json.dumps({**facts, "runtimes": [asdict(verdict) for verdict in verdicts]}))
        return
    for name, value in facts.items():
        print(f"{name + ':':22}{value}")
    print("will it load?")
    for verdict in verdicts:
        answer = {True: "yes", False: "no", None: "?"}[verdict.loads]
        print(f"  {verdict.runtime:20}{answer:5}{verdict.why}")
