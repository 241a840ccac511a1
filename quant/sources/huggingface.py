"""Hugging Face folders: config.json and safetensors or the older pytorch_model*.bin.

Files are mapped into memory and tensors come in the dtype of the file. It takes a single
safetensors file, shards with an index, and the older pytorch_model*.bin (unpickled with
weights_only).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.checkpoint import StoredType, read_json
from quant.sources.pickled import load_pickled

COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def matches(path: Path) -> bool:
    """Whether there is a folder with a config.json."""
    return (path / "config.json").is_file()


class Reader:
    """Tensors of a checkpoint folder by name.

    Attributes:
        path: the folder.
        config: `config.json` as a dict.

    Raises:
        ValueError: no usable config.json, no weights, or a shard that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self._files: dict[Path, Any] = {}
        self._places = self._locate()

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> Tensor:
        """The tensor in the file's dtype, memory-mapped where the format allows.

        Raises:
            ValueError: there is no such tensor, or its shard is damaged.
        """
        return self._get(name, "get_tensor")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file; errors as in `tensor`."""
        part = self._get(name, "get_slice")
        return tuple(part.shape if isinstance(part, Tensor) else part.get_shape())

    def _get(self, name: str, method: str) -> Any:
        """What that method of the shard's handle gives for the name; of .bin files, the tensor."""
        if name not in self._places:
            raise ValueError(f"{self.path}: tensor {name} is missing from the checkpoint")
        shard = self._open(self._places[name])
        try:
            return shard[name] if isinstance(shard, dict) else getattr(shard, method)(name)
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{self._places[name]}: tensor {name} cannot be read ({error})"
            ) from None

    def stored_types(self) -> dict[str, StoredType]:
        """{}: tensors are of torch's types."""
        return {}

    def release(self) -> None:
        """Close the files; tensors in use keep their memory, everything else is unmapped."""
        self._files.clear()

    def files(self) -> list[Path]:
        """All weight files, by name."""
        return sorted(set(self._places.values()))

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in self.files())

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer and generation files to another folder."""
        for name in COMPANIONS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor."""
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self.path / index).is_file():
                return self._locate_by_index(self.path / index)
        singles = ["model.safetensors", "pytorch_model.bin"]
        singles += sorted(path.name for path in self.path.glob("gptq_model-*.safetensors"))
        for name in singles:
            file = self.path / name
            if file.is_file():
                return dict.fromkeys(self._open(file).keys(), file)
        raise ValueError(
            f"{self.path}: no weights; expected model.safetensors, its index, or pytorch_model*.bin"
        )

    def _locate_by_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map")
        places = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: weight_map sends {name} to {file!r}, no file name")
            places[name] = self.path / file
        for file in sorted(set(places.values())):
            if not file.is_file():
                raise ValueError(
                    f"{file}: shard is named in {index.name} but missing; download it again"
                )
        return places

    def _open(self, file: Path) -> Any:
        """An open shard: a safetensors handle, or a dict for .bin files; kept open."""
        if file not in self._files:
            if file.suffix == ".bin":
                self._files[file] = load_pickled(file)
            else:
                try:
                    self._files[file] = safe_open(file, framework="pt")
                except (SafetensorError, OSError, ValueError) as error:
                    raise ValueError(
                        f"{file}: damaged or truncated ({error}); download it again"
                    ) from error
        return self._files[file]
