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
last line; the rest is computed a second time rather than stored. The float model beside it never
waits: h becomes h + o(...) and h + down(...) in its own place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib.hessian import Hessian
from calib.hidden import HiddenStates

_DOWN = 3  # the stage of down_proj: its drift, the widest, costs most and gains nothing
_RESIDUAL = {1: "present", 3: "next"}  # by stage: what the output of o_proj, of down_proj joins


@dataclass(frozen=True)
class Budget:
    """What a walk may take.

    Attributes:
        batch_tokens: tokens per forward, in whole windows; 2048 are enough for full GEMM speed and
            small next to a layer.
        keep_bytes: of the input of `down`, kept instead of computed twice.
    """

    batch_tokens: int = 2048
    keep_bytes: int = 3 << 27


def walk(
    layer: Any,
    states: HiddenStates,
    mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    budget: Budget = Budget(),  # noqa: B008 - frozen
    beside: tuple[Any, HiddenStates] | None = None,
    sink: float = 0.0,
) -> Iterator[Hessian]:
    """Advance the hidden states through `layer`, pausing before each group of linears.

    Args:
        layer: a decoder layer on `device`; its `self_attn` and `mlp` have `mix`, the part before
            the last linear.
        states: the layer's input; its output when the walk ends.
        mask: (windows, tokens) bool, False for padding: such rows never enter a Hessian.
        device: where the batches are computed.
        budget: how much is computed and kept at a time.
        beside: the float layer and its own hidden states, to advance in step. The Hessians of
            q|k|v, o and gate|up then hold a drift, those of o and down a lag.
        sink: in the Hessian of q|k|v, each window's first token counts this share of its tokens
            more than once.

    Yields:
        The Hessian of the input of q|k|v, of o, of gate|up and of down, in that order.
    """
    walking = _stages(layer, states, device, budget)
    others = iter(()) if beside is None else _float_stages(*beside, device, budget)
    for index, (width, inputs) in enumerate(walking):
        hessian = Hessian(width, device)
        originals = next(others, None)
        for batch, x in inputs:
            original = None if originals is None else next(originals)[1]
            of_batch = None if mask is None else mask[batch]
            if index == 0 and sink:
                _raise_first(x, original, of_batch, 1 + sink * states.tokens)
            hessian.add(x, of_batch, None if index == _DOWN else original)
            if beside is not None and index in _RESIDUAL:
                behind = _behind(states, beside[1], _RESIDUAL[index], batch)
                hessian.add_lag(x, behind.to(device), of_batch)
            del x, original
        deque(originals or (), maxlen=0)
        yield hessian
        del hessian  # the caller may have let it go; the next one is made in its room
    deque(others, maxlen=0)


def _raise_first(x: Tensor, original: Tensor | None, mask: Tensor | None, count: float) -> None:
    """Let the first token of each window (windows, tokens, features) count so many times."""
    first = 0 if mask is None else mask.int().argmax(1)
    for seen in (x,) if original is None else (x, original):
        seen[torch.arange(len(seen)), first] *= count**0.5


def _behind(states: HiddenStates, original: HiddenStates, buffer: str, batch: slice) -> Tensor:
    """h~ - h: what the residual stream of a batch lacks to be the float model's."""
    theirs = original.present.read(batch, states.hidden_size)
    return theirs - getattr(states, buffer).read(batch, states.hidden_size)


def advance(
    layer: Any,
    states: HiddenStates,
    device: torch.device | str = "cpu",
    budget: Budget = Budget(),  # noqa: B008
) -> None:
    """Advance the hidden states through `layer` in the batches of `walk`, collecting nothing."""
    for inputs in _float_stages(layer, states, device, budget):
        deque(inputs, maxlen=0)


def last_hessian(
    norm: Any,
    states: HiddenStates,
    mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    budget: Budget = Budget(),  # noqa: B008
) -> Hessian:
    """The Hessian of what the head sees: the last layer's output behind the final norm.

    Args:
        norm: the final norm, on `device`.
        states, mask, device, budget: as in `walk`.
    """
    hessian = Hessian(states.hidden_size, device)
    for batch in _batches(states, budget.batch_tokens):
        x = norm(_present(states, batch, device))
        hessian.add(x, None if mask is None else mask[batch])
    return hessian


_Inputs = Iterator[tuple[slice, Tensor]]  # batches of windows, and what a group of linears sees


def _stages(
    layer: Any, states: HiddenStates, device: torch.device | str, budget: Budget
) -> Iterator[tuple[int, _Inputs]]:
    """The width and the inputs of each group of linears; take all of them before going on."""
    config = layer.self_attn.config
    batches = _batches(states, budget.batch_tokens)
    yield states.hidden_size, _qkv_inputs(layer, states, device, batches)
    yield config.num_attention_heads * config.head_dim, _o_inputs(layer, states, device, batches)
    yield states.hidden_size, _mlp_inputs(layer, states, device, batches)
    width = layer.mlp.config.intermediate_size
    windows = min(states.windows, budget.keep_bytes // (4 * states.tokens * width))
    kept = states.room(windows, width, device)
    yield width, _down_inputs(layer, states, device, batches, kept)
    for batch in batches:
        x = states.next.read(batch, states.hidden_size).to(device)
        if batch.stop <= windows:
            y = kept[batch]
        else:
            y = layer.mlp.mix(layer.post_attention_layernorm(x))
        states.next.write(batch, x + layer.mlp.down_proj(y))
    states.swap()


def _qkv_inputs(layer: Any, states: HiddenStates, device: Any, batches: list[slice]) -> _Inputs:
    for batch in batches:
        yield batch, layer.input_layernorm(_present(states, batch, device))


def _o_inputs(layer: Any, states: HiddenStates, device: Any, batches: list[slice]) -> _Inputs:
    for batch, x in _qkv_inputs(layer, states, device, batches):
        y = layer.self_attn.mix(x)
        states.next.write(batch, y)
        yield batch, y


def _mlp_inputs(layer: Any, states: HiddenStates, device: Any, batches: list[slice]) -> _Inputs:
    attention = layer.self_attn
    width = attention.config.num_attention_heads * attention.config.head_dim
    for batch in batches:
        y = attention.o_proj(states.next.read(batch, width).to(device))
        x = _present(states, batch, device) + y
        states.next.write(batch, x)
        yield batch, layer.post_attention_layernorm(x)


def _down_inputs(
    layer: Any, states: HiddenStates, device: Any, batches: list[slice], kept: Tensor
) -> _Inputs:
    """Those of the first windows are written to `kept`, as far as it goes."""
    for batch in batches:
        x = states.next.read(batch, states.hidden_size).to(device)
        out = kept[batch] if batch.stop <= len(kept) else None
        yield batch, layer.mlp.mix(layer.post_attention_layernorm(x), out)


def _float_stages(
    layer: Any, states: HiddenStates, device: torch.device | str, budget: Budget
) -> Iterator[_Inputs]:
    """The inputs of each group of linears of a layer that stays as it is; take all of them before
    going on. What a sum is made of is overwritten when the batch after it is asked for.
    """
    attention, mlp, batches = layer.self_attn, layer.mlp, _batches(states, budget.batch_tokens)
    for norm, mix, last in (
        (layer.input_layernorm, attention.mix, attention.o_proj),
        (layer.post_attention_layernorm, mlp.mix, mlp.down_proj),
    ):
        yield ((batch, norm(_present(states, batch, device))) for batch in batches)
        yield _added(norm, mix, last, states, device, batches)


def _added(
    norm: Any, mix: Any, last: Any, states: HiddenStates, device: Any, batches: list[slice]
) -> _Inputs:
    """The inputs of `last`, o_proj or down_proj, whose outputs are added to the hidden states."""
    for batch in batches:
        x = _present(states, batch, device)
        y = mix(norm(x))
        yield batch, y
        states.present.write(batch, x + last(y))


def _present(states: HiddenStates, batch: slice, device: Any) -> Tensor:
    """The hidden states of a batch at the layer's input, or as far as a float layer has come."""
    return states.present.read(batch, states.hidden_size).to(device)


def _batches(states: HiddenStates, batch_tokens: int) -> list[slice]:
    """Slices of whole windows, about `batch_tokens` tokens each."""
    step = max(1, batch_tokens // states.tokens)
    starts = range(0, states.windows, step)
    return [slice(start, min(start + step, states.windows)) for start in starts]
