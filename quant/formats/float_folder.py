"""A plain Llama folder in one float dtype: for fine-tuning, and tools that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.stream_writer import StreamWriter


class Writer:
    """Streams a float checkpoint into a folder.

    Args:
        folder: where to write; made by the caller.
        dtype: of every tensor.
        shards: where tensors go.

    Attributes:
        largest_error: the largest relative change of a value by rounding to `dtype`.
        where: the tensor in which it is.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shards: StreamWriter) -> None:
        self.folder, self.dtype, self._shards = folder, dtype, shards
        self.largest_error, self.where = 0.0, ""

    def add_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Write the values of the linear called `name` (without ".weight")."""
        self.add_plain(f"{name}.weight", qt.dequantize())

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            ValueError: a value is too large for the dtype.
        """
        rounded = tensor.to(self.dtype)
        if rounded.dtype != tensor.dtype:
            self._measure(name, tensor, rounded)
        self._shards.add(name, rounded)

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self, model_config: dict[str, Any]) -> None:
        """Finish the shards and write config.json."""
        self._shards.close()
        kept = {key: value for key, value in model_config.items() if key != "quantization_config"}
        key = "dtype" if "dtype" in kept else "torch_dtype"
        kept[key] = str(self.dtype).removeprefix("torch.")
        text = json.dumps(kept, indent=1) + "\n"
        (self.folder / "config.json").write_text(text, encoding="utf-8")

    def notes(self) -> list[str]:
        """What was not exact, one line each."""
        if not self.largest_error:
            return []
        name = str(self.dtype).removeprefix("torch.")
        return [
            f"values are rounded to {name}, by at most {self.largest_error:.2g} of their size "
            f"({self.where}); float32 holds every value"
        ]

    def _measure(self, name: str, tensor: Tensor, rounded: Tensor) -> None:
        """Note the largest relative change; subnormal numbers are measured against the smallest
        normal one.
        """
        exact = tensor.float()
        change = (rounded.float() - exact).abs_()
        if not torch.isfinite(change).all():
            raise ValueError(
                f"{name}: holds values that are not finite in {self.dtype}; export to float32"
            )
        error = float((change / exact.abs().clamp_(min=torch.finfo(self.dtype).tiny)).max())
        if error > self.largest_error:
            self.largest_error, self.where = error, name
