"""quantize_checkpoint(): a float checkpoint in, a 4-bit checkpoint out, one layer in memory. Read this first.

    hidden = embedding of the calibration windows
    for each layer:
        read its weights
        for each group of linears that share an input:      (calib.capture walks the layer)
            Hessian of that input  ->  solver  ->  integer codes
            the layer gets the dequantized codes            (what follows sees the stored weights, bit for bit)
            the codes go to the output shard
    embedding, norm and head are copied; the finished folder is read back and compared.

Every linear's error is compared with round-to-nearest on the same Hessian, and both numbers are reported.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.capture import walk
from quant.checkpoint import CheckpointReader
from quant.config import QuantConfig
from quant.formats import FORMATS
from quant.geometry import check_shapes
from quant.grid import QuantizedTensor
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.output import whole_folder
from quant.report import LinearReport, Report
from quant.solvers import SOLVERS
from quant.solvers.loss import relative_error
from quant.solvers.rtn import solve as round_to_nearest


@dataclass(frozen=True)
class Step:
    """Progress: a group of linears of one layer is solved."""

    layer: int
    num_layers: int
    linears: tuple[LinearReport, ...]


@dataclass
class _Run:
    """What the steps of one quantization share."""

    reader: CheckpointReader
    llama: LlamaConfig
    config: QuantConfig
    solver: str
    options: Any
    device: torch.device
    writer: Any
    digests: dict[str, str] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    windows: Tensor,
    config: QuantConfig | None = None,
    solver: str = "gptq",
    options: Any = None,
    device: str = "cpu",
    overwrite: bool = False,
    attention_mask: Tensor | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Report:
    """Quantize a float Llama checkpoint, layer by layer.

    Args:
        model: folder of the float checkpoint (safetensors or pytorch_model*.bin).
        output: folder to make; it appears whole at the end, or not at all.
        windows: (windows, tokens) int64 token ids to calibrate on.
        config: bits, group size, symmetric.
        solver: a name in SOLVERS; `options` is an instance of its options class.
        device: where layers are computed, "cpu" or "cuda".
        overwrite: replace `output` if it exists.
        attention_mask: (windows, tokens), 0 for padding, which must be on the right.
        on_step: called after each solved group.

    Returns:
        The report that is also written to `quantize_report.json`.

    Raises:
        ValueError: the checkpoint, settings or windows do not fit; a tensor or activation is not finite.
        FileExistsError: `output` exists.
    """
    start, output, config = time.perf_counter(), Path(output), config or QuantConfig()
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; there are {', '.join(SOLVERS)}")
    options = options or SOLVERS[solver][1]()
    reader = CheckpointReader(Path(model))
    if any(form.matches(reader) for form in FORMATS.values()):
        raise ValueError(f"{model}: is quantized already; give the float checkpoint it was made from")
    llama = LlamaConfig.from_dict(reader.config)
    check_shapes(llama, config)
    mask = _checked_mask(windows, attention_mask, llama)
    with whole_folder(output, overwrite) as folder, torch.inference_mode():
        settings = {"solver": solver, **vars(options)}
        writer = FORMATS["autogptq"].Writer(folder, config, settings)
        run = _Run(reader, llama, config, solver, options, torch.device(device), writer)
        for step in _layers(run, windows, mask):
            on_step(step)
        _copy_plain(run)
        writer.close(reader.config)
        reader.copy_companions(folder)
        _verify(folder, run.digests)
        report = Report.of_run(reader.path, output, config, settings, windows, run.linears, start)
        report.write(folder)
    return report


def _checked_mask(windows: Tensor, attention_mask: Tensor | None, llama: LlamaConfig) -> Tensor | None:
    """The mask as bool, after checking that windows are ids of this model and padding is on the right."""
    if windows.dim() != 2 or not windows.numel():
        raise ValueError(f"calibration windows: shape {tuple(windows.shape)}, expected (windows, tokens), not empty")
    if int(windows.max()) >= llama.vocab_size or int(windows.min()) < 0:
        raise ValueError(
            f"calibration windows: token id {int(windows.max())} is outside the model's vocabulary of "
            f"{llama.vocab_size}; the tokenizer belongs to another model"
        )
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if mask.shape != windows.shape:
        raise ValueError(f"attention_mask: shape {tuple(mask.shape)}, but windows have {tuple(windows.shape)}")
    if not torch.equal(mask, mask.long().cummin(dim=1).values.bool()):
        raise ValueError("attention_mask: padding must be on the right of each window")
    return mask


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
                    f"{prefix}{group[0]}: its input is not finite; the model overflows here, or the layer is damaged"
                )
            linears = _solve_group(run, layer, prefix, group, hessian.matrix, hessian.tokens)
            run.linears += linears
            yield Step(index, run.llama.num_hidden_layers, tuple(linears))


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
                f"{prefix}{name}: shape {tuple(tensor.shape)} in the file, {tuple(empty.shape)} by config.json"
            )
        state[name] = tensor.to(run.device, torch.float32)
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{prefix}{name}: holds NaN or inf; the checkpoint is damaged")
        if name.removesuffix(".weight") not in linears:
            run.writer.add_plain(prefix + name, tensor)
    layer.load_state_dict(state, assign=True)
    return layer


def _solve_group(
    run: _Run, layer: DecoderLayer, prefix: str, group: tuple[str, ...], hessian: Tensor, tokens: int
) -> list[LinearReport]:
    """Solve the linears of one group as one stack of rows; write the codes, put their values into the layer."""
    weights: list[Tensor] = [layer.linear(name).weight for name in group]
    stack = torch.cat(weights) if len(weights) > 1 else weights[0]
    solution = SOLVERS[run.solver][0](stack, hessian, run.config, run.options)
    plain = round_to_nearest(stack, hessian, run.config, SOLVERS["rtn"][1]())
    reports, row = [], 0
    for name, weight in zip(group, weights, strict=True):
        rows = slice(row, row + len(weight))
        row = rows.stop
        qt = solution.tensor.rows(rows)
        dense = qt.dequantize()
        error = relative_error(weight, dense, hessian)
        rtn_error = relative_error(weight, plain.tensor.rows(rows).dequantize(), hessian)
        reports.append(
            LinearReport(prefix + name, error, rtn_error, solution.damp, tokens, weight.shape[1], solution.notes)
        )
        run.writer.add_quantized(prefix + name, qt)
        run.digests[prefix + name] = _digest(qt)
        weight.copy_(dense)
    return reports


def _copy_plain(run: _Run) -> None:
    """Embedding, final norm and head as they are; a head that repeats the embedding is left out."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not run.llama.tie_word_embeddings:
        names.append("lm_head.weight")
    for name in names:
        run.writer.add_plain(name, run.reader.tensor(name))


def _digest(qt: QuantizedTensor) -> str:
    """A hash of codes, scales and zeros."""
    parts = (qt.codes, qt.grid.scales.to(torch.float16), qt.grid.zeros)
    return hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)).hexdigest()


def _verify(folder: Path, digests: dict[str, str]) -> None:
    """Read the finished checkpoint and compare every code, scale and zero with the solver's."""
    seen = {}
    for name, value in FORMATS["autogptq"].read(CheckpointReader(folder)):
        if isinstance(value, QuantizedTensor):
            seen[name] = _digest(value)
    different = sorted(name for name in digests if seen.get(name) != digests[name])
    if different:
        raise OSError(f"{folder}: read back, {different[0]} differs from what was written; the disk is not reliable")
