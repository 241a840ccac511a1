"""Checkpoints as compressed-tensors and AutoAWQ write them, for the tests of their readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.grid import Grid, QuantizedTensor
from quant.sources import open_checkpoint

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_tensor(shape: tuple[int, int], bits: int, symmetric: bool, group: int) -> Any:
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (shape[0], shape[1] // group), generator=generator)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(zeros.shape, generator=generator) + 0.5) * 0.01
    scales[::3] *= -1
    return QuantizedTensor(codes, Grid(scales.half().float(), zeros.to(torch.uint8), bits))


def compressed(name: str, qt: QuantizedTensor, symmetric: bool) -> dict[str, Tensor]:
    """The tensors as compressed-tensors' own packing makes them."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 2 ** (qt.bits - 1)
    state = {
        f"{name}.weight_packed": helpers.pack_to_int32(
            (qt.codes.int() - half).to(torch.int8), qt.bits
        ),
        f"{name}.weight_scale": qt.grid.scales.half(),
        f"{name}.weight_shape": torch.tensor(qt.codes.shape),
    }
    if not symmetric:
        signed = (qt.grid.zeros.int() - half).to(torch.int8)
        state[f"{name}.weight_zero_point"] = helpers.pack_to_int32(signed, qt.bits, packed_dim=0)
    return state


def awq(name: str, qt: QuantizedTensor, symmetric: bool) -> dict[str, Tensor]:
    """The tensors as AutoAWQ's gemm packing makes them, code by code."""

    def pack(codes: Tensor) -> Tensor:  # (rows, N) -> (rows, N / 8)
        wide = codes.numpy().astype(np.uint32)
        words = np.zeros((len(wide), wide.shape[1] // 8), np.uint32)
        for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= wide[:, place::8] << np.uint32(4 * i)
        return torch.from_numpy(words.view(np.int32))

    return {
        f"{name}.qweight": pack(qt.codes.T),
        f"{name}.qzeros": pack(qt.grid.zeros.T),
        f"{name}.scales": qt.grid.scales.half().T.contiguous(),
    }


def settings(form: str, bits: int, symmetric: bool, group: int) -> dict[str, Any]:
    if form == "awq":
        sizes = {"bits": bits, "group_size": group}
        return {"quant_method": "awq", "version": "gemm", "zero_point": True, **sizes}
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
    }
    group_0 = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group_0},
        "ignore": ["lm_head"],
    }


def foreign(
    source: Path, target: Path, form: str, bits: int, symmetric: bool
) -> dict[str, QuantizedTensor]:
    """A checkpoint whose linears are quantized at random; returns what is in it."""
    reader, state, held = open_checkpoint(source), {}, {}
    write = awq if form == "awq" else compressed
    for name in reader.names():
        module, tensor = name.removesuffix(".weight"), reader.tensor(name)
        if module.rpartition(".")[2] in LINEARS:
            shape = (tensor.shape[0], tensor.shape[1])
            held[module] = random_tensor(shape, bits, symmetric, 32)
            state |= write(module, held[module], symmetric)
        else:
            state[name] = tensor
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = {**reader.config, "quantization_config": settings(form, bits, symmetric, 32)}
    (target / "config.json").write_text(json.dumps(config))
    reader.copy_companions(target)
    return held
