"""The layers of a run one after another: the loop that pipeline.py frames.

A group of linears is solved where calib.capture pauses, with the Hessian of all tokens so far; the
layer then holds the dequantized codes, so what follows sees what is stored.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from calib.capture import last_hessian, walk
from calib.hessian import Hessian
from calib.hidden import HiddenStates
from quant import distributed
from quant.checkpoint import CheckpointReader
from quant.code_counts import CodeCounts
from quant.config import QuantConfig
from quant.equalized import equalize_first_
from quant.group_solver import solve_group
from quant.layer_inputs import advance_float, embed, empty_states, float_states
from quant.layer_reader import FINAL_NORM, LINEARS, LayerReader, build_layer, plain_tensors
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer, RMSNorm
from quant.machine import peak_memory_bytes, return_memory
from quant.report import LayerReport, LinearReport
from quant.run_options import RunOptions, Step
from quant.slopes import Slopes, backward, output_covariances
from quant.verification import digest

_MLP_INPUTS = LINEAR_GROUPS[2]


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
    head: LayerReport | None = None  # of lm_head, once it is quantized
    slopes: Slopes | None = None  # gradients to the layers' outputs

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    @property
    def equalize(self) -> float:
        return getattr(self.solver, "equalize", 0.0)


def layers(run: Run, first: int) -> Iterator[Step]:
    """Quantize the layers from `first` on; a Step after each group."""
    mine = distributed.share(len(run.windows))  # of the windows
    states = _hidden_states(run, run.windows[mine], first)
    aiming = getattr(run.solver, "needs_float", False)
    mask = None if run.mask is None else run.mask[mine]
    if first < run.llama.num_hidden_layers:
        originals = original_states(run, run.windows[mine], mask, first) if aiming else None
        run.slopes = _layer_slopes(run, run.windows[mine], mask)
        yield from _decoder_layers(run, first, states, originals, mask)
    if run.config.has_head:
        yield _quantize_head(run, states, mask)


def _decoder_layers(
    run: Run,
    first: int,
    states: HiddenStates,
    originals: HiddenStates | None,
    mask: Tensor | None,
) -> Iterator[Step]:
    """Quantize the layers from `first` on, and advance the hidden states through them."""
    start = time.perf_counter()
    reader = LayerReader(run.reader, run.llama)
    for index in range(first, run.llama.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = _build(run, reader.take(index), prefix)
        if run.device.type != "cpu":
            reader.ask(index + 1)
        equalize_first_(layer, originals or states, mask, run.equalize)
        done: list[LinearReport] = []
        beside = None if originals is None else (_float_copy(layer), originals)
        fisher = _output_fisher(run, index, beside)
        sink = getattr(run.solver, "sink", 0.0)
        walking = walk(layer, states, mask, run.device, run.options.budget, beside, sink)
        for group in LINEAR_GROUPS:
            hessian = next(walking)
            if group == _MLP_INPUTS:
                del layer.self_attn  # it has done its work, and solving the MLP takes most room
            weights = {prefix + name: layer.linear(name).weight for name in group}
            of_group = [fisher.pop(name) for name in group] if fisher else None
            linears = _quantize_linears(run, weights, hessian, of_group)
            del weights, of_group
            del hessian  # before the next one is made
            done += linears
            yield Step(index, run.llama.num_hidden_layers, tuple(linears))
        reader.ask(index + 1)
        deque(walking, maxlen=0)  # the layer's output
        seconds, start = time.perf_counter() - start, time.perf_counter()
        report = LayerReport(str(index), tuple(done), round(seconds, 3), peak_memory_bytes())
        run.journal.commit_later(asdict(report), run.digests, states)
        run.digests = {}
        return_memory()


def _float_copy(layer: DecoderLayer) -> DecoderLayer:
    """A layer that stays as it is, and that gradients can go through."""
    with torch.inference_mode(False):
        return copy.deepcopy(layer).requires_grad_(False)


def _layer_slopes(run: Run, windows: Tensor, mask: Tensor | None) -> Slopes | None:
    """The gradients to the outputs of all layers in this process's share of the tokens that the
    solver asks for; None where it asks for none.
    """
    tokens = getattr(run.solver, "fisher", 0) // distributed.world_size()
    if not tokens:
        return None
    count = max(1, tokens // windows.shape[1])
    windows, mask = windows[:count], None if mask is None else mask[:count]
    storage = replace(run.options.storage, dtype=torch.bfloat16)  # enough for covariances
    if storage.device == "cpu" and storage.spill is None:
        storage = replace(storage, spill=run.journal.folder)
    slopes = Slopes(run.llama, (len(windows), windows.shape[1]), storage)
    steps = backward(run.reader, run.llama, (windows, mask), slopes, run.device, lambda layer: None)
    deque(steps, maxlen=0)
    return_memory()
    return slopes


def _output_fisher(
    run: Run, index: int, beside: tuple[DecoderLayer, HiddenStates] | None
) -> dict[str, Tensor]:
    """The Fisher matrices of the outputs of a layer's linears, by name, where they are wanted."""
    if run.slopes is None or beside is None:
        return {}
    layer, states = beside
    inputs = states.present.read(slice(0, run.slopes.windows), states.hidden_size)
    slope = run.slopes.read(index + 1)
    found = output_covariances(layer, inputs.to(run.device), slope.to(run.device))
    for name in sorted(found):  # the same order in all processes
        distributed.sum_(found[name])
    return_memory()
    return found


def _build(run: Run, tensors: dict[str, Tensor], prefix: str) -> DecoderLayer:
    """The layer from its tensors; norms and biases are written as they are."""
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in LINEARS:
            run.writer.add_plain(prefix + name, tensor)
    return build_layer(run.llama, tensors, run.device)


def _quantize_head(run: Run, states: HiddenStates, mask: Tensor | None) -> Step:
    """Quantize lm_head behind the last layer; the caller makes it durable with what is copied."""
    start, layers = time.perf_counter(), run.llama.num_hidden_layers
    norm = RMSNorm(run.llama.hidden_size, run.llama.rms_norm_eps).to(run.device)
    norm.weight.copy_(run.reader.tensor(FINAL_NORM))
    hessian = last_hessian(norm, states, mask, run.device, run.options.budget)
    weight = run.reader.tensor("lm_head.weight").to(run.device, torch.float32, copy=True)
    linears = tuple(_quantize_linears(run, {"lm_head": weight}, hessian))
    seconds = round(time.perf_counter() - start, 3)
    run.head = LayerReport("head", linears, seconds, peak_memory_bytes())
    return Step(layers, layers, linears)


def _complete_(hessian: Hessian, name: str) -> None:
    """Make the Hessian of this process's windows that of all; `name` is of a linear it is for."""
    distributed.sum_(hessian.matrix)
    for beside_float in (hessian.drift, hessian.lag):
        if beside_float is not None:
            distributed.sum_(beside_float)
    hessian.tokens = distributed.total(hessian.tokens)
    if not torch.isfinite(hessian.matrix.diagonal()).all():
        raise ValueError(
            f"{name}: its input is not finite; the model overflows here, or the layer is damaged"
        )


def _hidden_states(run: Run, windows: Tensor, first: int) -> HiddenStates:
    """The input of the first layer to do: the embedding's, or those kept by an earlier run."""
    states = empty_states(run.llama, windows, run.options.storage)
    if first:
        run.journal.load_hidden(states)
    else:
        embed(run.reader, states, windows)
    return states


def original_states(run: Run, windows: Tensor, mask: Tensor | None, first: int) -> HiddenStates:
    """The input of layer `first` in the float model; computed again when a run goes on."""

    def prepare(layer: DecoderLayer) -> None:
        equalize_first_(layer, states, mask, run.equalize)

    states = float_states(run.llama, windows, run.options.storage)
    embed(run.reader, states, windows)
    compute = (run.device, run.options.budget)
    advance_float(run.reader, run.llama, states, first, compute, prepare)
    return states


def _quantize_linears(
    run: Run,
    weights: Mapping[str, Tensor],
    hessian: Hessian,
    fisher: list[Tensor] | None = None,
) -> list[LinearReport]:
    """Solve linears of one input; write their codes, put what these mean into the weights."""
    first = next(iter(weights))
    _complete_(hessian, first)
    reports = []
    config = run.config.of(first)
    solved = solve_group(list(weights.values()), hessian, config, run.solver, fisher)
    for (name, weight), one in zip(weights.items(), solved, strict=True):
        run.writer.add_quantized(name, one.tensor)
        run.digests[name] = digest(one.tensor)
        weight.copy_(one.tensor.dequantize())
        facts = (one.error, one.rtn_error, one.damp, hessian.tokens, weight.shape[1], one.notes)
        counts = CodeCounts.of(one.tensor)
        reports.append(LinearReport(name, *facts, counts, *one.aim_errors))
    return reports


def copy_plain(run: Run) -> None:
    """Embedding, final norm and head as they are; a head that repeats the embedding, or is
    quantized, is left out.
    """
    for name in plain_tensors(run.llama):
        if name == "lm_head.weight" and run.config.has_head:
            continue
        run.writer.add_plain(name, run.reader.tensor(name))
