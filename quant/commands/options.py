"""Options that several subcommands share, and where a result goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BUNDLED = Path(__file__).parents[1] / "bundled"
LARGEST_SEED = (1 << 63) - 1  # that torch takes
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
Hidden = Annotated[
    str,
    typer.Option(
        help="Activations between layers: float32, or bfloat16 for half the memory.",
        rich_help_panel=RUNTIME,
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the activations between layers, instead of memory.",
        rich_help_panel=RUNTIME,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Most memory for each process, as 16GB: keeps less of the activations, moves them to "
        "disk beside the output, or makes batches smaller, as far as needed.",
        rich_help_panel=RUNTIME,
    ),
]
ShowPlan = Annotated[
    bool,
    typer.Option(
        "--plan", help="Print work, time, memory and disk, and stop.", rich_help_panel=RUNTIME
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue a run that stopped; start if there is none.",
        rich_help_panel=OUTPUT,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Stop at once if this runtime would not load the result: transformers, vllm, sglang, "
        "exllamav2, gptqmodel or llama.cpp.",
        rich_help_panel=OUTPUT,
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        help="Also put it into this repository of the Hugging Face hub; a new one is private.",
        rich_help_panel=OUTPUT,
    ),
]
