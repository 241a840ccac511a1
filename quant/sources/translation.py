"""From the names, row order and settings of other files to those of Hugging Face.

Meta, llama2.c and GGUF rotate neighbouring rows (2i, 2i + 1) of a head; Hugging Face rotates rows
i and i + D/2. The rows of q and k are therefore put in another order:

    HF row h * D + r * D/2 + i  =  row h * D + 2i + r      (r = 0, 1)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

# Meta's names inside a layer, and ours.
LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def hugging_face_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k (heads * D, in) from interleaved pairs to halves; a copy."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a Llama of this config.json, in the order of the model."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    layer = {
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    every: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for index in range(config["num_hidden_layers"]):
        every |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    every["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        every["lm_head.weight"] = (config["vocab_size"], hidden)
    return every


def model_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Llama 2: the sizes, and what is always so."""
    fixed = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return {**fixed, **sizes}


def write_settings(folder: Path, config: dict[str, Any], **tokenizer: Any) -> None:
    """generation_config.json and the tokenizer_config.json of a sentencepiece vocabulary."""
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        **tokenizer,
    }
    for name, value in (("generation_config", generation), ("tokenizer_config", settings)):
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def positive(source: Path, sizes: dict[str, Any], *names: str) -> None:
    """Raise ValueError naming the first of these sizes that is no positive integer."""
    for name in names:
        value = sizes.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{source}: {name} is {value!r:.40}; it must be a positive integer")
