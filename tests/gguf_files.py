"""Makes GGUF files of a Hugging Face checkpoint with the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from meta_release import meta_state

NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
}  # fmt: skip


Kind = gguf.GGMLQuantizationType


def write(folder: Path, file: Path, kind: Kind, outer: Kind | None = None) -> dict[str, np.ndarray]:
    """The file, embedding and head of the type `outer`; returns the values in it, by its names, as
    the package dequantizes them.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    add_vocabulary(writer, folder / "tokenizer.model", config["vocab_size"])
    held = {}
    for meta, (weight, _) in meta_state(folder).items():
        prefix, _, part = meta.removesuffix(".weight").rpartition(".")
        layer = meta.split(".")[1] if meta.startswith("layers.") else ""
        part = meta.removesuffix(".weight").split(".", 2)[2] if layer else part or prefix
        name = (f"blk.{layer}." if layer else "") + NAMES[part] + ".weight"
        plain = weight.dim() == 1
        raw_kind = Kind.F32 if plain else kind if layer else outer or kind
        data = gguf.quants.quantize(weight.float().numpy(), raw_kind)
        held[name] = gguf.quants.dequantize(data, raw_kind)
        writer.add_tensor(name, data, raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add_vocabulary(writer: gguf.GGUFWriter, model: Path, size: int) -> None:
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(model))
    count = sp.vocab_size()
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
        for i in range(count)
    ]
    padding = range(count, size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [sp.id_to_piece(i) for i in range(count)] + [f"[PAD{i}]" for i in padding]
    )
    writer.add_token_scores([sp.get_score(i) for i in range(count)] + [-10000.0 for _ in padding])
    writer.add_token_types(kinds + [5 for _ in padding])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
