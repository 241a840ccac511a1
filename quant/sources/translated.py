"""What the readers of files with other names and Meta's row order have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from quant.checkpoint import StoredType
from quant.sources.translation import hugging_face_rows

_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


class TranslatedReader:
    """A `quant.checkpoint.CheckpointReader` over one file; a source fills in the attributes, reads
    a tensor as it is stored, and copies what belongs to it.

    Attributes:
        path: the file or folder.
        config: the geometry as `config.json` has it.
        _shapes: of every tensor by Hugging Face name, in the order of the model.
    """

    path: Path
    config: dict[str, Any]
    _shapes: dict[str, tuple[int, ...]]

    def names(self) -> list[str]:
        """All tensor names, in the order of the model."""
        return list(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def tensor(self, name: str) -> Tensor:
        """The tensor, q and k rows in Hugging Face's order.

        Raises:
            ValueError: there is no such tensor, or it is damaged.
        """
        if name not in self._shapes:
            raise ValueError(f"{self.path}: tensor {name} is missing from the checkpoint")
        weight, kind = self._stored(name), name.split(".")[-2]
        if kind not in _HEADS:
            return weight
        return hugging_face_rows(weight, self.config[_HEADS[kind]])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the file's own geometry gives; ValueError for no such tensor."""
        if name not in self._shapes:
            raise ValueError(f"{self.path}: tensor {name} is missing from the checkpoint")
        return self._shapes[name]

    def _stored(self, name: str) -> Tensor:
        """The tensor with its rows in the file's order."""
        raise NotImplementedError

    def stored_types(self) -> dict[str, StoredType]:
        """{}, unless the source has types beside torch's."""
        return {}

    def release(self) -> None:
        """Nothing is held: every tensor maps its own part of the file."""

    def files(self) -> list[Path]:
        """The file."""
        return [self.path]

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in self.files())
