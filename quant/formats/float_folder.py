"""A plain Llama folder in one float dtype: for fine-tuning, and tools that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.formats.rounding import Rounding
from quant.grid import QuantizedTensor
from quant.stream_writer import StreamWriter


class Writer:
    """Streams a float checkpoint into a folder.

    Args:
        folder: where to write; made by the caller.
        dtype: of every tensor.
        shards: where tensors go.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, shards: StreamWriter) -> None:
        self.folder, self.dtype, self._shards = folder, dtype, shards
        self._rounding = Rounding()

    def add_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Write the values of the linear called `name` (without ".weight"); raises as
        `add_plain` does.
        """
        full_name = f"{name}.weight"
        self._shards.add(full_name, self._rounding.round_grid(full_name, qt, self.dtype))

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            ValueError: a value is not finite in the dtype.
        """
        self._shards.add(name, self._rounding.round(name, tensor, self.dtype))

    def flush(self) -> None:
        """Put what was added so far on the disk."""
        self._shards.flush()

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
        return self._rounding.notes()
