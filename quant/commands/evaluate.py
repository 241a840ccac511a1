"""`eval`: how good a checkpoint is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quant.commands.options import BUNDLED, INPUT, OUTPUT, Device, Dtype, Model, Precision

Perplexity = Annotated[
    bool,
    typer.Option("--ppl", help="Perplexity; it is always printed.", rich_help_panel=OUTPUT),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="Float checkpoint to compare with. Default: where it came from.",
        rich_help_panel=INPUT,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="wikitext2 or a text file. Default: wikitext2; for the bundled model its own "
        "held-out text.",
        rich_help_panel=INPUT,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Tokens per window. Default: 2048, or the model's limit.",
        rich_help_panel=INPUT,
        min=2,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=OUTPUT)
]

Card = Annotated[
    bool,
    typer.Option("--card", help="Write the result into the model card.", rich_help_panel=OUTPUT),
]


def evaluate(
    model: Model = None,
    ppl: Perplexity = True,
    reference: Reference = None,
    data: Data = None,
    window: Window = None,
    json_output: Json = False,
    card: Card = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "exact",
) -> None:
    """Perplexity by the GPTQ paper's protocol; if quantized, also against the float origin. The
    result is kept in the checkpoint's report, where it has one.
    """
    from quant.evaluate import evaluate
    from quant.evaluation_text import evaluation_ids, protocol
    from quant.formats import refuse_quantized
    from quant.loader import load_model
    from quant.model_card import write_card
    from quant.output import last_output
    from quant.progress import window_bar
    from quant.report import float_origin
    from quant.sources import open_checkpoint, open_tokenizer

    model = model or last_output()
    reference = reference or float_origin(model)
    if reference:
        refuse_quantized(open_checkpoint(reference), "give the float checkpoint to compare with")
    tokenizer = open_tokenizer(model)
    loaded = load_model(model, device, dtype, precision=precision)
    ids, facts = evaluation_ids(tokenizer, _usual_text(model, reference) if data is None else data)
    window = window or min(2048, loaded.config.max_position_embeddings)
    origin = load_model(reference, device, dtype, precision="exact") if reference else None
    with window_bar() as on_window:
        result = evaluate(loaded, ids, window, origin, on_window)
    text = f"{protocol(facts, result)}\n{result.summary()}"
    if card:
        write_card(model, text)
    as_json = {"model": str(model), "data": facts, **result.as_dict()}
    print(json.dumps(as_json) if json_output else text)
    _keep(model, {**facts, "precision": precision, **result.as_dict()})


def _usual_text(model: Path, reference: Path | None) -> str:
    """What a model is judged on if nothing is said: the bundled one on its own held-out text."""
    return str(BUNDLED / "heldout.txt") if BUNDLED in (model.resolve(), reference) else "wikitext2"


def _keep(model: Path, measured: dict[str, Any]) -> None:
    """Add the result to the report, and say so; a report that cannot be written is no error."""
    from quant.report_page import add_evaluation

    try:
        page = add_evaluation(model, measured)
    except (OSError, ValueError) as error:
        print(f"note: the result is not kept in the report: {error}", file=sys.stderr)
        return
    if page:
        print(f"report: {page}", file=sys.stderr)
