"""The relative error of every linear on text that no run was calibrated on.

tr(E H E^T) / tr(W H W^T) with E = W - Q and H of the float model's own activations, so that one set
of Hessians judges every checkpoint. A run that aims elsewhere than at W pays for that here.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from calib.capture import walk
from calib.hidden import Storage
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.layer_inputs import embed, empty_states
from quant.layer_reader import LayerReader, build_layer
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS
from quant.solvers.loss import output_energy
from quant.sources import open_checkpoint

Judged = dict[str, tuple[Tensor, Tensor, float]]  # weight, Hessian, energy by linear


def float_hessians(model: Path, windows: Tensor) -> Judged:
    """What to judge each linear of the float checkpoint with, on windows (count, tokens) of ids."""
    reader = open_checkpoint(model)
    llama = LlamaConfig.from_dict(reader.config)
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


def layer_error(folder: Path, judged: Judged) -> float:
    """Geometric mean over linears of the relative error of a quantized checkpoint."""
    reader, logs = open_checkpoint(folder), []
    form = next(form for form in FORMATS.values() if form.matches(reader))
    with torch.inference_mode():
        for name, value in form.read(reader):
            if isinstance(value, QuantizedTensor):
                weight, hessian, energy = judged[name.removesuffix(".weight")]
                lost = output_energy(weight - value.dequantize(), hessian).sum().item()
                logs.append(math.log(lost / energy))
    return math.exp(sum(logs) / len(logs))
