"""quantize_checkpoint(): from float to 4 bits, one layer in memory. Read this first.

    hidden = embedding of the calibration windows
    for each layer:                                         (the next one is read meanwhile)
        for each group of linears that share an input:      (calib.capture walks the layer)
            Hessian of that input  ->  solver  ->  integer codes
            the layer gets the dequantized codes            (what follows sees what is stored)
        codes and hidden states become durable              (while the next layer is at work)
    embedding, norm and head are copied; the finished folder is read back and compared.

Every linear's error is compared with round-to-nearest on the same Hessian, and both numbers are
reported. A run that was stopped goes on behind its last finished layer (quant.resume).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.capture import walk
from calib.hidden import HiddenStates
from calib.sampling import check_windows
from quant.checkpoint import CheckpointReader
from quant.checkpoint_writer import CheckpointWriter
from quant.config import QuantConfig
from quant.fingerprint import fingerprint
from quant.formats import FORMATS
from quant.geometry import check_shapes
from quant.layer_reader import LINEARS, build_layer, read_layers
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.partial import partial_folder
from quant.report import LinearReport, Report
from quant.resume import Journal
from quant.run_options import RunOptions, Step
from quant.solvers import solve, solver_name
from quant.solvers.gptq import GPTQOptions
from quant.solvers.loss import relative_error
from quant.solvers.rtn import RTNOptions
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
    writer: Any
    journal: Journal
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
    mask = check_windows(windows, attention_mask, llama.vocab_size)
    settings = {"solver": solver_name(solver), **vars(solver)}
    all_settings = {**asdict(config), **settings, **run_options.numerics()}
    marks = fingerprint(reader, windows, mask, all_settings)
    with (
        partial_folder(output, run_options.resume, run_options.overwrite) as folder,
        torch.inference_mode(),
    ):
        shards = CheckpointWriter(folder)
        writer = FORMATS["autogptq"].Writer(folder, config, settings, shards)
        journal = Journal(folder, marks, shards)
        run = _Run(reader, llama, config, solver, run_options, writer, journal)
        try:
            _fill(run, windows, mask)
        finally:
            journal.close()
        linears = [LinearReport.from_dict(d) for layer in journal.layers for d in layer.linears]
        report = Report.of_run(reader.path, output, config, settings, windows, linears, start)
        report = replace(report, forecast=run_options.forecast)
        report.write(folder)
        journal.forget_hidden()
    return report


def _fill(run: _Run, windows: Tensor, mask: Tensor | None) -> None:
    """Write the whole checkpoint, or what an earlier run left to do."""
    journal = run.journal
    journal.resume()
    if len(journal.layers) < run.llama.num_hidden_layers:
        for step in _layers(run, windows, mask):
            run.options.on_step(step)
        journal.wait()
    if len(journal.layers) == run.llama.num_hidden_layers:
        _copy_plain(run)
        journal.commit([], {})
    run.writer.close(run.reader.config)
    run.reader.copy_companions(journal.folder)
    verify(journal.folder, {k: v for layer in journal.layers for k, v in layer.digests.items()})


def _float_checkpoint(path: Path) -> tuple[CheckpointReader, LlamaConfig]:
    """The opened checkpoint and its geometry; a quantized one is refused."""
    reader = open_checkpoint(path)
    if any(form.matches(reader) for form in FORMATS.values()):
        raise ValueError(
            f"{path}: is quantized already; give the float checkpoint it was made from"
        )
    return reader, LlamaConfig.from_dict(reader.config)


def _layers(run: _Run, windows: Tensor, mask: Tensor | None) -> Iterator[Step]:
    """Quantize the layers that are not finished yet; a Step after each group."""
    states, first = _hidden_states(run, windows), len(run.journal.layers)
    for index, tensors in read_layers(run.reader, run.llama, first):
        prefix = f"model.layers.{index}."
        for name, tensor in tensors.items():
            if name.removesuffix(".weight") not in LINEARS:  # norms and biases stay as they are
                run.writer.add_plain(prefix + name, tensor)
        layer = build_layer(run.llama, tensors, run.device)
        done: list[LinearReport] = []
        walking = walk(layer, states, mask, run.device, run.options.budget)
        for group, hessian in zip(LINEAR_GROUPS, walking, strict=True):
            if not torch.isfinite(hessian.matrix.diagonal()).all():
                raise ValueError(
                    f"{prefix}{group[0]}: its input is not finite; the model overflows here, or "
                    "the layer is damaged"
                )
            linears = _solve_group(run, layer, prefix, group, hessian.matrix, hessian.tokens)
            done += linears
            yield Step(index, run.llama.num_hidden_layers, tuple(linears))
        run.journal.commit_later([asdict(linear) for linear in done], run.digests, states)
        run.digests = {}


def _hidden_states(run: _Run, windows: Tensor) -> HiddenStates:
    """The input of the first layer to do: the embedding's, or those kept by an earlier run."""
    llama = run.llama
    widest = llama.num_attention_heads * llama.head_dim
    count, tokens = windows.shape
    states = HiddenStates(count, tokens, llama.hidden_size, widest, run.options.storage)
    if run.journal.layers:
        run.journal.load_hidden(states)
    else:
        embedding = run.reader.tensor("model.embed_tokens.weight")
        states.set_windows(embedding[window] for window in windows)
        del embedding
        run.reader.release()
    return states


def _solve_group(
    run: _Run,
    layer: DecoderLayer,
    prefix: str,
    group: tuple[str, ...],
    hessian: Tensor,
    tokens: int,
) -> list[LinearReport]:
    """Solve the linears of one group as one stack of rows; write the codes, put their values into
    the layer.
    """
    weights: list[Tensor] = [layer.linear(name).weight for name in group]
    stack = torch.cat(weights) if len(weights) > 1 else weights[0]
    solution = solve(stack, hessian, run.config, run.solver)
    plain = solve(stack, hessian, run.config, RTNOptions())
    reports, row = [], 0
    for name, weight in zip(group, weights, strict=True):
        rows = slice(row, row + len(weight))
        row = rows.stop
        qt = solution.tensor.rows(rows)
        dense = qt.dequantize()
        error = relative_error(weight, dense, hessian)
        rtn_error = relative_error(weight, plain.tensor.rows(rows).dequantize(), hessian)
        reports.append(
            LinearReport(
                prefix + name,
                error,
                rtn_error,
                solution.damp,
                tokens,
                weight.shape[1],
                solution.notes,
            )
        )
        run.writer.add_quantized(prefix + name, qt)
        run.digests[prefix + name] = digest(qt)
        weight.copy_(dense)
    return reports


def _copy_plain(run: _Run) -> None:
    """Embedding, final norm and head as they are; a head that repeats the embedding is left out."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not run.llama.tie_word_embeddings:
        names.append("lm_head.weight")
    for name in names:
        run.writer.add_plain(name, run.reader.tensor(name))
