"""Makes llama2.c files of a Hugging Face checkpoint, written down on its own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from meta_release import meta_state
from torch import Tensor

INNER = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
FFN = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def header(config: dict, negative: bool) -> bytes:
    sizes = [config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
    sizes += [config["num_attention_heads"], config["num_key_value_heads"]]
    vocab = -config["vocab_size"] if negative else config["vocab_size"]
    return struct.pack("<7i", *sizes, vocab, config["max_position_embeddings"])


def q80(weight: Tensor, group: int) -> tuple[bytes, Tensor]:
    """int8 codes and float32 scales of runs of `group` values, and what they stand for."""
    groups = weight.float().reshape(-1, group)
    scales = groups.abs().amax(1, keepdim=True) / 127
    codes = (groups / scales).round().to(torch.int8)
    data = codes.numpy().tobytes() + scales.numpy().tobytes()
    return data, (codes.float() * scales).reshape(weight.shape)


def write(folder: Path, config: dict, version: int, file: Path, group: int = 64) -> dict:
    """The file; returns the values in it under Meta's names."""
    state = {name.removesuffix(".weight"): w for name, (w, _) in meta_state(folder).items()}
    layers = range(config["num_hidden_layers"])
    shared = bool(config.get("tie_word_embeddings"))
    held: dict[str, Tensor] = {}
    out = bytearray()

    def put(name: str, plain: bool = True) -> None:
        data, held[name] = state[name].float().numpy().tobytes(), state[name].float()
        if not plain and version == 2:
            data, held[name] = q80(state[name], group)
        out.extend(data)

    def every(part: str, plain: bool = True) -> None:
        for i in layers:
            put(f"layers.{i}.{part}", plain)

    if version == 0:
        out += header(config, not shared)
        put("tok_embeddings")
        for part in ("attention_norm", *INNER, "ffn_norm", *FFN):
            every(part)
        put("norm")
        dim = config["hidden_size"] // config["num_attention_heads"]
        out += np.ones(config["max_position_embeddings"] * dim, np.float32).tobytes()
    else:
        out += struct.pack("<Ii", 0x616B3432, version) + header(config, False)
        out += struct.pack("<B", shared) + (struct.pack("<i", group) if version == 2 else b"")
        out += bytes(256 - len(out))
        every("attention_norm")
        every("ffn_norm")
        put("norm")
        put("tok_embeddings", False)
        for part in (*INNER, *FFN):
            every(part, False)
    if not shared:
        put("output", False)
    file.write_bytes(out)
    return held


def write_vocabulary(model: Path, file: Path) -> None:
    """tokenizer.bin of a tokenizer.model, as llama2.c's tokenizer.py writes it."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(model))
    tokens = []
    for i in range(sp.vocab_size()):
        text = sp.id_to_piece(i)
        text = f"\n{text}\n" if i in (sp.bos_id(), sp.eos_id()) else text
        tokens.append((text.replace("\u2581", " ").encode(), sp.get_score(i)))
    body = b"".join(struct.pack("<fI", score, len(text)) + text for text, score in tokens)
    file.write_bytes(struct.pack("<I", max(len(text) for text, _ in tokens)) + body)
