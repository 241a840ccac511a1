"""`export`: a checkpoint in another format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quant.commands.options import OUTPUT

Source = Annotated[Path, typer.Argument(help="Checkpoint folder, quantized or float.")]
Target = Annotated[Path, typer.Argument(help="Folder to make, or file for gguf.")]
To = Annotated[
    str,
    typer.Option(
        help="autogptq (GPTQ version 1), gptq_v2, compressed-tensors, gguf, or a plain Llama "
        "folder in float16, bfloat16 or float32.",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace it if it exists.", rich_help_panel=OUTPUT)
]
Head = Annotated[
    str,
    typer.Option(help="Embedding and head in gguf: f16 or q8_0.", rich_help_panel=OUTPUT),
]


def export(
    source: Source, target: Target, to: To, overwrite: Overwrite = False, head: Head = "f16"
) -> None:
    """Move a checkpoint to another format: codes as they are, never rounded again."""
    from quant.export import export

    done = export(source, target, to, overwrite, head)
    for line in done.notes:
        print(f"note: {line}", file=sys.stderr)
    speed = done.size_bytes / 1e9 / done.seconds
    print(
        f"{to}: {target}, {done.size_bytes / 1e6:.1f} MB in {done.seconds:.1f} s ({speed:.2f} GB/s)"
    )
