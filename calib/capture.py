"""What the linears of a block see: one Hessian per shared input, in one walk over the block.

A decoder layer has four inputs that its seven linears share: q|k|v, o, gate|up, down. The walk
advances the hidden states through the layer stage by stage and pauses before each group of linears,
so that the caller can replace their weights; what follows then sees the replaced ones
(true-sequential GPTQ):

    norm(h)              -> H of q, k, v      pause
    attention(q, k, v)   -> H of o            pause
    h += o(...); norm(h) -> H of gate, up     pause
    silu(gate) * up      -> H of down         pause
    h += down(...)

Each product is computed once. The input of `down` alone, the widest, is computed a second time
where all of it would not fit KEEP_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from calib.hessian import Hessian

KEEP_BYTES = 1 << 28  # 256 MiB: 16k tokens of a 4k wide MLP
_BATCH_TOKENS = 2048  # tokens per forward: enough for full GEMM speed, small next to a layer


def walk(
    layer: Any, hidden: Tensor, mask: Tensor | None = None, device: torch.device | str = "cpu"
) -> Iterator[Hessian]:
    """Advance `hidden` through `layer` in place, pausing before each group of linears.

    Args:
        layer: a decoder layer on `device`; its `self_attn` and `mlp` have `mix`, the part before
            the last linear.
        hidden: (windows, tokens, hidden_size) float32 on the CPU; holds the layer's output when the
            walk ends.
        mask: (windows, tokens) bool, False for padding: such rows never enter a Hessian.
        device: where the batches are computed.

    Yields:
        The Hessian of the input of q|k|v, of o, of gate|up and of down, in that order.
    """
    batches = _batches(hidden)
    attention = layer.self_attn

    hessian = Hessian(hidden.shape[-1], device)
    for batch in batches:
        hessian.add(layer.input_layernorm(hidden[batch].to(device)), _rows(mask, batch))
    yield hessian

    width = attention.config.num_attention_heads * attention.config.head_dim
    mixed = torch.empty(*hidden.shape[:2], width)
    hessian = Hessian(width, device)
    for batch in batches:
        y = attention.mix(layer.input_layernorm(hidden[batch].to(device)))
        hessian.add(y, _rows(mask, batch))
        mixed[batch] = y
    yield hessian

    hessian = Hessian(hidden.shape[-1], device)
    for batch in batches:
        x = hidden[batch].to(device) + attention.o_proj(mixed[batch].to(device))
        hessian.add(layer.post_attention_layernorm(x), _rows(mask, batch))
        hidden[batch] = x
    del mixed
    yield hessian

    yield from _walk_down(layer, hidden, mask, device)


def _walk_down(
    layer: Any, hidden: Tensor, mask: Tensor | None, device: torch.device | str
) -> Iterator[Hessian]:
    """The last stage: the Hessian of down_proj's input, then its product."""
    width = layer.mlp.config.intermediate_size
    keep = hidden.shape[0] * hidden.shape[1] * width * 4 <= KEEP_BYTES
    kept: list[Tensor] = []
    batches = _batches(hidden)
    hessian = Hessian(width, device)
    for batch in batches:
        y = layer.mlp.mix(layer.post_attention_layernorm(hidden[batch].to(device)))
        hessian.add(y, _rows(mask, batch))
        if keep:
            kept.append(y)
    yield hessian
    for batch in batches:
        x = hidden[batch].to(device)
        y = kept.pop(0) if keep else layer.mlp.mix(layer.post_attention_layernorm(x))
        hidden[batch] = x + layer.mlp.down_proj(y)


def _rows(mask: Tensor | None, batch: slice) -> Tensor | None:
    """The mask of one batch."""
    return None if mask is None else mask[batch]


def _batches(hidden: Tensor) -> list[slice]:
    """Slices of whole windows, about _BATCH_TOKENS tokens each."""
    windows, tokens = hidden.shape[:2]
    step = max(1, _BATCH_TOKENS // tokens)
    return [slice(start, min(start + step, windows)) for start in range(0, windows, step)]
