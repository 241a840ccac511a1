"""`convert`: weights of any kind to a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.commands.options import INPUT, OUTPUT

VOCABULARY = "Vocabulary"
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
AddToken = Annotated[
    list[str] | None,
    typer.Option(
        help='A token to add, such as "<pad>"; may be repeated.', rich_help_panel=VOCABULARY
    ),
]
PadToken = Annotated[
    str | None,
    typer.Option(help="The token that fills up batches.", rich_help_panel=VOCABULARY),
]
NewRows = Annotated[
    str,
    typer.Option(
        help="Rows of new tokens in embedding and head: mean (of all others) or zeros.",
        rich_help_panel=VOCABULARY,
    ),
]


def convert(
    source: Source,
    target: Target,
    add_token: AddToken = None,
    pad_token: PadToken = None,
    new_rows: NewRows = "mean",
    verify: Verify = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a float checkpoint as a plain Hugging Face folder, every value as it is."""
    from quant.added_tokens import NewTokens
    from quant.convert import convert, verify_source

    if verify:
        print(f"verified: {', '.join(verify_source(source))}")
    new = NewTokens(tuple(add_token or ()), pad_token, new_rows)
    convert(source, target, overwrite, new)
    print(f"checkpoint: {target}")
