"""The layers of a float checkpoint one after another; the next is read while one is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer

LINEARS = frozenset(name for group in LINEAR_GROUPS for name in group)


def read_layers(
    reader: CheckpointReader, llama: LlamaConfig, start: int = 0
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Read the layers from `start` on in the dtype of the file.

    Yields:
        The layer's index, and its tensors by their name within it; checked, and in memory.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, or is not finite.
    """
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(_read, reader, llama, start)
        for index in range(start, llama.num_hidden_layers):
            tensors = following.result()
            if index + 1 < llama.num_hidden_layers:
                following = thread.submit(_read, reader, llama, index + 1)
            yield index, tensors


def plain_tensors(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is copied as it is: embedding, final norm, and a head of its own."""
    matrix = (llama.vocab_size, llama.hidden_size)
    shapes = {"model.embed_tokens.weight": matrix, "model.norm.weight": (llama.hidden_size,)}
    return shapes if llama.tie_word_embeddings else {**shapes, "lm_head.weight": matrix}


def check_plain(reader: CheckpointReader, llama: LlamaConfig) -> None:
    """Refuse damage to what no layer reads, before the hours that the layers may take.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, or is not finite.
    """
    for name, shape in plain_tensors(llama).items():
        _check(name, reader.tensor(name), shape)
        reader.release()


def build_layer(
    llama: LlamaConfig, tensors: dict[str, Tensor], device: torch.device
) -> DecoderLayer:
    """The layer in float32 on the device; takes each tensor out of `tensors` as it goes."""
    with torch.device("meta"):
        layer = DecoderLayer(llama)
    state = {name: tensors.pop(name).to(device, torch.float32) for name in list(tensors)}
    layer.load_state_dict(state, assign=True)
    return layer


def _read(reader: CheckpointReader, llama: LlamaConfig, index: int) -> dict[str, Tensor]:
    """One layer. Tensors are copied out of the mapped files, which are closed each time: mapped
    pages count as memory for as long as they are open.
    """
    with torch.device("meta"):
        expected = {name: empty.shape for name, empty in DecoderLayer(llama).state_dict().items()}
    tensors = {}
    for name, shape in expected.items():
        full = f"model.layers.{index}.{name}"
        tensor = reader.tensor(full)
        _check(full, tensor, tuple(shape))
        tensors[name] = tensor.clone()
        del tensor
        reader.release()
    return tensors


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that does not fit or is not finite."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} in the file, {shape} by config.json")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: holds NaN or inf; the checkpoint is damaged")
