"""quantize_checkpoint(): from float to 4 bits, one layer in memory. Read this first.

    hidden = embedding of the calibration windows
    for each layer:
        read its weights
        for each group of linears that share an input:      (calib.capture walks the layer)
            Hessian of that input  ->  solver  ->  integer codes
            the layer gets the dequantized codes            (what follows sees what is stored)
            the codes go to the output shard
    embedding, norm and head are copied; the finished folder is read back and compared.

Every linear's error is compared with round-to-nearest on the same Hessian, and both numbers are
reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.capture import walk
from calib.sampling import check_windows
from quant.checkpoint import CheckpointReader
from quant.config import QuantConfig
from quant.formats import FORMATS
from quant.geometry import check_shapes
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.output import whole_folder
from quant.report import LinearReport, Report
from quant.solvers import solve, solver_name
from quant.solvers.gptq import GPTQOptions
from quant.solvers.loss import relative_error
from quant.solvers.rtn import RTNOptions
from quant.sources import open_checkpoint
from quant.verification import digest, verify


@dataclass(frozen=True)
class Step:
    """Progress: a group of linears of one layer is solved."""

    layer: int
    num_layers: int
    linears: tuple[LinearReport, ...]


@dataclass(frozen=True)
class RunOptions:
    """How a run goes; the result does not depend on it.

    Attributes:
        device: where layers are computed, "cpu" or "cuda".
        overwrite: replace the output folder if it exists.
        on_step: called after each solved group.
    """

    device: str = "cpu"
    overwrite: bool = False
    on_step: Callable[[Step], None] = lambda step: None


@dataclass
class _Run:
    """What the steps of one quantization share."""

    reader: CheckpointReader
    llama: LlamaConfig
    config: QuantConfig
    solver: Any
    device: torch.device
    writer: Any
    digests: dict[str, str] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)


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
        run_options: device, overwrite, progress.
        attention_mask: (windows, tokens), 0 for padding, which must be on the right.

    Returns:
        The report that is also written to `quantize_report.json`.

    Raises:
        ValueError: the checkpoint, settings or windows do not fit; a tensor or activation is not
            finite.
        FileExistsError: `output` exists.
    """
    start, output = time.perf_counter(), Path(output)
    reader, llama = _float_checkpoint(Path(model))
    check_shapes(llama, config)
    mask = check_windows(windows, attention_mask, llama.vocab_size)
    settings = {"solver": solver_name(solver), **vars(solver)}
    with whole_folder(output, run_options.overwrite) as folder, torch.inference_mode():
        writer = FORMATS["autogptq"].Writer(folder, config, settings)
        run = _Run(reader, llama, config, solver, torch.device(run_options.device), writer)
        for step in _layers(run, windows, mask):
            run_options.on_step(step)
        _copy_plain(run)
        writer.close(reader.config)
        reader.copy_companions(folder)
        verify(folder, run.digests)
        report = Report.of_run(reader.path, output, config, settings, windows, run.linears, start)
        report.write(folder)
    return report


def _float_checkpoint(path: Path) -> tuple[CheckpointReader, LlamaConfig]:
    """The opened checkpoint and its geometry; a quantized one is refused."""
    reader = open_checkpoint(path)
    if any(form.matches(reader) for form in FORMATS.values()):
        raise ValueError(
            f"{path}: is quantized already; give the float checkpoint it was made from"
        )
    return reader, LlamaConfig.from_dict(reader.config)


def _layers(run: _Run, windows: Tensor, mask: Tensor | None) -> Iterator[Step]:
    """Quantize all layers; a Step after each group."""
    embedding = run.reader.tensor("model.embed_tokens.weight")
    hidden = embedding[windows].float()  # (windows, tokens, hidden_size)
    del embedding
    for index in range(run.llama.num_hidden_layers):
        layer = _read_layer(run, index)
        walking = walk(layer, hidden, mask, run.device)
        for group, hessian in zip(LINEAR_GROUPS, walking, strict=True):
            prefix = f"model.layers.{index}."
            if not torch.isfinite(hessian.matrix.diagonal()).all():
                raise ValueError(
                    f"{prefix}{group[0]}: its input is not finite; the model overflows here, or "
                    "the layer is damaged"
                )
            linears = _solve_group(run, layer, prefix, group, hessian.matrix, hessian.tokens)
            run.linears += linears
            yield Step(index, run.llama.num_hidden_layers, tuple(linears))
        run.writer.flush()
        run.reader.release()


def _read_layer(run: _Run, index: int) -> DecoderLayer:
    """Layer `index` in float32 on the device; its norms and biases go to the output as they are."""
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        layer = DecoderLayer(run.llama)
    linears = {name for group in LINEAR_GROUPS for name in group}
    state = {}
    for name, empty in layer.state_dict().items():
        tensor = run.reader.tensor(prefix + name)
        if tensor.shape != empty.shape:
            raise ValueError(
                f"{prefix}{name}: shape {tuple(tensor.shape)} in the file, {tuple(empty.shape)} "
                "by config.json"
            )
        state[name] = tensor.to(run.device, torch.float32)
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{prefix}{name}: holds NaN or inf; the checkpoint is damaged")
        if name.removesuffix(".weight") not in linears:
            run.writer.add_plain(prefix + name, tensor)
    layer.load_state_dict(state, assign=True)
    return layer


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
