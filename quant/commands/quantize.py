"""`quantize`: a float checkpoint in, a 4-bit checkpoint out."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from quant import distributed
from quant.commands import calibration, grids
from quant.commands.options import (
    BUNDLED,
    Device,
    Hidden,
    MaxMemory,
    Push,
    Resume,
    ShowPlan,
    Spill,
    Target,
)
from quant.commands.quantize_options import (
    ActOrder,
    Bits,
    Calibration,
    Damp,
    Effort,
    GroupSize,
    HeadBits,
    Length,
    Output,
    Overwrite,
    OwnWindows,
    Rotate,
    Samples,
    Seed,
    Solver,
    Source,
    Symmetric,
    TargetBpw,
    as_given,
    solver_options,
)


@distributed.joined()
def quantize(
    model: Source = BUNDLED,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    target: Target = None,
    push: Push = None,
    bits: Bits = 4,
    group_size: GroupSize = None,
    sym: Symmetric = True,
    lm_head_bits: HeadBits = None,
    target_bpw: TargetBpw = None,
    calib: Calibration = None,
    samples: Samples = 128,
    seq_len: Length = None,
    own_windows: OwnWindows = None,
    seed: Seed = 0,
    solver: Solver = "gptq",
    effort: Effort = "balanced",
    rotate: Rotate = False,
    act_order: ActOrder = True,
    damp: Damp = 0.01,
    device: Device = "auto",
    hidden: Hidden = "float32",
    spill: Spill = None,
    max_memory: MaxMemory = None,
    plan: ShowPlan = False,
) -> None:
    """Quantize a float checkpoint, layer by layer, into a folder that GPTQ readers load."""
    words = as_given(locals())
    from quant import publishing
    from quant.config import QuantConfig
    from quant.loader import resolve_device
    from quant.output import existing, refuse_overlap
    from quant.partial import in_the_way
    from quant.pipeline import open_float
    from quant.plan import job_of
    from quant.run_options import RunOptions

    if push is not None and distributed.rank() == 0:
        publishing.check_push(push)
    device = resolve_device(device)
    reader, llama = open_float(model)
    size = grids.usual_group_size(llama) if group_size is None else group_size
    config = grids.common(llama, QuantConfig(bits, size, sym), lm_head_bits, target)
    group = "row" if config.group_size == -1 else f"g{config.group_size}"
    output = output or Path(f"{_name(model)}-w{bits}-{group}")
    refuse_overlap(model, output)
    if not plan:
        _check_output(output, resume, overwrite)
    chosen = solver_options(solver, effort, act_order, damp, own_windows, rotate)
    length = seq_len or min(2048, llama.max_position_embeddings)
    sources = calib or ["stdlib"]
    windows = distributed.from_first(
        lambda: calibration.windows_of(model, sources, samples, length, seed)
    )
    told = " ".join(sources)
    data = f"{windows.numel()} tokens of {told}"
    if own := getattr(chosen, "own", 0):
        data += f" and {own * windows.shape[1]} of the model's own"
        told += " and the model"
    print(f"quantizing {model} to {bits} bits, {group}, on {data}", flush=True)
    calibration.advise(windows, llama, sources == ["stdlib"] and model.resolve() != BUNDLED)
    if target_bpw is not None:
        config = distributed.from_first(
            lambda: grids.finer(reader, llama, windows, config, target_bpw, device)
        )
        grids.check_target(target, llama, config)
    shape, storage = tuple(windows.shape), _storage(hidden, spill)
    job = job_of(reader, llama, config, shape, chosen, storage, device)
    job = _fitted(job, max_memory, output)
    forecast = distributed.from_first(lambda: _forecast(job, output))
    if plan:
        if obstacle := existing(output, overwrite, True) or in_the_way(output, resume, overwrite):
            print(f"note: {obstacle}")
    else:
        places = (device, overwrite, resume, job.storage, job.budget)
        run_options = RunOptions(*places, forecast=forecast, data=told, words=words)
        _run(model, output, windows, config, chosen, run_options)
    if push and not plan and distributed.rank() == 0:
        print(f"pushed: {publishing.push(output, push)}")


def _name(model: Path) -> str:
    """The name of a folder, or of a file without its ending."""
    return model.stem if model.is_file() else model.resolve().name


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is there already, unless the run goes on with it."""
    from quant.output import refuse_existing
    from quant.partial import is_finished

    if distributed.from_first(lambda: is_finished(output, resume, overwrite)):
        return
    if resume and not overwrite and output.exists():
        raise FileExistsError(
            f"{output}: exists already, and no run of it stopped; use it, or choose another name "
            "or pass --overwrite"
        )
    refuse_existing(output, overwrite, folder=True)


def _storage(hidden: str, spill: Path | None) -> Any:
    """Dtype and place of the activations between layers."""
    import torch

    from calib.hidden import Storage

    if hidden not in ("float32", "bfloat16"):
        raise ValueError(f"hidden {hidden!r} is not supported; there are float32 and bfloat16")
    if spill is not None and not (spill.is_dir() and os.access(spill, os.W_OK)):
        raise ValueError(f"spill {spill}: no folder that can be written to; name another")
    return Storage(getattr(torch, hidden), spill)


def _fitted(job: Any, max_memory: str | None, output: Path) -> Any:
    """The job that takes no more than that, with activations on the GPU if it has one with room."""
    from quant.machine import free_gpu_memory
    from quant.room import fit_memory, use_gpu_memory
    from quant.units import parse_size

    limit = None if max_memory is None else parse_size(max_memory)
    if limit is not None:
        job = fit_memory(job, limit, output.absolute().parent)
    if job.device == "cpu":
        return job
    room = int(0.8 * free_gpu_memory())  # what is free in pieces is not of use for all
    return use_gpu_memory(job, room if limit is None else min(limit, room))


def _forecast(job: Any, output: Path) -> dict[str, float]:
    """Print the plan; what the report keeps of it.

    Raises:
        ValueError: memory or disk does not suffice.
    """
    from quant.machine import measure
    from quant.plan import make_plan
    from quant.room import check_room

    plan = make_plan(job)
    try:
        rates = measure(output, job.device)
    except OSError:
        check_room(plan, output, job.storage.spill)
        raise
    print("\n".join(plan.lines(rates)), flush=True)
    check_room(plan, output, job.storage.spill)
    facts = {"seconds": round(plan.seconds(rates), 1), "peak_memory_bytes": plan.memory}
    return {**facts, "peak_gpu_memory_bytes": plan.gpu_memory} if plan.gpu_memory else facts


def _run(
    model: Path, output: Path, windows: Any, config: Any, solver: Any, run_options: Any
) -> None:
    """Quantize with progress on stderr; then say what came out."""
    from quant.output import remember
    from quant.partial import is_finished, kept
    from quant.pipeline import quantize_checkpoint
    from quant.progress import StepPrinter
    from quant.report_page import FILE_NAME as PAGE

    finished = is_finished(output, run_options.resume, run_options.overwrite)
    try:
        with StepPrinter() as printer:
            run_options = replace(run_options, on_step=printer, on_write=printer.wrote)
            report = quantize_checkpoint(model, output, windows, config, solver, run_options)
    except KeyboardInterrupt:
        if not (layers := kept(output)):
            raise
        told = f"interrupted; {layers}; continue with the same command and --resume"
        print(told, file=sys.stderr)
        raise typer.Exit(130) from None
    remember(output)
    if finished:
        print(f"checkpoint: {output}, which an earlier run had finished")
        return
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
    print(report.summary())
    print(report.against_forecast())
    print(f"report: {output / PAGE}")
    print(f"checkpoint: {output}")
