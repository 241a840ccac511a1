"""Whether a model's linears fit a grid and the packed format, decided before any work."""

from __future__ import annotations

import torch

from quant.config import QuantConfig
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer


def check_shapes(llama: LlamaConfig, config: QuantConfig) -> None:
    """Refuse, before any work, a geometry that the group size or the packed format cannot hold."""
    for name, (out_features, in_features) in linear_shapes(llama).items():
        config.check(f"layers.*.{name}", in_features)
        if out_features % 32 or in_features % 32:
            raise ValueError(
                f"layers.*.{name}: shape ({out_features}, {in_features}) cannot be packed; "
                "the GPTQ format needs multiples of 32"
            )


def fitting_group_size(llama: LlamaConfig, group_size: int) -> int:
    """The group size asked for where it divides every linear, else 64 or 32 where one of these
    does.
    """
    widths = {in_features for _, in_features in linear_shapes(llama).values()}
    smaller = [size for size in (64, 32) if size < group_size]
    for size in (group_size, *smaller):
        if size == -1 or (size > 0 and all(width % size == 0 for width in widths)):
            return size
    return group_size  # check_shapes names the linear that it does not divide


def linear_shapes(llama: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the seven linears of a layer, by name."""
    with torch.device("meta"):
        layer = DecoderLayer(llama)
    return {
        name: (layer.linear(name).out_features, layer.linear(name).in_features)
        for group in LINEAR_GROUPS
        for name in group
    }
