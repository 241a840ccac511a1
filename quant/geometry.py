"""Whether a model's linears fit a grid and the packed format, and what they take there, decided
before any work.
"""

from __future__ import annotations

import torch

from quant.config import QuantConfig
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer

USUAL_GROUPS = (128, 64, 32)  # group sizes


def check_shapes(llama: LlamaConfig, config: QuantConfig) -> None:
    """Refuse, before any work, a geometry that the grids or the packed format cannot hold.

    Raises:
        ValueError: a group does not divide a linear, a shape cannot be packed, linears that share
            an input have different grids, a grid is for no linear, or the head is tied.
    """
    kinds = linear_shapes(llama)
    shapes = {f"layers.*.{name}": shape for name, shape in kinds.items()}
    grids = dict.fromkeys(shapes, config)
    for name, own in config.modules:
        shapes[name], grids[name] = _shape(name, llama, kinds), own
    for name, (out_features, in_features) in shapes.items():
        if out_features % 32 or in_features % 32:
            raise ValueError(
                f"{name}: shape ({out_features}, {in_features}) cannot be packed; "
                "the GPTQ format needs multiples of 32"
            )
        _check_group(name, in_features, grids[name], {width for _, width in shapes.values()})
    for layer in range(llama.num_hidden_layers if config.modules else 0):
        for group in LINEAR_GROUPS:
            names = [f"model.layers.{layer}.{name}" for name in group]
            if len({config.of(name) for name in names}) > 1:
                raise ValueError(f"{', '.join(names)}: share an input and need the same grid")


def _check_group(name: str, in_features: int, config: QuantConfig, widths: set[int]) -> None:
    """Raise ValueError if the groups do not divide a linear; with the usual sizes that divide the
    `widths` of all.
    """
    if in_features % config.width(in_features):
        sizes = [size for size in USUAL_GROUPS if all(width % size == 0 for width in widths)]
        raise ValueError(
            f"{name}: in_features {in_features} is not divisible by group_size "
            f"{config.group_size}; choose {''.join(f'{size}, ' for size in sizes)}or -1 for one "
            "group per row"
        )


def stored_bytes(
    llama: LlamaConfig, config: QuantConfig, weight_bytes: float
) -> tuple[float, float]:
    """Bytes of all quantized linears of the layers, and of embedding and head, of which what is not
    quantized takes `weight_bytes` a weight.
    """
    shapes = linear_shapes(llama)
    inside = sum(
        out * width * bits_per_weight(config.of(f"model.layers.{layer}.{name}"), width) / 8
        for layer in range(llama.num_hidden_layers)
        for name, (out, width) in shapes.items()
    )
    head = 0.0 if llama.tie_word_embeddings else weight_bytes
    if config.has_head:
        head = bits_per_weight(config.of("lm_head"), llama.hidden_size) / 8
    return inside, llama.vocab_size * llama.hidden_size * (weight_bytes + head)


def bits_per_weight(config: QuantConfig, in_features: int) -> float:
    """Stored bits of a weight, with its share of a float16 scale and a zero."""
    return config.bits + (16 + config.bits) / config.width(in_features)


def _shape(name: str, llama: LlamaConfig, kinds: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(out_features, in_features) of a linear that has a grid of its own."""
    if name == "lm_head":
        if llama.tie_word_embeddings:
            raise ValueError(
                "lm_head: is tied to the embedding; quantized it would be a second matrix in the "
                "file, so it is left as it is"
            )
        return llama.vocab_size, llama.hidden_size
    prefix, _, kind = name.removeprefix("model.layers.").partition(".")
    if not prefix.isdecimal() or int(prefix) >= llama.num_hidden_layers or kind not in kinds:
        raise ValueError(f"{name}: is no linear of this model")
    return kinds[kind]


def usual_group_size(llama: LlamaConfig) -> int:
    """128 where it divides every linear, else 64 or 32 where one of these does."""
    widths = {in_features for _, in_features in linear_shapes(llama).values()}
    sizes = (size for size in USUAL_GROUPS if all(width % size == 0 for width in widths))
    return next(sizes, USUAL_GROUPS[0])  # check_shapes names the linear that it does not divide


def linear_shapes(llama: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the seven linears of a layer, by name."""
    with torch.device("meta"):
        layer = DecoderLayer(llama)
    return {
        name: (layer.linear(name).out_features, layer.linear(name).in_features)
        for group in LINEAR_GROUPS
        for name in group
    }
