"""`inspect`: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(path: Annotated[Path, typer.Argument(help="Checkpoint folder.")]) -> None:
    """Geometry, size and format of a checkpoint; for a float one, what quantizing it takes."""
    from quant.inspection import describe

    for name, value in describe(path).items():
        print(f"{name + ':':22}{value}")
