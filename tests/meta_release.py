"""Makes Meta's files of a Hugging Face checkpoint: the way back, written down on its own."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# Meta's name, Hugging Face's, and how model parallelism splits it: by rows, columns, or not.
LAYER = [
    ("attention.wq", "self_attn.q_proj", "rows"),
    ("attention.wk", "self_attn.k_proj", "rows"),
    ("attention.wv", "self_attn.v_proj", "rows"),
    ("attention.wo", "self_attn.o_proj", "columns"),
    ("feed_forward.w1", "mlp.gate_proj", "rows"),
    ("feed_forward.w2", "mlp.down_proj", "columns"),
    ("feed_forward.w3", "mlp.up_proj", "rows"),
    ("attention_norm", "input_layernorm", "whole"),
    ("ffn_norm", "post_attention_layernorm", "whole"),
]
TOP = [
    ("tok_embeddings", "model.embed_tokens", "columns"),
    ("norm", "model.norm", "whole"),
    ("output", "lm_head", "rows"),
]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Row 2i + r of a head is row i + r * D/2 of Hugging Face's, one row after another."""
    rows, dim = [], weight.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            rows += [head * dim + i, head * dim + i + dim // 2]
    return weight[rows].clone()


def hugging_face_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def meta_state(folder: Path) -> dict[str, tuple[Tensor, str]]:
    """Whole tensors under Meta's names, with the way they are split."""
    state, config = hugging_face_state(folder), json.loads((folder / "config.json").read_text())
    names = list(TOP)
    for i in range(config["num_hidden_layers"]):
        names += [(f"layers.{i}.{m}", f"model.layers.{i}.{h}", s) for m, h, s in LAYER]
    heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
    whole = {}
    for meta, ours, split in names:
        if f"{ours}.weight" not in state:  # a head that is the embedding
            continue
        weight = state[f"{ours}.weight"]
        count = heads.get(meta.rpartition(".")[2])
        whole[f"{meta}.weight"] = (interleaved(weight, count) if count else weight, split)
    return whole


def write_meta(source: Path, target: Path, shards: int) -> Path:
    """A release in `shards` files, with checklist and tokenizer one folder up."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    whole = meta_state(source)
    lines = []
    for number in range(shards):
        part = {"rope.freqs": torch.ones(8)}
        for name, (weight, split) in whole.items():
            axis = {"rows": 0, "columns": 1}.get(split)
            part[name] = weight if axis is None else weight.chunk(shards, axis)[number].clone()
        file = target / f"consolidated.{number:02d}.pth"
        torch.save(part, file)
        lines.append(f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}\n")
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": -1,
        "multiple_of": 256,
        "norm_eps": config["rms_norm_eps"],
    }
    (target / "params.json").write_text(json.dumps(params))
    digest = hashlib.md5((target / "params.json").read_bytes()).hexdigest()
    (target / "checklist.chk").write_text("".join(lines) + f"{digest}  params.json\n")
    shutil.copyfile(source / "tokenizer.model", target.parent / "tokenizer.model")
    return target
