"""The hidden states before the first layer, and before any layer of the float model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calib.capture import Budget, advance
from calib.hidden import HiddenStates, Storage
from quant.checkpoint import CheckpointReader
from quant.layer_reader import EMBEDDING, LayerReader, build_layer
from quant.llama.config import LlamaConfig
from quant.llama.model import DecoderLayer


def empty_states(llama: LlamaConfig, windows: Tensor, storage: Storage) -> HiddenStates:
    """Room for the hidden states of windows (windows, tokens) of ids, and for a layer's work."""
    widest = llama.num_attention_heads * llama.head_dim
    count, tokens = windows.shape
    return HiddenStates(count, tokens, llama.hidden_size, widest, storage)


def float_states(llama: LlamaConfig, windows: Tensor, storage: Storage) -> HiddenStates:
    """The same of a model that stays as it is: one buffer."""
    count, tokens = windows.shape
    return HiddenStates(count, tokens, llama.hidden_size, storage=storage, in_place=True)


def embed(reader: CheckpointReader, states: HiddenStates, windows: Tensor) -> None:
    """Make `states` the input of the first layer: the embeddings of the windows' ids."""
    embedding = reader.tensor(EMBEDDING)
    states.set_windows(embedding[window] for window in windows)
    del embedding
    reader.release()


def advance_float(
    reader: CheckpointReader,
    llama: LlamaConfig,
    states: HiddenStates,
    count: int,
    compute: tuple[torch.device, Budget],
    prepare: Callable[[DecoderLayer], None],
) -> None:
    """Advance `states` through the first `count` layers of the float model.

    Args:
        prepare: is given each layer before it runs.
    """
    layers = LayerReader(reader, llama)
    for index in range(count):
        layer = build_layer(llama, layers.take(index), compute[0])
        layers.ask(index + 1)
        prepare(layer)
        advance(layer, states, *compute)
