"""How far the quantized model's predictions are from the float model's, and the gradient of that.

    loss = mean over tokens of KL(float || quantized)  =  mean of  sum p (log p - log q)

Trainable are the scales of every linear and the weights of the norms; the codes stay, so what comes
out is a file of the same kind. One layer is in memory at a time: a forward pass keeps the input of
each layer; the backward pass takes the layers in reverse, reads each again and runs it a second
time with gradients, from the input that was kept.

    dL/dlogits = (q - p) / tokens          dL/ds = sum over the group of dL/dW (code - zero)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.hidden import HiddenStates
from quant.finished_layers import FinishedLayers, scale_gradient
from quant.grid import QuantizedTensor
from quant.layer_reader import FINAL_NORM, build_layer
from quant.llama.config import LlamaConfig
from quant.llama.model import DecoderLayer, RMSNorm
from quant.native.products import product

_LOGITS = 1 << 24  # at a time: 64 MB in float32, three times


@dataclass(frozen=True)
class Lesson:
    """What is learned from.

    Attributes:
        windows: (windows, tokens) int64 ids.
        mask: (windows, tokens) bool, False for padding; None without any.
        states: the float model's hidden states behind its last layer.
        norm: the float model's final norm.
    """

    windows: Tensor
    mask: Tensor | None
    states: HiddenStates
    norm: RMSNorm

    def target(self, batch: Tensor) -> Tensor:
        """The normed hidden states (tokens, hidden) of the float model for some windows."""
        width = self.states.hidden_size
        read = (self.states.present.read(slice(w, w + 1), width) for w in batch.tolist())
        return self.norm(torch.cat(list(read)).to(self.norm.weight.device)).flatten(0, 1)

    def weights(self, batch: Tensor) -> Tensor:
        """(tokens,) float32: the share of each token in the mean over some windows."""
        shape = len(batch), self.windows.shape[1]
        counted = torch.ones(shape) if self.mask is None else self.mask[batch].float()
        return (counted / counted.sum()).flatten().to(self.norm.weight.device)


class Student:
    """The quantized model with scales and norms that can be moved.

    Attributes:
        values: float32 scales (out, groups) by the name of the linear, and norm weights (hidden,)
            by the name of the tensor.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        layers: FinishedLayers,
        embedding: Tensor,
        head: Tensor,
        norm: RMSNorm,
    ) -> None:
        self.llama, self.layers = llama, layers
        self.embedding, self.head, self.eps = embedding, head, norm.eps
        self.values = {FINAL_NORM: norm.weight.detach().clone()}
        for index in range(len(layers)):
            linears, plain = layers.read(index)
            prefix = f"model.layers.{index}."
            self.values |= {prefix + name: qt.grid.scales for name, qt in linears.items()}
            norms = {name: tensor.float() for name, tensor in plain.items() if _is_norm(name)}
            self.values |= {prefix + name: tensor for name, tensor in norms.items()}

    def layer(self, index: int) -> tuple[DecoderLayer, dict[str, QuantizedTensor]]:
        """A layer in float32 with the values as they stand, and the linears it is made of."""
        prefix, device = f"model.layers.{index}.", self.head.device
        linears, tensors = self.layers.read(index)
        for name, qt in linears.items():
            qt = replace(qt, grid=replace(qt.grid, scales=self.values[prefix + name]))
            linears[name], tensors[f"{name}.weight"] = qt, qt.dequantize()
        tensors |= {name: self.values[prefix + name] for name in tensors if _is_norm(name)}
        return build_layer(self.llama, tensors, device), linears

    @torch.no_grad()
    def divergence(self, lesson: Lesson) -> float:
        """The loss over all windows of a lesson, each counting the same."""
        losses = []
        for batch in torch.arange(len(lesson.windows)).split(1):
            normed, _ = self._final(self._inputs(lesson.windows[batch])[-1])
            losses.append(self._head(normed, lesson, batch)[0])
        return sum(losses) / len(losses)

    @torch.enable_grad()
    def gradients(self, lesson: Lesson, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The loss of some windows, and its gradient to each of `values`."""
        inputs = self._inputs(lesson.windows[batch])
        x = inputs.pop().requires_grad_()
        normed, norm = self._final(x)
        loss, slope = self._head(normed.detach(), lesson, batch)
        normed.backward(slope)
        gradients = {FINAL_NORM: _gradient(norm.weight)}
        slope = _gradient(x)
        for index in reversed(range(len(self.layers))):
            x = inputs.pop().requires_grad_()
            layer, linears = self.layer(index)
            layer(x).backward(slope)
            slope, prefix = _gradient(x), f"model.layers.{index}."
            for name, qt in linears.items():
                weight = layer.linear(name).weight
                gradients[prefix + name] = scale_gradient(_gradient(weight), qt)
            for name, parameter in layer.named_parameters():
                if _is_norm(name):
                    gradients[prefix + name] = _gradient(parameter)
        return loss, gradients

    @torch.no_grad()
    def _inputs(self, ids: Tensor) -> list[Tensor]:
        """The input of each layer, and the output of the last; (windows, tokens, hidden)."""
        inputs = [self.embedding[ids].to(self.head.device, torch.float32)]
        for index in range(len(self.layers)):
            layer, _ = self.layer(index)
            inputs.append(layer(inputs[-1]))
        return inputs

    def _final(self, x: Tensor) -> tuple[Tensor, RMSNorm]:
        """The final norm of x, and its module."""
        norm = RMSNorm(x.shape[-1], self.eps)
        norm.weight = torch.nn.Parameter(self.values[FINAL_NORM])
        return norm(x), norm

    @torch.no_grad()
    def _head(self, normed: Tensor, lesson: Lesson, batch: Tensor) -> tuple[float, Tensor]:
        """The loss, and its gradient to the normed states (windows, tokens, hidden)."""
        flat, target, shares = normed.flatten(0, 1), lesson.target(batch), lesson.weights(batch)
        slope, loss = torch.empty_like(flat), 0.0
        for part in _parts(len(flat), len(self.head)):
            log_q = torch.log_softmax(product(flat[part], self.head.T), -1)
            log_p = torch.log_softmax(product(target[part], self.head.T), -1)
            p = log_p.exp()
            each = log_p.sub_(log_q).mul_(p).sum(-1)
            loss += float((each * shares[part]).sum())
            slope[part] = product(log_q.exp_().sub_(p).mul_(shares[part, None]), self.head)
        return loss, slope.view_as(normed)


@torch.no_grad()
def retell(lesson: Lesson, head: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The windows with a share of their tokens drawn anew from what the float model predicts there.

    Returns:
        (windows, tokens) ids, the first of each window as it was.
    """
    told = lesson.windows.clone()
    for index, window in enumerate(told):
        target = lesson.target(torch.tensor([index]))[:-1]
        for part in _parts(len(target), len(head)):
            p = torch.softmax(product(target[part], head.T), -1).cpu()
            drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
            chosen = torch.rand(len(drawn), generator=generator) < share
            rows = slice(part.start + 1, part.start + 1 + len(drawn))
            window[rows] = torch.where(chosen, drawn, window[rows])
    return told


def _parts(tokens: int, vocab_size: int) -> list[slice]:
    """Slices of as many tokens as have their logits in memory at a time."""
    step = max(1, _LOGITS // vocab_size)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
