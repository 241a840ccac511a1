"""The same model with its residual stream in a basis where no channel stands out.

Some channels of a Llama's residual stream may be far stronger than others, and so are the errors
of the weights that write to them or read from them. RMSNorm without its weight commutes with any
orthogonal Q, so

    embedding Q,   W diag(norm weight) Q for q, k, v, gate, up and head,   Q^T W for o and down

and norm weights of 1 give the same logits from a stream h Q (QuaRot, arXiv 2404.00456; SpinQuant's
R1, arXiv 2405.16406). Every input of q, k, v, gate and up is then a mixture of all channels, and so
is every output of o and down.

Q = diag(signs) (A x B), with the Kronecker product of two cosine transforms (DCT-II, whose entries
are all of a size) as near to square as the width allows, so that to rotate costs little. The file
holds what a Llama's always does. A head that repeats the embedding cannot take the final norm's
weight, so such models stay as they are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader, StoredType
from quant.layer_reader import EMBEDDING, FINAL_NORM
from quant.llama.config import LlamaConfig

_SEED = 0
_ROWS = 1024  # rotated at a time
_HEAD = "lm_head.weight"
_NORM_BEFORE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
_NORMS = frozenset(_NORM_BEFORE.values())
_ONTO_STREAM = ("o_proj", "down_proj")


class Rotation:
    """The orthogonal matrix Q of a width."""

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self._signs = 1.0 - 2 * torch.randint(0, 2, (width,), generator=generator)
        rows = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
        self._factors = _cosines(rows), _cosines(width // rows)

    def __call__(self, x: Tensor) -> Tensor:
        """x Q of x (..., width), in float32."""
        A, B = self._factors
        squares = (x.float() * self._signs).unflatten(-1, (len(A), len(B)))
        return (A.T @ (squares @ B)).flatten(-2)


def _cosines(size: int) -> Tensor:
    """The orthogonal DCT-II: column k holds cos(pi (j + 1/2) k / size), scaled to length 1."""
    at = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(torch.pi / size * (at[:, None] + 0.5) * at)
    return (waves / waves.norm(dim=0)).float()


def rotated(reader: CheckpointReader, llama: LlamaConfig) -> CheckpointReader:
    """The model of a float checkpoint in the basis of a Rotation; as it is if its head repeats the
    embedding.
    """
    return reader if llama.tie_word_embeddings else RotatedReader(reader, llama.hidden_size)


class RotatedReader:
    """A `quant.checkpoint.CheckpointReader` of another one's model in the basis of a Rotation;
    tensors keep their dtype.

    Args:
        reader: of a float checkpoint whose head does not repeat the embedding.
    """

    def __init__(self, reader: CheckpointReader, hidden_size: int) -> None:
        self._reader, self._rotation = reader, Rotation(hidden_size)
        self.path: Path = reader.path
        self.config: dict[str, Any] = reader.config

    def tensor(self, name: str) -> Tensor:
        """The tensor in the other basis, in the file's dtype; errors as those of the reader."""
        tensor = self._reader.tensor(name)
        *module, kind, attribute = name.split(".")
        if kind in _NORMS or name == FINAL_NORM:
            return torch.ones_like(tensor)
        if kind in _ONTO_STREAM:
            return self._rotated(tensor.t()).t().contiguous()
        if name == EMBEDDING:
            return self._rotated(tensor)
        if name == _HEAD:
            return self._rotated(tensor, FINAL_NORM)
        if kind in _NORM_BEFORE and attribute == "weight":
            return self._rotated(tensor, ".".join((*module[:-1], _NORM_BEFORE[kind], "weight")))
        return tensor

    def _rotated(self, tensor: Tensor, norm: str = "") -> Tensor:
        """Q applied to the rows of a tensor, once they are multiplied by a norm's weight."""
        factors = self._reader.tensor(norm).float() if norm else 1.0
        if tensor.dim() == 1:
            return self._rotation(tensor).to(tensor.dtype)
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        for start in range(0, len(tensor), _ROWS):
            rows = slice(start, start + _ROWS)
            out[rows] = self._rotation(tensor[rows].float() * factors)
        self._reader.release()  # mapped pages count as memory for as long as they are open
        return out

    def names(self) -> list[str]:
        """Those of the reader, as all that follows."""
        return self._reader.names()

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def stored_types(self) -> dict[str, StoredType]:
        return self._reader.stored_types()

    def release(self) -> None:
        self._reader.release()

    def files(self) -> list[Path]:
        return self._reader.files()

    @property
    def size_bytes(self) -> int:
        return self._reader.size_bytes

    def copy_companions(self, folder: Path) -> None:
        self._reader.copy_companions(folder)
