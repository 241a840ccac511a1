"""llama2.c: one .bin file in version 0 (float32), 1 (float32) or 2 (int8), and tokenizer.bin.

The header is 7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len.
Version 0 begins with it, and a negative vocab_size says that the head is not the embedding.
Versions 1 and 2 put "ak42" and the version before it, a byte for the shared head and (2) an int32
group size behind it, and fill up to 256 bytes. Tensors follow without gaps, the same tensor of all
layers one after another; in version 2 a matrix is its int8 codes, then a float32 scale for each
group of them. q and k rows are in Meta's order. Source: github.com/karpathy/llama2.c, export.py.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.checkpoint import StoredType
from quant.sources import sentencepiece_model as sp
from quant.sources.beside import copy_beside
from quant.sources.translated import TranslatedReader
from quant.sources.translation import (
    LAYER_NAMES,
    model_config,
    positive,
    shapes,
    write_settings,
)

_MAGIC = 0x616B3432
_HEADER_BYTES = 256
_SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_MATRICES = tuple(f"{part}.weight" for part in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
_NORMS = ("attention_norm.weight", "ffn_norm.weight")


def matches(path: Path) -> bool:
    """Whether it is a .bin file."""
    return path.suffix == ".bin" and path.is_file()


@dataclass(frozen=True)
class _Header:
    version: int
    sizes: dict[str, int]
    shared: bool
    group_size: int
    start: int  # of the tensors


class Reader(TranslatedReader):
    """Tensors of a llama2.c file under Hugging Face names; see `quant.checkpoint`.

    Raises:
        ValueError: the header is impossible, or the file is not as long as it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = _read_header(path)
        self.config = self._config()
        # A size that the file cannot hold must be refused before a table is made of it.
        sizes = self._header.sizes
        layer = 2 * sizes["dim"] ** 2 + 3 * sizes["dim"] * sizes["hidden_dim"]
        if sizes["n_layers"] * layer > self.size_bytes:
            raise ValueError(
                f"{path}: {self.size_bytes} bytes are too few for n_layers {sizes['n_layers']}, "
                f"dim {sizes['dim']} and hidden_dim {sizes['hidden_dim']}; it is truncated, or not "
                "a llama2.c file"
            )
        self._shapes = shapes(self.config)
        self._offsets = self._lay_out()

    def _stored(self, name: str) -> Tensor:
        """The tensor in float32; int8 codes are multiplied by their scales."""
        shape, offset = self._shapes[name], self._offsets[name]
        if self._header.group_size and len(shape) == 2:
            count, group = math.prod(shape), self._header.group_size
            codes = self._map(np.int8, offset, (count // group, group))
            scales = self._map(np.float32, offset + count, (count // group, 1))
            return (codes.float() * scales).reshape(shape)
        return self._map(np.float32, offset, shape)

    def stored_types(self) -> dict[str, StoredType]:
        """int8 matrices in version 2; {} in the others, which are float32."""
        if not self._header.group_size:
            return {}
        vector, matrix = (
            StoredType("float32", 32),
            StoredType("int8", 8 + 32 / self._header.group_size),
        )
        return {n: matrix if len(shape) == 2 else vector for n, shape in self._shapes.items()}

    def copy_companions(self, folder: Path) -> None:
        """The tokenizer beside the file: tokenizer.model, or what is rebuilt of tokenizer.bin."""
        vocabulary = self.path.with_name("tokenizer.bin")
        if not copy_beside(self.path, folder) and vocabulary.is_file():
            pieces = read_vocabulary(vocabulary, self.config["vocab_size"])
            (folder / "tokenizer.model").write_bytes(sp.build(pieces, bos=1, eos=2))
        write_settings(folder, self.config)

    def _map(self, dtype: Any, offset: int, shape: tuple[int, ...]) -> Tensor:
        """A part of the file; changes to it stay in memory."""
        return torch.from_numpy(np.memmap(self.path, dtype, "c", offset, shape))

    def _config(self) -> dict[str, Any]:
        sizes = self._header.sizes
        return model_config(
            {
                "vocab_size": sizes["vocab_size"],
                "hidden_size": sizes["dim"],
                "intermediate_size": sizes["hidden_dim"],
                "num_hidden_layers": sizes["n_layers"],
                "num_attention_heads": sizes["n_heads"],
                "num_key_value_heads": sizes["n_kv_heads"],
                "max_position_embeddings": sizes["max_seq_len"],
                "tie_word_embeddings": self._header.shared,
                "torch_dtype": "float32",
            }
        )

    def _lay_out(self) -> dict[str, int]:
        """The offset of every tensor; the last one must end where the file ends."""
        offsets, position, group = {}, self._header.start, self._header.group_size
        for name in self._order():
            if name == "rotary":  # cos and sin, which are computed
                sizes = self._header.sizes
                position += sizes["max_seq_len"] * (sizes["dim"] // sizes["n_heads"]) * 4
                continue
            offsets[name] = position
            count = math.prod(self._shapes[name])
            if group and len(self._shapes[name]) == 2:
                if count % group:
                    raise ValueError(f"{self.path}: group_size {group} does not divide {name}")
                position += count + count // group * 4
            else:
                position += count * 4
        if position != self.size_bytes:
            raise ValueError(
                f"{self.path}: is {self.size_bytes} bytes long, {position} by its header; it is "
                "truncated, or not a llama2.c file"
            )
        return offsets

    def _order(self) -> list[str]:
        """Tensor names in the order of the file."""
        norms = [self._layers(name) for name in _NORMS]
        inner = {name.rpartition("attention.")[2].rpartition("feed_forward.")[2]: name
                 for name in LAYER_NAMES}  # fmt: skip
        matrices = [name for part in _MATRICES for name in self._layers(inner[part])]
        head = [] if self._header.shared else [_HEAD]
        if self._header.version:
            return [*norms[0], *norms[1], _NORM, _EMBEDDING, *matrices, *head]
        half = 4 * self._header.sizes["n_layers"]  # wq, wk, wv, wo
        attention, feed_forward = matrices[:half], matrices[half:]
        order = [_EMBEDDING, *norms[0], *attention, *norms[1], *feed_forward, _NORM]
        return [*order, "rotary", *head]

    def _layers(self, meta_name: str) -> list[str]:
        """Our names of one tensor in all layers."""
        count = self._header.sizes["n_layers"]
        return [f"model.layers.{index}.{LAYER_NAMES[meta_name]}" for index in range(count)]


def _read_header(path: Path) -> _Header:
    """The header of any version; ValueError for sizes that no model has."""
    with path.open("rb") as file:
        raw = file.read(_HEADER_BYTES)
    if len(raw) < 28:
        raise ValueError(f"{path}: {len(raw)} bytes are too few for a llama2.c header")
    magic, version = struct.unpack_from("<Ii", raw)
    if magic != _MAGIC:
        sizes = dict(zip(_SIZES, struct.unpack_from("<7i", raw), strict=True))
        shared = sizes["vocab_size"] > 0
        sizes["vocab_size"] = abs(sizes["vocab_size"])
        header = _Header(0, sizes, shared, 0, 28)
    elif version not in (1, 2) or len(raw) < _HEADER_BYTES:
        raise ValueError(f"{path}: llama2.c version {version} is unknown, or the header is cut off")
    else:
        sizes = dict(zip(_SIZES, struct.unpack_from("<7i", raw, 8), strict=True))
        shared, group_size = struct.unpack_from("<Bi", raw, 36)
        if version == 2 and group_size <= 0:
            raise ValueError(f"{path}: group_size is {group_size}; it must be positive")
        group_size = group_size if version == 2 else 0
        header = _Header(version, sizes, bool(shared), group_size, _HEADER_BYTES)
    positive(path, header.sizes, *_SIZES)
    heads, kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    if sizes["dim"] % heads or sizes["dim"] // heads % 2 or heads % kv_heads:
        raise ValueError(f"{path}: dim {sizes['dim']}, {heads} and {kv_heads} heads do not fit")
    return header


def read_vocabulary(path: Path, count: int) -> list[sp.Piece]:
    """The tokens of a tokenizer.bin.

    Raises:
        ValueError: it is damaged, or holds another number of tokens.
    """
    data, position = path.read_bytes(), 4
    pieces: list[sp.Piece] = []
    while position < len(data):
        if position + 8 > len(data):
            raise ValueError(f"{path}: token {len(pieces)} is cut off; the file is truncated")
        score, length = struct.unpack_from("<fi", data, position)
        text = data[position + 8 : position + 8 + max(length, 0)]
        if length < 0 or len(text) < length:
            raise ValueError(f"{path}: token {len(pieces)} has length {length}, beyond the file")
        pieces.append(_piece(path, len(pieces), text, score))
        position += 8 + length
    if len(pieces) != count:
        raise ValueError(f"{path}: holds {len(pieces)} tokens, the model's vocabulary is {count}")
    return pieces


def _piece(path: Path, index: int, raw: bytes, score: float) -> sp.Piece:
    """A token as sentencepiece has it: run.c wants spaces, and newlines around <s> and </s>."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: token {index} is not UTF-8") from None
    if not text or not math.isfinite(score):
        raise ValueError(f"{path}: token {index} is empty, or its score {score} is not finite")
    if index < 3:
        return sp.Piece(text.strip("\n "), score, sp.UNKNOWN if index == 0 else sp.CONTROL)
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return sp.Piece(text.replace(" ", "\u2581"), score, sp.BYTE if is_byte else sp.NORMAL)
