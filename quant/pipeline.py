"""quantize_checkpoint(): from float to 4 bits, one layer in memory. Read this first.

    hidden = embedding of the calibration windows
    for each layer:                                         (the next one is read meanwhile)
        for each group of linears that share an input:      (layer_loop.py; calib.capture walks)
            Hessian of that input  ->  solver  ->  integer codes
            the layer gets the dequantized codes            (what follows sees what is stored)
        codes and hidden states become durable              (while the next layer is at work)
    embedding, norm and head are copied; the finished folder is read back and compared.

Every linear's error is compared with round-to-nearest on the same Hessian, and both numbers are
reported. A run that was stopped goes on behind its last finished layer (quant.resume). Of several
processes (quant.distributed) each has its share of the windows and of the rows of every solve.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.sampling import check_windows
from quant import distributed
from quant.checkpoint import CheckpointReader, llama_config
from quant.checkpoint_writer import CheckpointWriter
from quant.config import QuantConfig
from quant.fingerprint import fingerprint
from quant.follower import Follower, NoWriter
from quant.formats import FORMATS, refuse_quantized
from quant.geometry import check_shapes
from quant.layer_loop import Run, copy_plain, layers
from quant.layer_reader import DamagedLayer, check_headers, check_plain
from quant.llama.config import LlamaConfig
from quant.loader import load_model
from quant.machine import return_memory
from quant.model_card import write_card
from quant.output import refuse_overlap
from quant.own_windows import bits_in_memory, in_turn, own_windows
from quant.partial import is_finished, kept, partial_folder, remove_notes
from quant.report import LayerReport, Report
from quant.report_page import write_page
from quant.resume import Journal
from quant.rotated import rotated
from quant.run_options import RunOptions
from quant.run_state import RunState
from quant.solvers import solver_name
from quant.solvers.gptq_options import GPTQOptions
from quant.sources import open_checkpoint
from quant.verification import verify


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    windows: Tensor,
    config: QuantConfig = QuantConfig(),  # noqa: B008 - frozen
    solver: Any = GPTQOptions(),  # noqa: B008 - frozen
    run_options: RunOptions = RunOptions(),  # noqa: B008 - frozen
    attention_mask: Tensor | None = None,
) -> Report:
    """Quantize a float Llama checkpoint, layer by layer; returns what quantize_report.json holds.

    Args:
        model: folder of the float checkpoint (safetensors or pytorch_model*.bin).
        output: folder to make; it appears whole at the end, or not at all.
        windows: (windows, tokens) int64 token ids to calibrate on.
        config: bits, group size, symmetric; linears with another grid, and whether the head is one.
        solver: the options of one of SOLVERS; their class says which. The command line's are
            EFFORTS["balanced"]; those of GPTQOptions() leave out what takes more time.
        run_options: device, resume, memory, progress.
        attention_mask: (windows, tokens), 0 for padding, which must be on the right.

    Raises:
        ValueError: the checkpoint, settings or windows do not fit; a tensor or activation is not
            finite.
        FileExistsError: `output` exists, or an earlier run that stopped; or it is `model`.
        BlockingIOError: another process works on the same output.
        OSError: the disk is full; what is finished stays, and `resume` continues it.
    """
    start, output = time.perf_counter(), Path(output)
    refuse_overlap(model, output)
    reader, llama = open_float(Path(model))
    check_shapes(llama, config)
    check_plain(reader, llama)
    mask = check_windows(windows, attention_mask, llama.vocab_size)
    with distributed.joined(), torch.inference_mode():
        distributed.check_device(run_options.device)
        if getattr(solver, "rotate", False):
            reader = rotated(reader, llama)
        run = Run(reader, llama, config, solver, run_options, windows, mask)
        if report := distributed.from_first(lambda: _finished(run, output)):
            return report
        with _telling_how_to_go_on(output):
            if distributed.rank() == 0:
                report = _lead(run, output, start)
            else:
                _follow(run)
        return distributed.from_first(lambda: report)


@contextmanager
def _telling_how_to_go_on(output: Path) -> Iterator[None]:
    """Let a damaged layer say what is kept."""
    try:
        yield
    except DamagedLayer as error:
        go_on = "; mend the file, and continue with the same command and --resume"
        layers = kept(output)
        raise DamagedLayer(f"{error}{f'; {layers}{go_on}' if layers else ''}") from None


def _finished(run: Run, output: Path) -> Report | None:
    """The report of a checkpoint that lacks no more than the removal of its run's notes, which are
    removed; None if there is none.
    """
    options = run.options
    if not is_finished(output, options.resume, options.overwrite):
        return None
    RunState.read(output).refuse_other(output, _marks(run), options.words)
    report = Report.read(output)
    remove_notes(output)
    return report


def _marks(run: Run) -> dict[str, Any]:
    """What a run must have in common with the one it continues."""
    settings = {**run.config.settings(), **_solver_settings(run), **run.options.numerics()}
    return fingerprint(run.reader, run.windows, run.mask, settings)


def _solver_settings(run: Run) -> dict[str, Any]:
    return {"solver": solver_name(run.solver), **vars(run.solver)}


def _lead(run: Run, output: Path, start: float) -> Report:
    """What the first process does: of a single one, everything."""
    options, config, settings = run.options, run.config, _solver_settings(run)
    with partial_folder(output, options.resume, options.overwrite) as folder:
        shards = CheckpointWriter(folder)
        run.writer = FORMATS["autogptq"].Writer(folder, config, settings, shards)
        facts = (_marks(run), options.words)
        run.journal = journal = Journal(folder, *facts, shards, _all_windows(run))
        try:
            journal.resume()
            _add_own_windows(run)
            _fill(run)
        except DamagedLayer:
            journal.note_damage()
            raise
        finally:
            journal.close()
        layers = [LayerReport.from_dict(d.report) for d in journal.layers if d.report]
        path, windows = run.reader.path, run.windows
        report = Report.of_run(path, output, config, settings, windows, layers, start)
        report = replace(report.with_data(options.data), forecast=options.forecast)
        report.write(folder)
        write_card(folder)
        write_page(folder)
        journal.forget_hidden()
    return report


def _follow(run: Run) -> None:
    """What every other process does: its share of the windows and of the rows."""
    run.writer, run.journal = NoWriter(), Follower(_all_windows(run))
    try:
        _add_own_windows(run)
        _quantize_layers(run)
    finally:
        run.journal.close()


def _all_windows(run: Run) -> int:
    """How many there are in all processes, with those that the model writes."""
    return len(run.windows) + getattr(run.solver, "own", 0)


def _add_own_windows(run: Run) -> None:
    """Put the windows that the solver asks for among those of a run: what an earlier run kept, or
    written by all processes.
    """
    count, tokens = getattr(run.solver, "own", 0), run.windows.shape[1]
    if not count:
        return
    found = distributed.from_first(lambda: run.journal.kept_windows(tokens))
    if found is None:
        device = run.options.device
        model = load_model(run.reader.path, device, bits=bits_in_memory(device))
        mine = distributed.share(count)
        written = own_windows(model, run.windows, count, mine, run.options.on_write)
        del model
        return_memory()
        found = distributed.gather_rows(written, count)
        run.journal.keep_windows(found)
    run.windows = in_turn(run.windows, found)
    if run.mask is not None:
        run.mask = in_turn(run.mask, torch.ones_like(found, dtype=run.mask.dtype))


def _fill(run: Run) -> None:
    """Write the whole checkpoint, or what an earlier run left to do."""
    journal = run.journal
    _quantize_layers(run)
    if len(journal.layers) == run.llama.num_hidden_layers:
        copy_plain(run)
        journal.commit_plain(asdict(run.head) if run.head else {}, run.digests)
    run.writer.close(run.reader.config)
    run.reader.copy_companions(journal.folder)
    verify(journal.folder, {k: v for layer in journal.layers for k, v in layer.digests.items()})


def _quantize_layers(run: Run) -> None:
    """Quantize the layers that are not finished yet, and wait until they are durable."""
    first = distributed.from_first(lambda: len(run.journal.layers))
    if first < run.llama.num_hidden_layers + run.config.has_head:
        for step in layers(run, first):
            run.options.on_step(step)
        run.journal.wait()


def open_float(path: Path) -> tuple[CheckpointReader, LlamaConfig]:
    """The opened checkpoint and its geometry.

    Warns where its values were rounded to 8 bits before.

    Raises:
        ValueError: it is quantized, damaged, or no Llama.
    """
    reader = open_checkpoint(path)
    rounded = {name: type for name, type in reader.stored_types().items() if type.rounded}
    refuse_quantized(reader, "give the float checkpoint it was made from")
    if rounded:
        names = ", ".join(sorted({type.name for type in rounded.values()}))
        warnings.warn(  # told once: stacklevel 1 is the same place for every caller
            f"{path}: its weights were rounded before ({names}), and quantizing rounds them again; "
            "better give the float checkpoint it was made from",
            stacklevel=1,
        )
    llama = llama_config(reader)
    check_headers(reader, llama)
    return reader, llama
