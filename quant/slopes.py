"""The gradients of the float model's predictions, from the last layer to the first.

Tokens are drawn from the model's own predictions, and the log-likelihood of what was drawn is
differentiated: the mean square of these gradients is the Fisher information, to which the KL
divergence from the model is proportional while errors are small. Layers are streamed as in a
quantization: one forward keeps the input of every layer, and each layer runs once more on the way
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from calib.hessian import Hessian
from calib.hidden import Buffer, Storage
from quant.checkpoint import CheckpointReader
from quant.layer_reader import EMBEDDING, LINEARS, LayerReader, build_layer, read_end
from quant.llama.config import LlamaConfig
from quant.llama.generate import drawn
from quant.llama.model import DecoderLayer
from quant.native.products import product

_SEED = 0
LOGITS = 256  # tokens whose logits are held at a time
BATCH_TOKENS = 2048  # in whole windows

Watched = TypeVar("Watched")


class Slopes:
    """Room for what flows between the layers: forward the hidden states, then, in their place, the
    gradients to them.

    Args:
        shape: (windows, tokens).
    """

    def __init__(self, llama: LlamaConfig, shape: tuple[int, int], storage: Storage) -> None:
        self.windows, tokens = shape
        self.width = llama.hidden_size
        boundaries = llama.num_hidden_layers + 1
        with torch.inference_mode(False):
            self._buffer = Buffer((boundaries * self.windows, tokens, self.width), storage)
        step = max(1, BATCH_TOKENS // tokens)
        self.batches = [slice(at, at + step) for at in range(0, self.windows, step)]

    def read(self, boundary: int, batch: slice = slice(None)) -> Tensor:
        """What stands before layer `boundary`, behind layer `boundary` - 1: (windows, tokens,
        hidden) float32.
        """
        return self._buffer.read(self._place(boundary, batch), self.width)

    def write(self, boundary: int, batch: slice, values: Tensor) -> None:
        self._buffer.write(self._place(boundary, batch), values)

    def _place(self, boundary: int, batch: slice) -> slice:
        start, stop, _ = batch.indices(self.windows)
        return slice(boundary * self.windows + start, boundary * self.windows + stop)


def backward(
    reader: CheckpointReader,
    llama: LlamaConfig,
    data: tuple[Tensor, Tensor | None],
    slopes: Slopes,
    device: torch.device,
    watch: Callable[[DecoderLayer], Watched],
) -> Iterator[tuple[int, DecoderLayer, Watched]]:
    """Run the float model forward, and back; `slopes` holds the gradients to the layers' outputs.

    Args:
        data: windows (windows, tokens) of ids, and a mask of the same shape, False for padding,
            whose predictions do not count.
        watch: is given each layer before it runs on the way back.

    Yields:
        From the last layer to the first: its index, the layer, what `watch` made of it.
    """
    windows, mask = data
    layers, count = LayerReader(reader, llama), llama.num_hidden_layers
    with torch.inference_mode(False), torch.no_grad():
        embedding = reader.tensor(EMBEDDING)
        for batch in slopes.batches:
            slopes.write(0, batch, embedding[windows[batch]])
        del embedding
        for index in range(count):
            layer = build_layer(llama, layers.take(index), device)
            for batch in slopes.batches:
                slopes.write(index + 1, batch, layer(slopes.read(index, batch).to(device)))
        _start_back(reader, llama, mask, slopes, device)
        for index in reversed(range(count)):
            layer = build_layer(llama, layers.take(index), device).requires_grad_(False)
            watched = watch(layer)
            for batch in slopes.batches:
                x, slope = (slopes.read(at, batch).to(device) for at in (index, index + 1))
                slopes.write(index, batch, _pull(layer, x, slope))
            yield index, layer, watched


def output_covariances(layer: DecoderLayer, inputs: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """The sum of g g^T over tokens, g the gradient to the output of a linear: (out, out) float32
    for each linear of a layer.

    Args:
        layer: of the float model, made outside of inference mode.
        inputs: of the layer, (windows, tokens, hidden) float32.
        slope: the gradient to its output, of the same shape.
    """
    sums: dict[str, Hessian] = {}

    def keep(name: str, output: Tensor) -> None:
        def add(slope: Tensor) -> None:
            sums.setdefault(name, Hessian(slope.shape[-1], slope.device)).add(slope)

        output.register_hook(add)

    hooks = [
        layer.linear(name).register_forward_hook(lambda *call, name=name: keep(name, call[2]))
        for name in LINEARS
    ]
    with torch.inference_mode(False):
        for x, pulled in zip(inputs.split(1), slope.split(1), strict=True):
            _pull(layer, x.clone(), pulled.clone())
    for hook in hooks:
        hook.remove()
    return {name: summed.matrix for name, summed in sums.items()}


def _pull(layer: DecoderLayer, x: Tensor, slope: Tensor) -> Tensor:
    """The gradient to a layer's input x, given that to its output."""
    with torch.enable_grad():
        layer(x.requires_grad_()).backward(slope)
    assert x.grad is not None
    return x.grad


def _start_back(
    reader: CheckpointReader,
    llama: LlamaConfig,
    mask: Tensor | None,
    slopes: Slopes,
    device: torch.device,
) -> None:
    """Put the gradient of the log-likelihood of tokens drawn from the predictions, summed over
    tokens, in the place of the last layer's output.
    """
    norm, head = read_end(reader, llama, device)
    generator = torch.Generator().manual_seed(_SEED)
    for window in range(slopes.windows):
        at = slice(window, window + 1)
        x = slopes.read(llama.num_hidden_layers, at).to(device)
        with torch.enable_grad():
            normed = norm(x.requires_grad_())
        slope = torch.empty_like(normed[0])
        for rows in (slice(i, i + LOGITS) for i in range(0, len(slope), LOGITS)):
            p = torch.softmax(product(normed.detach()[0, rows], head.T), -1)
            ids = drawn(p, torch.rand(len(p), 1, generator=generator))
            p.scatter_add_(1, ids, -torch.ones_like(p[:, :1]))
            if mask is not None:
                p *= mask[window, rows, None].to(device)
            slope[rows] = product(p, head)
        normed.backward(slope[None])
        assert x.grad is not None
        slopes.write(llama.num_hidden_layers, at, x.grad)
