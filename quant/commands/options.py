"""Options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BUNDLED = Path(__file__).parents[1] / "bundled"
INPUT, OUTPUT, RUNTIME = "Input", "Output", "Runtime"

Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint folder. Default: the one quantized last.", rich_help_panel=INPUT),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu or cuda; auto takes a GPU if there is one.", rich_help_panel=RUNTIME
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Storage of what is not quantized: auto (as in the file), float16, bfloat16 or "
        "float32. Arithmetic on the CPU is float32 always.",
        rich_help_panel=RUNTIME,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="What the CPU kernel of quantized linears does to activations: exact (float32), high "
        "(16 bits), fast (8 bits).",
        rich_help_panel=RUNTIME,
    ),
]
