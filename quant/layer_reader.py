"""The layers of a float checkpoint, each read in a thread while another one is worked on."""

from __future__ import annotations

import functools
import re
from concurrent.futures import Future

import torch
from torch import Tensor

from quant.background import background_thread
from quant.checkpoint import CheckpointReader, check_float
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer, RMSNorm

EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
LINEARS = frozenset(name for group in LINEAR_GROUPS for name in group)


class DamagedLayer(ValueError):
    """A tensor of a layer is missing, damaged, of another shape than config.json says, of a dtype
    that weights have not, or not finite.
    """


class LayerReader:
    """Reads layers one at a time, in a thread where the caller says when.

    A layer weighs as much as what a solve needs beside it, so the next one is asked for when the
    last solve of the present one is done, and comes while its output is computed; where a GPU
    solves, already when the present one has come.
    """

    def __init__(self, reader: CheckpointReader, llama: LlamaConfig) -> None:
        self._reader, self._llama = reader, llama
        self._pool = background_thread()
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}

    def ask(self, index: int) -> None:
        """Start to read a layer, if the model has it and it is not coming yet."""
        if index < self._llama.num_hidden_layers and index not in self._coming:
            self._coming[index] = self._pool.submit(_read, self._reader, self._llama, index)

    def take(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by their name within it, in the dtype of the file; checked, in memory.

        Raises:
            DamagedLayer: the message names the tensor.
        """
        self.ask(index)
        try:
            return self._coming.pop(index).result()
        except ValueError as error:
            raise DamagedLayer(str(error)) from None


def plain_tensors(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is copied as it is: embedding, final norm, and a head of its own."""
    matrix = (llama.vocab_size, llama.hidden_size)
    shapes = {EMBEDDING: matrix, FINAL_NORM: (llama.hidden_size,)}
    return shapes if llama.tie_word_embeddings else {**shapes, "lm_head.weight": matrix}


def check_headers(reader: CheckpointReader, llama: LlamaConfig) -> None:
    """Compare the names and shapes of all tensors with config.json, before any of them is read.

    Raises:
        ValueError: a tensor is missing, or has another shape; or the file has more layers.
    """
    numbers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in reader.names())
    layers = max((int(number[1]) + 1 for number in numbers if number), default=0)
    if layers > llama.num_hidden_layers:
        raise ValueError(
            f"{reader.path}: has tensors of {layers} layers, but num_hidden_layers in config.json "
            f"is {llama.num_hidden_layers}; correct one of them"
        )
    expected = plain_tensors(llama)
    for index in range(llama.num_hidden_layers):
        prefix = f"model.layers.{index}."
        expected |= {prefix + name: shape for name, shape in _layer_shapes(llama).items()}
    for name, shape in expected.items():
        _check_shape(f"{reader.path}: {name}", reader.shape(name), shape)
    reader.release()


def check_plain(reader: CheckpointReader, llama: LlamaConfig) -> None:
    """Refuse damage to what no layer reads, before the hours that the layers may take.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, or is not finite.
    """
    for name, shape in plain_tensors(llama).items():
        _check(name, reader.tensor(name), shape)
        reader.release()


def read_end(
    reader: CheckpointReader, llama: LlamaConfig, device: torch.device
) -> tuple[RMSNorm, Tensor]:
    """What follows the last layer, in float32: the final norm, and the head (vocab, hidden)."""
    norm = RMSNorm(llama.hidden_size, llama.rms_norm_eps)
    weight = reader.tensor(FINAL_NORM).to(device, torch.float32, copy=True)
    norm.load_state_dict({"weight": weight}, assign=True)
    norm.requires_grad_(False)
    name = EMBEDDING if llama.tie_word_embeddings else "lm_head.weight"
    return norm, reader.tensor(name).to(device, torch.float32, copy=True)


def build_layer(
    llama: LlamaConfig, tensors: dict[str, Tensor], device: torch.device
) -> DecoderLayer:
    """The layer in float32 on the device; takes each tensor out of `tensors` as it goes."""
    with torch.device("meta"):
        layer = DecoderLayer(llama)
    state = {name: tensors.pop(name).to(device).float() for name in list(tensors)}
    layer.load_state_dict(state, assign=True)
    return layer


def _read(reader: CheckpointReader, llama: LlamaConfig, index: int) -> dict[str, Tensor]:
    """One layer. Tensors are copied out of the mapped files, which are closed each time: mapped
    pages count as memory for as long as they are open.
    """
    tensors = {}
    for name, shape in _layer_shapes(llama).items():
        full = f"model.layers.{index}.{name}"
        tensor = reader.tensor(full)
        _check(full, tensor, shape)
        tensors[name] = tensor.clone()
        del tensor
        reader.release()
    return tensors


@functools.cache
def _layer_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors, by their name within it."""
    with torch.device("meta"):
        state = DecoderLayer(llama).state_dict()
    return {name: tuple(empty.shape) for name, empty in state.items()}


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse another shape than config.json says."""
    if shape != expected:
        raise ValueError(
            f"{name}: shape {shape} in the file, {expected} by config.json; one is wrong"
        )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that does not fit, is of integers or 8-bit floats, or is not finite."""
    _check_shape(name, tuple(tensor.shape), shape)
    check_float(name, tensor)
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # faster than of every value
        raise ValueError(f"{name}: holds NaN or inf; the checkpoint is damaged")
