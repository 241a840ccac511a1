"""The key/value cache of generation."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.llama.config import LlamaConfig


class KVCache:
    """Keys and values of the tokens seen so far, (layers, B, KV heads, max_len, D) each,
    preallocated.

    Attributes:
        length: tokens that are stored.
        padding: how many tokens at the start of each row are padding, which no token may see; None
            for a batch without any.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            max_len,
            config.head_dim,
        )
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.padding: tuple[int, ...] | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, KV heads, T, D) of one layer behind `length`; return all of that layer's
        so far.
        """
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"KV cache holds {self.keys.shape[3]} tokens, {end} are needed")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
