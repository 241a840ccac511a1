"""Columns of o_proj and down_proj brought to the size that the inputs they meet call for.

A group's scale is as coarse for columns that meet strong inputs as for those that meet weak ones. A
value channel and a neuron of the MLP may have any size, if the column that reads them makes up for
it:

    v_j / c_j  and  o_j c_j ,      up_j / c_j  and  down_j c_j .

Rows of v and up are as accurate at any size, having scales of their own, so c is free to be

    c_j = (rms of input j / rms of column j) ^ strength ,

which for a strength of 1/2 makes the sum of squared errors least where a group's scale follows the
rms of its weights (Cauchy-Schwarz). AWQ (arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438) move
sizes between linears like this. Query heads that share a value channel share its c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calib.hidden import HiddenStates
from quant import distributed
from quant.llama.model import DecoderLayer, Linear

TOKENS = 2048  # of a run that are looked at, in whole windows
WRITERS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}  # of inputs
_MOST = 8.0  # of c and 1 / c


def equalize_first_(
    layer: DecoderLayer, states: HiddenStates, mask: Tensor | None, strength: float
) -> None:
    """`equalize_` by the first TOKENS tokens of all processes; nothing if the strength is 0.

    Args:
        states: inputs of the layer, for this process's windows. Where the float model runs beside
            the quantized one they must be its own, which a run that is continued computes again.
        mask: (windows, tokens) bool of the same windows.
    """
    if not strength:
        return
    before = distributed.share(distributed.total(states.windows)).start
    count = max(1, TOKENS // states.tokens) - before
    first = slice(0, max(0, min(count, states.windows)))
    inputs = states.present.read(first, states.hidden_size)
    device = layer.linear("mlp.down_proj").weight.device
    equalize_(layer, inputs.to(device), None if mask is None else mask[first], strength)


def equalize_(layer: DecoderLayer, inputs: Tensor, mask: Tensor | None, strength: float) -> None:
    """Move sizes between the linears of a layer; what it computes stays the same.

    Args:
        layer: of the float model, in float32. Where v or up has a bias, its pair is left alone.
        inputs: of the layer, some windows (windows, tokens, hidden) float32 of this process, which
            may be none if another one has some.
        mask: (windows, tokens) bool, False for padding, which does not count.
        strength: the exponent of c, 0 to 1; 0 changes nothing.
    """
    energies = {name: inputs.new_zeros(layer.linear(name).in_features) for name in WRITERS}

    def keep(name: str, x: Tensor) -> None:
        rows = x if mask is None else x[mask.to(x.device)]
        energies[name] = rows.square().flatten(0, -2).sum(0)

    hooks = [
        layer.linear(name).register_forward_pre_hook(lambda _, xs, name=name: keep(name, xs[0]))
        for name in WRITERS
    ]
    if len(inputs):
        layer(inputs)
    for hook in hooks:
        hook.remove()
    head_dim = layer.self_attn.config.head_dim
    for name, written_by in WRITERS.items():
        distributed.sum_(energies[name])
        _move(layer.linear(written_by), layer.linear(name), energies[name], strength, head_dim)


def _move(writer: Linear, reader: Linear, energy: Tensor, strength: float, head_dim: int) -> None:
    """Divide rows of `writer` by c, and multiply the columns of `reader` that meet them.

    Args:
        energy: (in,) of the inputs of `reader`.
    """
    if writer.bias is not None:
        return
    sizes = torch.stack((energy, reader.weight.square().sum(0)))
    sharing = reader.in_features // writer.out_features
    per_head = head_dim if sharing > 1 else writer.out_features
    sizes = sizes.view(2, -1, sharing, per_head).sum(2).flatten(1).clamp(min=1e-30)
    c = (sizes[0] / sizes[1]).pow(strength / 2)
    c = (c / c.log().mean().exp()).clamp(1 / _MOST, _MOST)
    writer.weight.div_(c[:, None])
    reader.weight.mul_(columns_of(c, reader.in_features, head_dim))


def columns_of(c: Tensor, count: int, head_dim: int) -> Tensor:
    """(count,) for the columns of o or down, of one for each row of v or up."""
    sharing = count // len(c)  # query heads of a value head
    if sharing == 1:
        return c
    return c.view(-1, 1, head_dim).expand(-1, sharing, -1).flatten()
