"""`report`: the page that shows what quantizing did, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        help="Quantized checkpoint folder. Default: the one quantized last.", show_default=False
    ),
]


def report(path: Checkpoint = None) -> None:
    """Make quantize_report.html anew from a checkpoint's quantize_report.json: error by layer and
    kind of linear, codes and scales, time and memory, and what eval measured.
    """
    from quant.output import last_output
    from quant.report_page import write_page

    print(f"report: {write_page(path or last_output())}")
