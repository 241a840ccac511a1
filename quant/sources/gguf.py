"""GGUF files of the architecture `llama`, dequantized exactly.

Tensors are memory-mapped and one at a time becomes values (gguf_blocks.py); q and k rows come in
Meta's order and get Hugging Face's. The sentencepiece vocabulary is rebuilt as tokenizer.model; for
another kind, put tokenizer.json beside the file.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quant.checkpoint import StoredType
from quant.sources.beside import copy_beside
from quant.sources.gguf_blocks import row_bytes, stored_type, values
from quant.sources.gguf_header import TensorInfo, read_header
from quant.sources.gguf_vocabulary import rebuild
from quant.sources.translated import TranslatedReader
from quant.sources.translation import (
    model_config,
    positive,
    shapes,
    write_settings,
)

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def matches(path: Path) -> bool:
    """Whether it is a .gguf file."""
    return path.suffix == ".gguf" and path.is_file()


class Reader(TranslatedReader):
    """Tensors of a GGUF file under Hugging Face names; see `quant.checkpoint`.

    Raises:
        ValueError: no Llama, damaged, of a type that is not supported, or in several files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: is empty; not a GGUF file")
        self._keys, infos = read_header(path, np.memmap(path, np.uint8, "r"))
        self._infos = self._translate(infos)
        self.config = self._read_config()
        self._shapes = shapes(self.config)
        for name, shape in self._shapes.items():
            self._check(name, shape)

    def _stored(self, name: str) -> Tensor:
        """F32, F16 and BF16 as they are, other types as float32."""
        info = self._infos[name]
        size = _size_bytes(info)
        raw = np.memmap(self.path, np.uint8, "c", info.offset, (size,))
        return values(info.kind, raw, info.shape)

    def stored_types(self) -> dict[str, StoredType]:
        """GGUF's type of every tensor."""
        return {name: stored_type(info.kind, info.shape[-1]) for name, info in self._infos.items()}

    def copy_companions(self, folder: Path) -> None:
        """The tokenizer beside the file, or the one in it, and the settings."""
        model, prefix = self._keys.get("tokenizer.ggml.model"), "tokenizer.ggml.add_"
        if not copy_beside(self.path, folder):
            if model == "llama":
                model_file = rebuild(self.path, self._keys, self.config)
                (folder / "tokenizer.model").write_bytes(model_file)
            else:
                warnings.warn(
                    f"{self.path}: its vocabulary of kind {model!r:.40} is not rebuilt; put the "
                    "model's tokenizer.json beside the file",
                    stacklevel=2,
                )
                return
        settings = {
            name: self._keys[key]
            for name, key in (
                ("add_bos_token", f"{prefix}bos_token"),
                ("add_eos_token", f"{prefix}eos_token"),
                ("chat_template", "tokenizer.chat_template"),
            )
            if key in self._keys
        }
        write_settings(folder, self.config, **settings)

    def _translate(self, infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors under Hugging Face names."""
        architecture = self._keys.get("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"{self.path}: general.architecture {architecture!r:.40} is not supported; 'llama' "
                "is"
            )
        if self._keys.get("split.count", 1) not in (0, 1):
            raise ValueError(f"{self.path}: is one of several files; merge them into one first")
        ours = {}
        for name, info in infos.items():
            start, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            if name in _TOP_NAMES:
                ours[_TOP_NAMES[name]] = info
            elif start == "blk" and index.isdecimal() and inner in _LAYER_NAMES:
                ours[f"model.layers.{int(index)}.{_LAYER_NAMES[inner]}"] = info
            else:
                raise ValueError(f"{self.path}: tensor {name:.80} is not one of a Llama 2")
        return ours

    def _read_config(self) -> dict[str, Any]:
        """config.json from the keys."""
        keys = {name.removeprefix("llama."): value for name, value in self._keys.items()}
        keys.setdefault("attention.head_count_kv", keys.get("attention.head_count"))
        sizes: dict[str, Any] = {ours: keys.get(name) for ours, name in _SIZE_KEYS.items()}
        embedding = self._infos.get("model.embed_tokens.weight")
        sizes["vocab_size"] = embedding.shape[0] if embedding else None
        positive(self.path, sizes, *sizes)
        layers = sum(name.endswith(".q_proj.weight") for name in self._infos)
        if layers != sizes["num_hidden_layers"]:
            raise ValueError(
                f"{self.path}: llama.block_count is {sizes['num_hidden_layers']}, the file has "
                f"{layers} layers"
            )
        heads = sizes["num_attention_heads"]
        head_dim = keys.get("attention.key_length", sizes["hidden_size"] // heads)
        extra = {
            "head_dim": head_dim,
            "rope_theta": keys.get("rope.freq_base", 10000.0),
            "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "lm_head.weight" not in self._infos,
            "bos_token_id": keys.get("tokenizer.ggml.bos_token_id", 1),
            "eos_token_id": keys.get("tokenizer.ggml.eos_token_id", 2),
            "torch_dtype": "float16" if self._infos_plain() else "float32",
        }
        positive(self.path, extra, "head_dim")
        rotated = keys.get("rope.dimension_count", head_dim)
        if rotated != head_dim or head_dim % 2 or heads % sizes["num_key_value_heads"]:
            raise ValueError(
                f"{self.path}: {heads} heads of {head_dim} with {rotated} rotated dimensions and "
                f"{sizes['num_key_value_heads']} KV heads are not supported"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            if not isinstance(extra[name], float | int) or not extra[name] > 0:
                raise ValueError(f"{self.path}: {name} is {extra[name]!r:.40}; it must be positive")
        return model_config({**sizes, **extra, **self._rope_scaling(keys)})

    def _infos_plain(self) -> bool:
        """Whether the matrices are float16."""
        return self._infos["model.embed_tokens.weight"].kind == 1

    def _rope_scaling(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Linear scaling of positions, if there is one; other kinds are refused."""
        kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", 1.0)
        if kind == "none":
            return {}
        if kind != "linear" or not isinstance(factor, float | int) or not factor > 0:
            raise ValueError(
                f"{self.path}: rope.scaling.type {kind!r:.40} with factor {factor!r:.40} is not "
                "supported; 'linear' is"
            )
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the tensor is there, of that shape, and within the file."""
        info = self._infos.get(name)
        if info is None or info.shape != shape:
            raise ValueError(
                f"{self.path}: tensor {name} has shape {info and info.shape} in the file, {shape} "
                "by its keys"
            )
        try:
            size = _size_bytes(info)
        except ValueError as error:
            raise ValueError(f"{self.path}: tensor {name}: {error}") from None
        if info.offset + size > self.size_bytes:
            raise ValueError(
                f"{self.path}: tensor {name} ends at byte {info.offset + size}, the file at "
                f"{self.size_bytes}; it is truncated"
            )


_SIZE_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}


def _size_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor in the file."""
    return row_bytes(info.kind, info.shape[-1]) * math.prod(info.shape[:-1])
