"""`convert`: weights of any kind to a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.commands.options import INPUT, OUTPUT

Source = Annotated[
    Path,
    typer.Argument(
        help="Meta's folder, a llama2.c .bin file, a .gguf file, or a Hugging Face folder."
    ),
]
Target = Annotated[Path, typer.Argument(help="Folder to make.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Check Meta's files against checklist.chk first.", rich_help_panel=INPUT
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the folder if it exists.", rich_help_panel=OUTPUT),
]


def convert(
    source: Source, target: Target, verify: Verify = False, overwrite: Overwrite = False
) -> None:
    """Write a float checkpoint as a plain Hugging Face folder, every value as it is."""
    from quant.convert import convert, verify_source

    if verify:
        print(f"verified: {', '.join(verify_source(source))}")
    convert(source, target, overwrite)
    print(f"checkpoint: {target}")
