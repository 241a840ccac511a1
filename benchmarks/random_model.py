"""A Llama checkpoint of random weights, for measurements of time and memory.

    python benchmarks/random_model.py FOLDER --size 7b [--layers 4] [--vocab 32000] [--seed 0]

Sizes are those of Llama 2: 7b, 13b, 70b. Weights are float16; every 61st input of a linear is 8
times as strong as the others, as some are in trained models. Two tensors are in memory at most,
while one is written and the next one made. There is no tokenizer: `benchmarks/parts.py --text
random` and `benchmarks/forecast.py` need none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.llama.config import LlamaConfig
from quant.llama.model import Llama
from quant.stream_writer import StreamWriter

SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
_COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
_ROWS = 1024  # made at a time: float32 of a whole matrix would be twice its room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    geometry = {**SIZES[asked.size], "vocab_size": asked.vocab}
    if asked.layers is not None:
        geometry["num_hidden_layers"] = asked.layers
    write_model(asked.folder, geometry, asked.seed)


def write_model(folder: Path, geometry: dict[str, Any], seed: int = 0) -> None:
    """Make a folder with config.json and shards; `geometry` has what config.json says of sizes.

    Raises:
        FileExistsError: the folder is there already.
    """
    config = {**_COMMON, **geometry}
    shapes = tensor_shapes(config)
    folder.mkdir(parents=True)
    writer, generator = StreamWriter(folder, len(shapes)), torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        writer.add(name, _matrix(shape, generator) if len(shape) == 2 else torch.ones(shape).half())
    writer.close()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _matrix(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(out, in) float16, so strong that outputs are about as strong as inputs."""
    matrix = torch.empty(shape, dtype=torch.float16)
    for part in matrix.split(_ROWS):
        values = torch.randn(part.shape, generator=generator) * (0.5 * shape[1] ** -0.5)
        values[:, ::61] *= 8
        part.copy_(values)
    return matrix


if __name__ == "__main__":
    main()
