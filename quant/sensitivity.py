"""Which linears lose most by coarse grids: the forecast of `--target-bpw` (quant.bit_choice).

To second order, an error D of a linear's weight moves the predictions by

    KL = 1/2 mean over tokens t of (g_t . D x_t)^2 ,

where x_t is the linear's input and g_t the gradient of the log-likelihood of tokens drawn from the
model's own predictions (the Fisher information). Taking gradients as uncorrelated among rows r, and
what they have to do with inputs as the same for all rows,

    KL = 1/2 sum over r of  mean g_r^2  D_r H D_r^T ,      H = mean of u_t x_t x_t^T ,

u_t being |g_t|^2 over its mean: K-FAC (arXiv 1503.05671) has 1 there, but the first token of a text
has huge inputs that hardly matter.

What GPTQ leaves of D_r H D_r^T is the sum over inputs j of e_rj^2 R_jj^2, with H = R R^T as in
quant.solvers.gptq and e_rj the rounding of one value; that of the weight itself stands for it. All
this takes one forward and one backward pass of the float model over a few windows, layer by layer:
of every layer the input is kept.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.hidden import Storage
from quant.checkpoint import CheckpointReader
from quant.config import QuantConfig
from quant.grid import QuantizedTensor, nearest_codes
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.native.products import product
from quant.slopes import Slopes, backward
from quant.solvers.factor import factor
from quant.solvers.gptq_options import EFFORTS
from quant.solvers.scale_search import fit_weighted

TOKENS = 2048  # of the windows that are looked at; one window at least
_SOLVER = EFFORTS["fast"]  # all efforts shrink and damp H alike


@dataclass(frozen=True)
class Sensitivity:
    """Linears that share an input, and must share a grid.

    Attributes:
        names: of the linears.
        shapes: (out, in) of each.
        losses: the KL per token, in nats, that each candidate grid is expected to cost.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    losses: tuple[float, ...]


class _Moments:
    """Of a layer, gathered as it runs: the inputs x (tokens, in) of each group of linears, by the
    name of its first, and of every linear the mean g_r^2 (out,) and the |g_t|^2 (tokens,).
    """

    def __init__(self, layer: DecoderLayer) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        for group in LINEAR_GROUPS:
            for name in group:
                linear = layer.linear(name)
                linear.register_forward_hook(lambda *call, name=name: self._take(name, *call[1:]))

    def _take(self, name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if any(name == group[0] for group in LINEAR_GROUPS):
            self.inputs[name] = inputs[0].detach().flatten(0, -2)

        def keep(slope: Tensor) -> None:
            squares = slope.flatten(0, -2).square()
            self.slopes[name], self.tokens[name] = squares.mean(0), squares.sum(1)

        output.register_hook(keep)


def sensitivities(
    reader: CheckpointReader,
    llama: LlamaConfig,
    windows: Tensor,
    candidates: list[QuantConfig],
    device: torch.device,
) -> list[Sensitivity]:
    """What each candidate grid would cost in each group of linears, from the last layer to the
    first.

    Args:
        windows: (windows, tokens) int64 ids; the first TOKENS of them are looked at.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    found: list[Sensitivity] = []
    slopes = Slopes(llama, (len(windows), windows.shape[1]), Storage())
    steps = backward(reader, llama, (windows, None), slopes, device, _Moments)
    for index, layer, moments in steps:
        found += [_judge(layer, index, group, moments, candidates) for group in LINEAR_GROUPS]
    return found


def _judge(
    layer: DecoderLayer,
    index: int,
    group: tuple[str, ...],
    moments: _Moments,
    candidates: list[QuantConfig],
) -> Sensitivity:
    """What the candidates cost in linears that share an input."""
    losses = [0.0] * len(candidates)
    weights = {name: layer.linear(name).weight for name in group}
    counts = torch.stack([moments.tokens[name] for name in group]).sum(0)
    seen, left = _importances(moments.inputs.pop(group[0]), counts / counts.mean())
    for name, weight in weights.items():
        slope = moments.slopes[name].double()
        for at, config in enumerate(candidates):
            grid = fit_weighted(weight, seen, config, signed=config.symmetric)
            error = weight - QuantizedTensor(nearest_codes(weight, grid), grid).dequantize()
            losses[at] += 0.5 * float((error.square_() @ left).double() @ slope)
    names = tuple(f"model.layers.{index}.{name}" for name in group)
    shapes = tuple((len(weight), weight.shape[1]) for weight in weights.values())
    return Sensitivity(names, shapes, tuple(losses))


def _importances(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """mean x_j^2 and R_jj^2 of every input, (in,) float32, with H shrunk and in the order of GPTQ.

    Args:
        x: (tokens, in).
        counts: (tokens,), u_t.
    """
    seen = x.square().mean(0)
    H = product((x * counts[:, None]).T, x) / len(x)
    H.diagonal().div_(1 - _SOLVER.shrink)
    order = seen.argsort(descending=True, stable=True)
    R, damp, _ = factor(H, order, _SOLVER.damp)
    if damp != _SOLVER.damp:
        warnings.warn(f"forecast of bits: damping raised to {damp:g}", stacklevel=1)
    left = torch.empty_like(seen)
    left[order] = R.diagonal().square()
    return seen, left
