"""`bench kernels` and `bench decode`: how fast this machine multiplies and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from quant.commands.options import INPUT, OUTPUT, RUNTIME, Model, Precision

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures here.", rich_help_panel=OUTPUT)
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads. Default: as torch chooses.", rich_help_panel=RUNTIME, min=1),
]
Shapes = Annotated[
    str | None,
    typer.Option(
        help="Weights as KxN, separated by commas. Default: those of 7B, 70B and 135M models.",
        rich_help_panel=INPUT,
    ),
]
Rows = Annotated[
    str, typer.Option(help="Rows of activations (M), by commas.", rich_help_panel=INPUT)
]
Plot = Annotated[
    Path | None, typer.Option(help="Draw the roofline into this file.", rich_help_panel=OUTPUT)
]
Budget = Annotated[
    float,
    typer.Option(help="Seconds of timed calls for each figure.", rich_help_panel=RUNTIME, min=0),
]


def bench_kernels(
    json_file: JsonFile = None,
    plot: Plot = None,
    shapes: Shapes = None,
    rows: Rows = "1,2,4,8,16,32,128,512",
    threads: Threads = None,
    budget: Budget = 0.3,
) -> None:
    """Time our int4 kernel and those of others that are installed, taking turns."""
    from quant import bench, roofline

    sizes = _shapes(shapes) if shapes else bench.SHAPES
    counts = tuple(_number(m, "--rows") for m in rows.split(","))
    _set_threads(threads)
    machine = bench.measure_machine()
    print(
        f"{machine['processor']}, {machine['threads']} threads: reads {machine['read_gb_s']} GB/s, "
        f"multiplies {machine['sgemm_gflop_s']} GFLOP/s in float32"
    )
    machine |= _calls()
    print(
        f"{'K':>6}{'N':>7}{'M':>5} {'':5}{'kernel':33}{'ms':>10}{'GB/s':>9}{'GOP/s':>9}{'roof':>7}"
    )
    measured = []
    for row in bench.bench_kernels(machine, sizes, counts, budget):
        measured.append(row)
        print(
            f"{row.k:>6}{row.n:>7}{row.m:>5} {'cold' if row.cold else 'hot':5}"
            f"{row.backend + ' ' + row.mode:33}{row.ms:>10.3f}{row.gb_s:>9.2f}{row.gop_s:>9.1f}"
            f"{row.roof_share:>7.0%}"
        )
    if plot:
        roofline.plot(machine, measured, plot)
    _write(json_file, {"machine": machine, "rows": [dataclasses.asdict(r) for r in measured]})


def _calls() -> dict[str, float]:
    """Print what a call of our kernel takes, where it runs."""
    import torch

    from quant import bench
    from quant.kernels import cpu

    if not cpu.is_available(torch.device("cpu")):
        return {}
    calls = bench.measure_calls()
    print(
        f"a call of ours from Python: {calls['matmul_call_us']} us more than the compiled "
        f"function, {calls['linear_call_us']} us from a QuantLinear"
    )
    return calls


def bench_decode(
    model: Model = None,
    precision: Precision = "high",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens to read.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 64,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """Time a whole model on the CPU: tokens per second read and written."""
    from quant import bench
    from quant.loader import load_model
    from quant.output import last_output

    model = model or last_output()
    _set_threads(threads)
    loaded = load_model(model, "cpu", precision=precision)
    result = bench.bench_decode(loaded, prompt_tokens, new_tokens)
    print(
        f"reads {result['prefill_tokens_per_s']} tokens/s ({result['prompt_tokens']} at once), "
        f"writes {result['tokens_per_s']} tokens/s ({result['new_tokens']} after them), "
        f"{result['threads']} threads, precision {precision}"
    )
    _write(json_file, {"model": str(model), "precision": precision, **result})


def _set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "4096x4096,576x1536" -> ((4096, 4096), (576, 1536))."""
    sizes = []
    for shape in text.split(","):
        k, _, n = shape.partition("x")
        sizes.append((_number(k, "--shapes"), _number(n, "--shapes")))
        if sizes[-1][0] % 32:
            raise ValueError(f"--shapes {shape}: K {k} is not a multiple of 32, the smallest group")
    return tuple(sizes)


def _number(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise ValueError(f"{option}: {text!r} is not a positive number")
    return int(text)


def _write(path: Path | None, value: object) -> None:
    if path:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
