"""Files written by torch.save, read without running what they say."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file by name, memory-mapped; nothing in it is executed.

    Raises:
        ValueError: the file is damaged, holds other things than dense tensors, or a tensor that
            claims more bytes than the file has.
    """
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        if stranger := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file}: holds more than tensors ({stranger[1]}), so it is not loaded, and "
                "nothing in it was run; give a file of tensors alone, best of all safetensors"
            ) from None
        first_line = str(error).splitlines()[0] if str(error) else ""
        if not first_line or "weights_only" in str(error):  # torch's advice there is to trust it
            first_line = type(error).__name__
        raise ValueError(
            f"{file}: damaged or truncated ({first_line}); download it again"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds {type(state).__name__}, not tensors by name")
    size_bytes = file.stat().st_size
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: entry {name!r:.60} is not a tensor under a name")
        if (
            tensor.layout != torch.strided
            or not tensor.is_contiguous()
            or tensor.is_meta
            or tensor.numel() * tensor.element_size() > size_bytes
        ):
            raise ValueError(
                f"{file}: tensor {name} of shape {tuple(tensor.shape)} is not a dense tensor "
                "within the file"
            )
    return state
