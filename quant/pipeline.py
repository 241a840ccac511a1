"""quantize_checkpoint(): from float to 4 bits, one layer in memory. Read this first.

    hidden = embedding of the calibration windows
    for each layer:                                         (the next one is read meanwhile)
        for each group of linears that share an input:      (calib.capture walks the layer)
            Hessian of that input  ->  solver  ->  integer codes
            the layer gets the dequantized codes            (what follows sees what is stored)
        codes and hidden states become durable              (while the next layer is at work)
    embedding, norm and head are copied; the finished folder is read back and compared.

Every linear's error is compared with round-to-nearest on the same Hessian, and both numbers are
reported. A run that was stopped goes on behind its last finished layer (quant.resume). Of several
processes (quant.distributed) each has its share of the windows and of the rows of every solve.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.capture import walk
from calib.hessian import Hessian
from calib.hidden import HiddenStates
from calib.sampling import check_windows
from quant import distributed
from quant.checkpoint import CheckpointReader
from quant.checkpoint_writer import CheckpointWriter
from quant.config import QuantConfig
from quant.fingerprint import fingerprint
from quant.follower import Follower, NoWriter
from quant.formats import FORMATS
from quant.geometry import check_shapes
from quant.group_solver import solve_group
from quant.layer_inputs import advance_float, embed, empty_states
from quant.layer_reader import LINEARS, build_layer, check_plain, plain_tensors, read_layers
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.model_card import write_card
from quant.partial import partial_folder
from quant.report import LinearReport, Report
from quant.resume import Journal
from quant.run_options import RunOptions, Step
from quant.solvers import solver_name
from quant.solvers.gptq import GPTQOptions
from quant.sources import open_checkpoint
from quant.verification import digest, verify


@dataclass
class _Run:
    """What the steps of one quantization share."""

    reader: CheckpointReader
    llama: LlamaConfig
    config: QuantConfig
    solver: Any
    options: RunOptions
    windows: Tensor  # of all processes
    mask: Tensor | None
    writer: Any = None
    journal: Any = None
    digests: dict[str, str] = field(default_factory=dict)  # of the layer at work

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    windows: Tensor,
    config: QuantConfig = QuantConfig(),  # noqa: B008 - frozen
    solver: Any = GPTQOptions(),  # noqa: B008 - frozen
    run_options: RunOptions = RunOptions(),  # noqa: B008 - frozen
    attention_mask: Tensor | None = None,
) -> Report:
    """Quantize a float Llama checkpoint, layer by layer.

    Args:
        model: folder of the float checkpoint (safetensors or pytorch_model*.bin).
        output: folder to make; it appears whole at the end, or not at all.
        windows: (windows, tokens) int64 token ids to calibrate on.
        config: bits, group size, symmetric.
        solver: the options of one of SOLVERS; their class says which.
        run_options: device, resume, memory, progress.
        attention_mask: (windows, tokens), 0 for padding, which must be on the right.

    Returns:
        The report that is also written to `quantize_report.json`.

    Raises:
        ValueError: the checkpoint, settings or windows do not fit; a tensor or activation is not
            finite.
        FileExistsError: `output` exists, or an earlier run that stopped.
        BlockingIOError: another process works on the same output.
        OSError: the disk is full; what is finished stays, and `resume` continues it.
    """
    start, output = time.perf_counter(), Path(output)
    reader, llama = _float_checkpoint(Path(model))
    check_shapes(llama, config)
    check_plain(reader, llama)
    mask = check_windows(windows, attention_mask, llama.vocab_size)
    with distributed.joined(), torch.inference_mode():
        run = _Run(reader, llama, config, solver, run_options, windows, mask)
        if distributed.rank() == 0:
            report = _lead(run, output, start)
        else:
            _follow(run)
        return distributed.from_first(lambda: report)


def _lead(run: _Run, output: Path, start: float) -> Report:
    """What the first process does: of a single one, everything."""
    options, config = run.options, run.config
    settings = {"solver": solver_name(run.solver), **vars(run.solver)}
    all_settings = {**asdict(config), **settings, **options.numerics()}
    marks = fingerprint(run.reader, run.windows, run.mask, all_settings)
    with partial_folder(output, options.resume, options.overwrite) as folder:
        shards = CheckpointWriter(folder)
        run.writer = FORMATS["autogptq"].Writer(folder, config, settings, shards)
        run.journal = journal = Journal(folder, marks, shards, len(run.windows))
        try:
            _fill(run)
        finally:
            journal.close()
        linears = [LinearReport.from_dict(d) for layer in journal.layers for d in layer.linears]
        path, windows = run.reader.path, run.windows
        report = Report.of_run(path, output, config, settings, windows, linears, start)
        report = replace(report.with_data(options.data), forecast=options.forecast)
        report.write(folder)
        write_card(folder)
        journal.forget_hidden()
    return report


def _follow(run: _Run) -> None:
    """What every other process does: its share of the windows and of the rows."""
    run.writer, run.journal = NoWriter(), Follower(len(run.windows))
    try:
        _quantize_layers(run)
    finally:
        run.journal.close()


def _fill(run: _Run) -> None:
    """Write the whole checkpoint, or what an earlier run left to do."""
    journal = run.journal
    journal.resume()
    _quantize_layers(run)
    if len(journal.layers) == run.llama.num_hidden_layers:
        _copy_plain(run)
        journal.commit([], {})
    run.writer.close(run.reader.config)
    run.reader.copy_companions(journal.folder)
    verify(journal.folder, {k: v for layer in journal.layers for k, v in layer.digests.items()})


def _quantize_layers(run: _Run) -> None:
    """Quantize the layers that are not finished yet, and wait until they are durable."""
    first = distributed.from_first(lambda: len(run.journal.layers))
    if first < run.llama.num_hidden_layers:
        for step in _layers(run, first):
            run.options.on_step(step)
        run.journal.wait()


def _float_checkpoint(path: Path) -> tuple[CheckpointReader, LlamaConfig]:
    """The opened checkpoint and its geometry; a quantized one is refused."""
    reader = open_checkpoint(path)
    if any(form.matches(reader) for form in FORMATS.values()):
        raise ValueError(
            f"{path}: is quantized already; give the float checkpoint it was made from"
        )
    return reader, LlamaConfig.from_dict(reader.config)


def _layers(run: _Run, first: int) -> Iterator[Step]:
    """Quantize the layers from `first` on; a Step after each group."""
    mine = distributed.share(len(run.windows))  # of the windows
    states = _hidden_states(run, run.windows[mine], first)
    aiming = getattr(run.solver, "target", 0) > 0
    originals = _original_states(run, run.windows[mine], first) if aiming else None
    mask = None if run.mask is None else run.mask[mine]
    for index, tensors in read_layers(run.reader, run.llama, first):
        prefix = f"model.layers.{index}."
        for name, tensor in tensors.items():
            if name.removesuffix(".weight") not in LINEARS:  # norms and biases stay as they are
                run.writer.add_plain(prefix + name, tensor)
        layer = build_layer(run.llama, tensors, run.device)
        done: list[LinearReport] = []
        beside = None if originals is None else (copy.deepcopy(layer), originals)
        walking = walk(layer, states, mask, run.device, run.options.budget, beside)
        for group, hessian in zip(LINEAR_GROUPS, walking, strict=True):
            distributed.sum_(hessian.matrix)
            if hessian.drift is not None:
                distributed.sum_(hessian.drift)
            hessian.tokens = distributed.total(hessian.tokens)
            if not torch.isfinite(hessian.matrix.diagonal()).all():
                raise ValueError(
                    f"{prefix}{group[0]}: its input is not finite; the model overflows here, or "
                    "the layer is damaged"
                )
            linears = _quantize_group(run, layer, prefix, group, hessian)
            done += linears
            yield Step(index, run.llama.num_hidden_layers, tuple(linears))
        run.journal.commit_later([asdict(linear) for linear in done], run.digests, states)
        run.digests = {}


def _hidden_states(run: _Run, windows: Tensor, first: int) -> HiddenStates:
    """The input of the first layer to do: the embedding's, or those kept by an earlier run."""
    states = empty_states(run.llama, windows, run.options.storage)
    if first:
        run.journal.load_hidden(states)
    else:
        embed(run.reader, states, windows)
    return states


def _original_states(run: _Run, windows: Tensor, first: int) -> HiddenStates:
    """The input of layer `first` in the float model; computed again when a run goes on."""
    states = empty_states(run.llama, windows, run.options.storage)
    embed(run.reader, states, windows)
    compute = (run.device, run.options.budget)
    advance_float(run.reader, run.llama, states, first, compute)
    return states


def _quantize_group(
    run: _Run, layer: DecoderLayer, prefix: str, group: tuple[str, ...], hessian: Hessian
) -> list[LinearReport]:
    """Solve a group of linears; write the codes, put their values into the layer."""
    weights: list[Tensor] = [layer.linear(name).weight for name in group]
    reports = []
    solved = solve_group(weights, hessian, run.config, run.solver)
    for name, weight, one in zip(group, weights, solved, strict=True):
        run.writer.add_quantized(prefix + name, one.tensor)
        run.digests[prefix + name] = digest(one.tensor)
        weight.copy_(one.tensor.dequantize())
        facts = (one.error, one.rtn_error, one.damp, hessian.tokens, weight.shape[1], one.notes)
        reports.append(LinearReport(prefix + name, *facts))
    return reports


def _copy_plain(run: _Run) -> None:
    """Embedding, final norm and head as they are; a head that repeats the embedding is left out."""
    for name in plain_tensors(run.llama):
        run.writer.add_plain(name, run.reader.tensor(name))
