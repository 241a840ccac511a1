"""What every reader of weights offers, whatever its files look like (`quant/sources`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.llama.config import LlamaConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be


@dataclass(frozen=True)
class StoredType:
    """A file's own type of a tensor: its name, and bits of a value with its share of scales."""

    name: str
    bits: float

    @property
    def rounded(self) -> bool:
        """Whether values were rounded to a grid of few levels."""
        return self.bits < 16


class CheckpointReader(Protocol):
    """Tensors of a checkpoint by Hugging Face name, one at a time.

    Attributes:
        path: the file or folder.
        config: the geometry as `config.json` has it.
    """

    path: Path
    config: dict[str, Any]

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor in the file's dtype, memory-mapped where the format allows.

        Raises:
            ValueError: there is no such tensor, or its file is damaged.
        """
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header.

        Raises:
            ValueError: as in `tensor`.
        """
        ...

    def stored_types(self) -> dict[str, StoredType]:
        """Of every tensor, in files that have types beside torch's; {} of others."""
        ...

    def release(self) -> None:
        """Close the files; tensors in use keep their memory, everything else is unmapped."""
        ...

    def files(self) -> list[Path]:
        """All weight files, by name."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        ...

    def copy_companions(self, folder: Path) -> None:
        """Write tokenizer and generation files, as Hugging Face names them, into a folder."""
        ...


def check_float(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a weight's dtype is none that is computed with, as float8 and int8."""
    if tensor.dtype not in FLOATS:
        *some, last = (str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(
            f"{name}: is {str(tensor.dtype).removeprefix('torch.')} in the file; weights must be "
            f"{', '.join(some)} or {last}"
        )


def coarse_linear(reader: CheckpointReader) -> str:
    """The first tensor of a layer that the file holds in less than 8 bits a value, or ""."""
    types = reader.stored_types()
    return next((name for name in types if types[name].bits < 8 and ".layers." in name), "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def module_names(names: Iterable[str], suffix: str) -> list[str]:
    """Names ending in `suffix`, without it."""
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]


def llama_config(reader: CheckpointReader) -> LlamaConfig:
    """The geometry of a checkpoint.

    Raises:
        ValueError: as `LlamaConfig.from_dict`, naming the checkpoint too.
    """
    try:
        return LlamaConfig.from_dict(reader.config)
    except ValueError as error:
        raise ValueError(f"{reader.path}: {error}") from None
