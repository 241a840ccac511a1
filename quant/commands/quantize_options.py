"""Options of `quantize` alone: the grid, the calibration, the solver."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from quant.commands.options import INPUT, LARGEST_SEED, OUTPUT

GRID, CALIBRATION, SOLVING = "Grid", "Calibration", "Solving"
Source = Annotated[
    Path,
    typer.Option(
        help="Float checkpoint folder. Default: the bundled model.",
        rich_help_panel=INPUT,
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(help="Folder to make. Default: MODEL-wBITS-gGROUP.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the folder if it exists.", rich_help_panel=OUTPUT),
]
Bits = Annotated[int, typer.Option(help="Bits per weight: 2, 3, 4 or 8.", rich_help_panel=GRID)]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Inputs per scale: a multiple of 32, or -1 for one scale per row. Default: 128, and "
        "64 or 32 where that does not divide.",
        rich_help_panel=GRID,
        show_default=False,
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        help="Also quantize the head (lm_head), to so many bits. transformers does not load "
        "that; GPTQModel, vLLM and SGLang do. Not for a head tied to the embedding. Default: the "
        "head stays as it is.",
        rich_help_panel=GRID,
        show_default=False,
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        help="Stored bits per weight, scales and zeros included, as 4.25: the linears that gain "
        "most, by a pass over 2048 tokens, get smaller groups or more bits than --group-size and "
        "--bits. GPTQModel, vLLM and SGLang load such files. Default: the same grid for all.",
        rich_help_panel=GRID,
        show_default=False,
    ),
]
Symmetric = Annotated[
    bool,
    typer.Option("--sym/--asym", help="Fixed zero, or one per group.", rich_help_panel=GRID),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="stdlib, wikitext2, c4, or a .txt, .jsonl or .parquet file or a folder of them; may "
        "be repeated. Default: stdlib.",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[int, typer.Option(help="Windows of text.", rich_help_panel=CALIBRATION, min=1)]
OwnWindows = Annotated[
    int | None,
    typer.Option(
        help="Windows that the model writes itself, beside --samples, continuing pieces of them: "
        "64 with --effort max, else none. For this the whole model has to be in memory.",
        min=0,
        rich_help_panel=CALIBRATION,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens per window. Default: 2048, or the model's limit.",
        rich_help_panel=CALIBRATION,
        min=2,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of the choice of windows.", min=0, max=LARGEST_SEED, rich_help_panel=CALIBRATION
    ),
]
Solver = Annotated[
    str, typer.Option(help="gptq, or rtn (round to nearest).", rich_help_panel=SOLVING)
]
Effort = Annotated[
    str,
    typer.Option(
        help="What gptq does for accuracy. fast: scales searched by their weighted error, refit "
        "once, and codes swept once, on a Hessian shrunk towards its diagonal; the first token of "
        "a window counts more for q, k and v. balanced: also aims at the float model's outputs and "
        "residual stream; the float model runs beside the quantized one, with a forward, hidden "
        "states and layer weights of its own: 1.8 times the time of fast, perplexity 4.3 % "
        "above float where fast is 6.2 % (SmolLM2-135M, W4 g64, 16k tokens; docs/accuracy.md). "
        "max: aims further, refits and sweeps three times, lets rows make up for each other's "
        "errors, as gradients of the float model's predictions tell, gives channels sizes that "
        "round better, so that adapters trained on the original do not fit, and has the model "
        "write more text: 13 times the time of fast and 1.7 times its memory, perplexity 3.4 % "
        "above float, on text of another kind 9.1 % where fast is 13.6 %.",
        rich_help_panel=SOLVING,
    ),
]
Rotate = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Quantize an equal model in which no channel stands out: the residual stream in "
        "another basis, if the head does not repeat the embedding, and value channels and neurons "
        "of other sizes. Files load as ever, but adapters trained on the original do not fit.",
        rich_help_panel=SOLVING,
    ),
]
ActOrder = Annotated[
    bool,
    typer.Option(help="Most active inputs first; free at run time.", rich_help_panel=SOLVING),
]
Damp = Annotated[
    float,
    typer.Option(
        help="Added to the Hessian's diagonal, as a fraction of its mean.", rich_help_panel=SOLVING
    ),
]


def as_given(arguments: dict[str, Any]) -> dict[str, str]:
    """The options that decide numbers, by name, as they were given."""

    def told(value: Any) -> str:
        if value is None:
            return "not given"
        return " ".join(value) if isinstance(value, list) else str(value)

    places = ("output", "overwrite", "resume", "target", "push", "spill", "plan")
    return {
        f"--{name.replace('_', '-')}": told(value)
        for name, value in arguments.items()
        if name not in places
    }


def solver_options(
    solver: str, effort: str, act_order: bool, damp: float, own: int | None, rotate: bool
) -> Any:
    """The options of the solver called `solver`."""
    from quant.solvers import SOLVERS
    from quant.solvers.gptq_options import EFFORTS, with_rotation

    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; there are {', '.join(SOLVERS)}")
    if effort not in EFFORTS:
        raise ValueError(f"effort {effort!r} is unknown; there are {', '.join(EFFORTS)}")
    if solver != "gptq":
        return SOLVERS[solver][1]()
    options = replace(EFFORTS[effort], act_order=act_order, damp=damp)
    if rotate:
        options = with_rotation(options)
    return options if own is None else replace(options, own=own)
