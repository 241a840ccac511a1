"""A random 2-layer Llama checkpoint in 2 shards, written by safetensors alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calib.sampling import token_windows
from calib.sources import documents
from quant.config import QuantConfig
from quant.export import Source
from quant.formats import autogptq
from quant.grid import QuantizedTensor, fit_minmax, nearest_codes
from quant.sources import open_checkpoint, open_tokenizer

BUNDLED = Path(__file__).parents[1] / "quant" / "bundled"
GEOMETRY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2080,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


@pytest.fixture(autouse=True)
def private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note of the last checkpoint must not touch the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def random_state(
    config: dict[str, Any], dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face names."""
    generator = torch.Generator().manual_seed(0)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {p + f"self_attn.{n}_proj.weight": (kv, hidden) for n in "kv"}
        shapes |= {p + f"mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {
            p + n + ".weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")
        }
    return {
        name: (
            torch.randn(shape, generator=generator)
            * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
        ).to(dtype)
        + (1 if len(shape) == 1 else 0)
        for name, shape in shapes.items()
    }


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """make_checkpoint(name, **config overrides) -> folder."""

    def make(name: str = "tiny", dtype: torch.dtype = torch.float16, **overrides: Any) -> Path:
        config = {**GEOMETRY, **overrides}
        folder = tmp_path / name
        folder.mkdir()
        state = random_state(config, dtype)
        weight_map = {}
        for shard in (0, 1):
            part = dict(list(state.items())[shard::2])
            file = f"model-{shard + 1:05d}-of-00002.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(BUNDLED / file, folder / file)
        return folder

    return make


@pytest.fixture
def windows() -> torch.Tensor:
    """8 windows of 64 token ids."""
    return torch.randint(0, 2048, (8, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def bundled_text() -> torch.Tensor:
    """8 windows of 128 tokens of the bundled model."""
    encode = open_tokenizer(BUNDLED).encode
    return token_windows(encode, documents(["stdlib"]), 8, 128, 0)


@pytest.fixture
def quantized(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """quantized(config, **geometry): a tiny model rounded to that grid, in the GPTQ format."""

    def make(config: QuantConfig, **geometry: Any) -> Path:
        source, folder = make_checkpoint(**geometry), tmp_path / "out"
        folder.mkdir()
        writer = autogptq.Writer(folder, config, {})
        for name, tensor in Source.open(source).entries():
            assert isinstance(tensor, torch.Tensor)
            if name.endswith("_proj.weight"):
                grid = fit_minmax(tensor.float(), config)
                grid.scales[::2] *= -1  # the formats take both signs
                codes = nearest_codes(tensor.float(), grid)
                writer.add_quantized(name.removesuffix(".weight"), QuantizedTensor(codes, grid))
            else:
                writer.add_plain(name, tensor)
        reader = open_checkpoint(source)
        writer.close(reader.config)
        reader.copy_companions(folder)
        return folder

    return make
