"""The quantized layers of a run, read back from its part files one at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quant.checkpoint_writer import Part
from quant.config import QuantConfig
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.layer_reader import LINEARS


class FinishedLayers:
    """What the solver left of each layer.

    Args:
        folder: where the part files are.
        parts: those of each layer.
        config: bits and groups, as they were written.
        device: where they are read to.
    """

    def __init__(
        self,
        folder: Path,
        parts: list[list[Part]],
        config: QuantConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self._files = [[folder / part.name for part in layer] for layer in parts]
        self._config, self._device = config, device

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """The linears of a layer by their name within it, and its other tensors."""
        prefix = f"model.layers.{index}."
        stored: dict[str, Tensor] = {}
        for path in self._files[index]:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]
                read = {name: file.get_tensor(name).to(self._device) for name in names}
                stored |= {name.removeprefix(prefix): tensor for name, tensor in read.items()}
        read_module = FORMATS["autogptq"].read_module
        linears = {
            name: read_module(name, stored, self._config.of(prefix + name))
            for name in sorted(LINEARS)
        }
        plain = {
            name: tensor.clone()
            for name, tensor in stored.items()
            if name.rpartition(".")[0] not in LINEARS or name.endswith(".bias")
        }
        return linears, plain


def scale_gradient(weight_gradient: Tensor, tensor: QuantizedTensor) -> Tensor:
    """dL/ds = sum over the group of dL/dW (code - zero), because W = s (code - zero).

    Args:
        weight_gradient: (out, in) float.
        tensor: the linear, in groups of consecutive columns.

    Returns:
        (out, groups), in the dtype of `weight_gradient`.
    """
    shape = (*tensor.grid.scales.shape, -1)  # (out, groups, width)
    steps = tensor.codes.view(shape).to(weight_gradient.dtype) - tensor.grid.zeros[..., None]
    return torch.linalg.vecdot(weight_gradient.reshape(shape), steps)
