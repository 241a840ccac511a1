"""The command line: parse, call, print. Everything heavy is imported where it is used, so that --help is instant."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

BUNDLED = Path(__file__).parent / "quant" / "bundled"
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

INPUT, GRID, CALIBRATION, SOLVING = "Input and output", "Grid", "Calibration", "Solving"
Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint folder. Default: the one quantized last.", rich_help_panel=INPUT),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can cause into one line on stderr and exit code 2; Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("interrupted; nothing was written under the final name", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Quantize Llama 2 checkpoints to 4 bits with GPTQ, judge them, and run them."""
    if context.invoked_subcommand is None:
        print("Three commands to start with (each has --help):")
        print("  python cli.py quantize --bits 4      quantize the bundled model, or yours with --model PATH")
        print("  python cli.py eval --ppl             how good is the result?")
        print('  python cli.py generate "def "        write text with it')


@app.command()
@one_line_errors
def quantize(
    model: Annotated[
        Path, typer.Option(help="Float checkpoint folder. Default: the bundled model.", rich_help_panel=INPUT)
    ] = BUNDLED,
    output: Annotated[
        Path | None, typer.Option(help="Folder to make. Default: MODEL-wBITS-gGROUP.", rich_help_panel=INPUT)
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it exists.", rich_help_panel=INPUT)] = False,
    bits: Annotated[int, typer.Option(help="Bits per weight: 2, 3, 4 or 8.", rich_help_panel=GRID)] = 4,
    group_size: Annotated[
        int, typer.Option(help="Inputs per scale: a multiple of 32, or -1 for rows.", rich_help_panel=GRID)
    ] = 128,
    sym: Annotated[
        bool, typer.Option("--sym/--asym", help="Fixed zero, or one per group.", rich_help_panel=GRID)
    ] = True,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            help="stdlib, wikitext2, c4, or a file or folder (may be repeated). Default: stdlib.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text.", rich_help_panel=CALIBRATION)] = 128,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window. Default: 2048, or the model's limit.", rich_help_panel=CALIBRATION),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.", rich_help_panel=CALIBRATION)] = 0,
    solver: Annotated[str, typer.Option(help="gptq or rtn (round to nearest).", rich_help_panel=SOLVING)] = "gptq",
    act_order: Annotated[
        bool, typer.Option(help="Most active inputs first; free at run time.", rich_help_panel=SOLVING)
    ] = True,
    damp: Annotated[float, typer.Option(help="Fraction of the mean diagonal.", rich_help_panel=SOLVING)] = 0.01,
    device: Device = "auto",
) -> None:
    """Quantize a float checkpoint, layer by layer, into a folder that GPTQ readers load."""
    from calib.sampling import token_windows
    from calib.sources import documents
    from quant.checkpoint import CheckpointReader
    from quant.config import QuantConfig
    from quant.geometry import fitting_group_size
    from quant.llama.config import LlamaConfig
    from quant.llama.tokenizer import load_tokenizer
    from quant.loader import resolve_device
    from quant.output import refuse_existing, remember
    from quant.pipeline import quantize_checkpoint
    from quant.progress import StepPrinter
    from quant.solvers import SOLVERS
    from quant.solvers.gptq import GPTQOptions

    reader = CheckpointReader(model)
    llama = LlamaConfig.from_dict(reader.config)
    config = QuantConfig(bits, group_size, sym)
    fitting = fitting_group_size(llama, group_size)
    if fitting != group_size:
        print(f"group size {group_size} does not divide every linear of this model; using {fitting}")
    config = replace(config, group_size=fitting)
    group_name = "row" if fitting == -1 else f"g{fitting}"
    output = output or Path(f"{model.resolve().name}-w{bits}-{group_name}")
    refuse_existing(output, overwrite)
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; there are {', '.join(SOLVERS)}")
    options = GPTQOptions(act_order, damp) if solver == "gptq" else SOLVERS[solver][1]()
    length = seq_len or min(2048, llama.max_position_embeddings)
    windows = token_windows(load_tokenizer(model).encode, documents(calib or ["stdlib"]), samples, length, seed)
    print(
        f"quantizing {model} to {bits} bits, {group_name}, "
        f"on {windows.numel()} tokens of {' '.join(calib or ['stdlib'])}"
    )
    with StepPrinter(llama.num_hidden_layers) as printer:
        report = quantize_checkpoint(
            model,
            output,
            windows,
            config,
            solver,
            options,
            resolve_device(device),
            overwrite,
            on_step=printer,
        )
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
    remember(output)
    print(report.summary())
    print(f"checkpoint: {output}")


@app.command(name="eval")
@one_line_errors
def evaluate_command(
    model: Model = None,
    ppl: Annotated[bool, typer.Option("--ppl", help="Perplexity (also the default).")] = True,
    reference: Annotated[
        Path | None,
        typer.Option(help="Float checkpoint to compare with. Default: where it came from.", rich_help_panel=INPUT),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="wikitext2 or a text file. Default: held-out text for the bundled model, else wikitext2.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window. Default: 2048, or the model's limit.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    device: Device = "auto",
) -> None:
    """Perplexity by the GPTQ paper's protocol; for a quantized checkpoint also against its float origin."""
    from quant.evaluate import evaluate
    from quant.evaluation_text import evaluation_ids, protocol
    from quant.llama.tokenizer import load_tokenizer
    from quant.loader import load_model
    from quant.output import last_output
    from quant.report import float_origin

    model = model or last_output()
    reference = reference or float_origin(model)
    loaded = load_model(model, device)
    data = data or (str(BUNDLED / "heldout.txt") if BUNDLED in (model.resolve(), reference) else "wikitext2")
    ids, facts = evaluation_ids(load_tokenizer(model), data)
    window = window or min(2048, loaded.config.max_position_embeddings)
    result = evaluate(loaded, ids, window, load_model(reference, device) if reference else None)
    if json_output:
        print(json.dumps({"model": str(model), "data": facts, **result.as_dict()}))
        return
    print(protocol(facts, result))
    print(result.summary())


@app.command()
@one_line_errors
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Probability mass to sample from, 0 to 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
) -> None:
    """Continue a text."""
    from quant.llama import generate as generation
    from quant.llama.tokenizer import load_tokenizer
    from quant.loader import load_model
    from quant.output import last_output

    model = model or last_output()
    sampling = generation.Sampling(temperature, top_p, seed)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, device)
    ids = tokenizer.encode(prompt)
    stream = tokenizer.stream(ids)
    print(prompt, end="", flush=True)
    ends = {*tokenizer.eos_ids, *loaded.config.eos_token_ids}
    for token in generation.generate(loaded, ids, max_new_tokens, sampling, ends):
        print(stream.push(token), end="", flush=True)
    print(stream.flush())


@app.command()
@one_line_errors
def inspect(path: Annotated[Path, typer.Argument(help="Checkpoint folder.")]) -> None:
    """Geometry, size and format of a checkpoint; for a float one, what quantizing it takes."""
    from quant.inspection import describe

    for name, value in describe(path).items():
        print(f"{name + ':':22}{value}")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
