"""The layers of a run one after another: the loop that pipeline.py frames.

A group of linears is solved where calib.capture pauses, with the Hessian of all tokens so far; the
layer then holds the dequantized codes, so what follows sees what is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from calib.capture import walk
from calib.hessian import Hessian
from calib.hidden import HiddenStates
from quant import distributed
from quant.checkpoint import CheckpointReader
from quant.config import QuantConfig
from quant.group_solver import solve_group
from quant.layer_inputs import advance_float, embed, empty_states
from quant.layer_reader import LINEARS, build_layer, read_layers
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.report import LinearReport
from quant.run_options import RunOptions, Step
from quant.verification import digest


@dataclass
class Run:
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


def layers(run: Run, first: int) -> Iterator[Step]:
    """Quantize the layers from `first` on; a Step after each group."""
    mine = distributed.share(len(run.windows))  # of the windows
    states = _hidden_states(run, run.windows[mine], first)
    aiming = getattr(run.solver, "needs_float", False)
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
            for beside_float in (hessian.drift, hessian.lag):
                if beside_float is not None:
                    distributed.sum_(beside_float)
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


def _hidden_states(run: Run, windows: Tensor, first: int) -> HiddenStates:
    """The input of the first layer to do: the embedding's, or those kept by an earlier run."""
    states = empty_states(run.llama, windows, run.options.storage)
    if first:
        run.journal.load_hidden(states)
    else:
        embed(run.reader, states, windows)
    return states


def _original_states(run: Run, windows: Tensor, first: int) -> HiddenStates:
    """The input of layer `first` in the float model; computed again when a run goes on."""
    states = empty_states(run.llama, windows, run.options.storage)
    embed(run.reader, states, windows)
    compute = (run.device, run.options.budget)
    advance_float(run.reader, run.llama, states, first, compute)
    return states


def _quantize_group(
    run: Run, layer: DecoderLayer, prefix: str, group: tuple[str, ...], hessian: Hessian
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
        reports.append(LinearReport(prefix + name, *facts, *one.aim_errors))
    return reports
