"""What the linears of a block see: one Hessian per shared input, in one walk over the block.

A decoder layer has four inputs that its seven linears share: q|k|v, o, gate|up, down. The walk
advances the hidden states through the layer stage by stage and pauses before each group of linears,
so that the caller can replace their weights; what follows then sees the replaced ones
(true-sequential GPTQ). h is the layer's input, n the buffer for its output:

    norm(h)                  -> H of q, k, v      pause
    n = attention(q, k, v)   -> H of o            pause
    n = h + o(n); norm(n)    -> H of gate, up     pause
    silu(gate) * up          -> H of down         pause
    n = n + down(...)

Each product is computed once. Of the input of `down`, the widest, `keep_bytes` are kept for the
last line; the rest is computed a second time rather than stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib.hessian import Hessian
from calib.hidden import HiddenStates


@dataclass(frozen=True)
class Budget:
    """What a walk may take.

    Attributes:
        batch_tokens: tokens per forward, in whole windows; 2048 are enough for full GEMM speed and
            small next to a layer.
        keep_bytes: of the input of `down`, kept instead of computed twice.
    """

    batch_tokens: int = 2048
    keep_bytes: int = 1 << 28


def walk(
    layer: Any,
    states: HiddenStates,
    mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    budget: Budget = Budget(),  # noqa: B008 - frozen
) -> Iterator[Hessian]:
    """Advance the hidden states through `layer`, pausing before each group of linears.

    Args:
        layer: a decoder layer on `device`; its `self_attn` and `mlp` have `mix`, the part before
            the last linear.
        states: the layer's input; its output when the walk ends.
        mask: (windows, tokens) bool, False for padding: such rows never enter a Hessian.
        device: where the batches are computed.
        budget: how much is computed and kept at a time.

    Yields:
        The Hessian of the input of q|k|v, of o, of gate|up and of down, in that order.
    """
    attention, size = layer.self_attn, states.hidden_size
    width = attention.config.num_attention_heads * attention.config.head_dim
    batches = _batches(states, budget.batch_tokens)
    present, following = states.present, states.next

    hessian = Hessian(size, device)
    for batch in batches:
        x = present.read(batch, size).to(device)
        hessian.add(layer.input_layernorm(x), _rows(mask, batch))
    yield hessian

    hessian = Hessian(width, device)
    for batch in batches:
        y = attention.mix(layer.input_layernorm(present.read(batch, size).to(device)))
        hessian.add(y, _rows(mask, batch))
        following.write(batch, y)
    yield hessian

    hessian = Hessian(size, device)
    for batch in batches:
        y = attention.o_proj(following.read(batch, width).to(device))
        x = present.read(batch, size).to(device) + y
        hessian.add(layer.post_attention_layernorm(x), _rows(mask, batch))
        following.write(batch, x)
    yield hessian

    yield from _walk_down(layer, states, mask, device, budget)
    states.swap()


def _walk_down(
    layer: Any,
    states: HiddenStates,
    mask: Tensor | None,
    device: torch.device | str,
    budget: Budget,
) -> Iterator[Hessian]:
    """The last stage: the Hessian of down_proj's input, then its product."""
    room, kept = budget.keep_bytes, {}
    hessian = Hessian(layer.mlp.config.intermediate_size, device)
    batches = _batches(states, budget.batch_tokens)
    for index, batch in enumerate(batches):
        x = states.next.read(batch, states.hidden_size).to(device)
        y = layer.mlp.mix(layer.post_attention_layernorm(x))
        hessian.add(y, _rows(mask, batch))
        room -= y.nbytes
        if room >= 0:
            kept[index] = y
    del x, y
    yield hessian
    for index, batch in enumerate(batches):
        x = states.next.read(batch, states.hidden_size).to(device)
        y = kept.pop(index, None)
        if y is None:
            y = layer.mlp.mix(layer.post_attention_layernorm(x))
        states.next.write(batch, x + layer.mlp.down_proj(y))


def _rows(mask: Tensor | None, batch: slice) -> Tensor | None:
    """The mask of one batch."""
    return None if mask is None else mask[batch]


def _batches(states: HiddenStates, batch_tokens: int) -> list[slice]:
    """Slices of whole windows, about `batch_tokens` tokens each."""
    step = max(1, batch_tokens // states.tokens)
    starts = range(0, states.windows, step)
    return [slice(start, min(start + step, states.windows)) for start in starts]
