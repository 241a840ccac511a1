"""GGUF, the file of llama.cpp: blocks of 32 weights, names of its own, and the tokenizer inside.

The grid of every linear goes into the block type that holds it (gguf_blocks.py). Embedding and head
are float16, or Q8_0 if asked; vectors are float32. llama.cpp rotates neighbouring channels (Meta's
order), the Hugging Face layout channels half a head apart: rows of q and k are put into that order,
rows of codes as well as of floats.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.formats.gguf_blocks import BLOCK, F16, F32, Q4_0, Q4_1, Q8_0, Blocks, of_grid, q8_0
from quant.formats.gguf_file import GGUFFile, Value
from quant.formats.rounding import Rounding
from quant.geometry import linear_shapes
from quant.grid import Grid, QuantizedTensor
from quant.llama.config import LlamaConfig

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FILE_TYPES = {F16: 1, Q4_0: 2, Q4_1: 3, Q8_0: 7}  # llama.cpp's numbers of what a file mostly is
HEADS = ("f16", "q8_0")


class Writer:
    """Streams a checkpoint into one GGUF file.

    Args:
        path: the file to make.
        llama: the model's geometry.
        keys: more metadata: the model's name, and the keys of its tokenizer (gguf_vocabulary.py).
        head: type of embedding and head, one of HEADS.

    Raises:
        ValueError: no such head, or the model cannot have it.
    """

    def __init__(
        self, path: Path, llama: LlamaConfig, keys: dict[str, Value], head: str = "f16"
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head {head!r} is unknown; there are {', '.join(HEADS)}")
        if head == "q8_0" and llama.hidden_size % BLOCK:
            raise ValueError(
                f"hidden_size {llama.hidden_size} is not whole blocks of {BLOCK}; use --head f16"
            )
        self.llama, self.head = llama, head
        self._file = GGUFFile(path, _metadata(llama) | keys, _shapes(llama))
        self._rounding, self._kinds = Rounding(), dict.fromkeys(_FILE_TYPES, 0)
        self._worst: tuple[float, str] = (0.0, "")

    def add_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Write the linear called `name` (without ".weight").

        Raises:
            ValueError: GGUF cannot hold its grid.
        """
        order = self._row_order(name)
        blocks = of_grid(name, qt if order is None else _reorder(qt, order))
        self._worst = max(self._worst, (blocks.error, name))
        self._add(f"{name}.weight", blocks)

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not quantized."""
        module, _, _ = name.rpartition(".")
        order = self._row_order(module)
        tensor = tensor if order is None else tensor[order]
        if tensor.ndim == 1:
            self._add(name, Blocks(F32, tensor.float()))
        elif self.head == "q8_0" and module in ("model.embed_tokens", "lm_head"):
            self._add(name, q8_0(tensor))
        else:
            self._add(name, Blocks(F16, self._rounding.round(name, tensor, torch.float16)))

    def flush(self) -> None:
        """Put what was added so far on the disk."""
        self._file.flush()

    def close(self, model_config: dict[str, Any]) -> None:
        """Fill in the head of the file."""
        kind = max(self._kinds, key=lambda kind: self._kinds[kind])
        self._file.metadata["general.file_type"] = _FILE_TYPES[kind]
        self._file.close()

    def notes(self) -> list[str]:
        """What was not exact or will not work in llama.cpp, one line each."""
        lines = self._rounding.notes()
        if self.head == "q8_0":
            lines.append("embedding and head are rounded to Q8_0, as asked")
        error, where = self._worst
        if error:
            lines.append(
                f"Q4_1 stores scale x zero as float16: weights are off by at most {error:.4f} of a "
                f"scale ({where}); symmetric grids are exact"
            )
        if self.llama.rope_type == "dynamic":
            lines.append(
                "llama.cpp has no dynamic rotary scaling: right up to "
                f"{self.llama.max_position_embeddings} tokens only"
            )
        return lines

    def _add(self, name: str, blocks: Blocks) -> None:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and module not in _OUTER and blocks.kind in self._kinds:
            self._kinds[blocks.kind] += blocks.data.numel()
        self._file.add(f"{_gguf_name(module)}.{suffix}", blocks.kind, blocks.data)

    def _row_order(self, module: str) -> Tensor | None:
        """Rows of q and k in the order of neighbouring channels; None for other linears."""
        if module.endswith("self_attn.q_proj"):
            heads = self.llama.num_attention_heads
        elif module.endswith("self_attn.k_proj"):
            heads = self.llama.num_key_value_heads
        else:
            return None
        rows = torch.arange(heads * self.llama.head_dim)
        return rows.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def _reorder(qt: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """The rows of a tensor in another order."""
    grid = Grid(qt.grid.scales[order], qt.grid.zeros[order], qt.bits)
    return QuantizedTensor(qt.codes[order], grid, qt.group_index)


def _gguf_name(module: str) -> str:
    """llama.cpp's name of a module; an unknown one as it is, for the message."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer and layer[2] in _INNER:
        return f"blk.{layer[1]}.{_INNER[layer[2]]}"
    return _OUTER.get(module, module)


def _shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the file."""
    hidden = llama.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    shapes["token_embd.weight"] = shapes["output.weight"] = (llama.vocab_size, hidden)
    shapes["output_norm.weight"] = (hidden,)
    if llama.tie_word_embeddings:
        del shapes["output.weight"]
    for layer in range(llama.num_hidden_layers):
        prefix = f"blk.{layer}."
        shapes[f"{prefix}attn_norm.weight"] = shapes[f"{prefix}ffn_norm.weight"] = (hidden,)
        for name, shape in linear_shapes(llama).items():
            shapes[f"{prefix}{_INNER[name]}.weight"] = shape
            if llama.attention_bias if name.startswith("self_attn") else llama.mlp_bias:
                shapes[f"{prefix}{_INNER[name]}.bias"] = shape[:1]
    return shapes


def _metadata(llama: LlamaConfig) -> dict[str, Value]:
    """The keys that llama.cpp wants of a Llama."""
    keys: dict[str, Value] = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.vocab_size": llama.vocab_size,
        "llama.context_length": llama.max_position_embeddings,
        "llama.embedding_length": llama.hidden_size,
        "llama.block_count": llama.num_hidden_layers,
        "llama.feed_forward_length": llama.intermediate_size,
        "llama.attention.head_count": llama.num_attention_heads,
        "llama.attention.head_count_kv": llama.num_key_value_heads,
        "llama.attention.key_length": llama.head_dim,
        "llama.attention.value_length": llama.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(llama.rms_norm_eps),
        "llama.rope.dimension_count": llama.head_dim,
        "llama.rope.freq_base": float(llama.rope_theta),
    }
    if llama.rope_type == "linear":
        keys["llama.rope.scaling.type"] = "linear"
        keys["llama.rope.scaling.factor"] = float(llama.rope_factor)
    return keys
