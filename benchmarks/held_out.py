"""The relative error of every linear on text that no run was calibrated on.

tr(E H E^T) / tr(W H W^T) with E = W - Q and H of the float model's own activations, so that one set
of Hessians judges every checkpoint of a basis. A run that aims elsewhere than at W pays for that
here. What `quant.equalized` moved between linears is moved back.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.capture import walk
from calib.hidden import Storage
from quant.checkpoint import CheckpointReader
from quant.equalized import WRITERS, columns_of
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.layer_inputs import embed, empty_states
from quant.layer_reader import LayerReader, build_layer
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS
from quant.rotated import rotated
from quant.solvers.loss import output_energy
from quant.sources import open_checkpoint

Judged = dict[str, tuple[Tensor, Tensor, float]]  # weight, Hessian, energy by linear


def float_hessians(model: Path, windows: Tensor, rotate: bool = False) -> Judged:
    """What to judge each linear of the float checkpoint with, on windows (count, tokens) of ids;
    in the basis of `quant.rotated` if asked.
    """
    reader: CheckpointReader = open_checkpoint(model)
    llama = LlamaConfig.from_dict(reader.config)
    if rotate:
        reader = rotated(reader, llama)
    states, judged = empty_states(llama, windows, Storage()), {}
    with torch.inference_mode():
        embed(reader, states, windows)
        layers = LayerReader(reader, llama)
        for index in range(llama.num_hidden_layers):
            layer = build_layer(llama, layers.take(index), torch.device("cpu"))
            for group, hessian in zip(LINEAR_GROUPS, walk(layer, states), strict=True):
                for name in group:
                    weight = layer.linear(name).weight
                    energy = output_energy(weight, hessian.matrix).sum().item()
                    judged[f"model.layers.{index}.{name}"] = weight, hessian.matrix, energy
    return judged


def layer_error(folder: Path, judged: Judged, equalized: bool = False) -> float:
    """Geometric mean over linears of the relative error of a quantized checkpoint."""
    reader, logs = open_checkpoint(folder), []
    form = next(form for form in FORMATS.values() if form.matches(reader))
    with torch.inference_mode():
        read = {
            name.removesuffix(".weight"): value.dequantize()
            for name, value in form.read(reader)
            if isinstance(value, QuantizedTensor)
        }
        if equalized:
            _move_back(read, judged, reader.config)
        for name, value in read.items():
            weight, hessian, energy = judged[name]
            lost = output_energy(weight - value, hessian).sum().item()
            logs.append(math.log(lost / energy))
    return math.exp(sum(logs) / len(logs))


def _move_back(read: dict[str, Tensor], judged: Judged, config: dict[str, Any]) -> None:
    """Give the rows of v and up the float model's sizes, and the columns that read them too: those
    by which their outputs come closest to the float model's.
    """
    llama = LlamaConfig.from_dict(config)
    for name in read:
        layer, *reading = name.rsplit(".", 2)
        if (written := WRITERS.get(".".join(reading))) is None:
            continue
        written_by = f"{layer}.{written}"
        (original, hessian, _), now = judged[written_by], read[written_by]
        reach = original @ hessian
        ratio = (now * reach).sum(1) / (original * reach).sum(1)
        now /= ratio[:, None]
        read[name] *= columns_of(ratio, read[name].shape[1], llama.head_dim)
