"""One group of linears that share an input: solved as one stack of rows, judged row by row.

Rows are independent given the Hessian, so each of several processes solves and judges its share
of them, and all of them get the whole result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib.hessian import Hessian
from quant import distributed
from quant.config import QuantConfig
from quant.grid import Grid, QuantizedTensor
from quant.solvers import solve
from quant.solvers.loss import output_energy
from quant.solvers.rtn import RTNOptions
from quant.solvers.target import towards_float

_BLOCK_ROWS = 2048  # judged at a time: enough for full GEMM speed, small next to a weight


@dataclass(frozen=True)
class Solved:
    """One linear: its codes, and what was lost to get them.

    Attributes:
        error, rtn_error: the relative error of these codes, and of rounding to nearest.
    """

    tensor: QuantizedTensor
    error: float
    rtn_error: float
    damp: float
    notes: tuple[str, ...]


def solve_group(
    weights: list[Tensor], statistics: Hessian, config: QuantConfig, options: Any
) -> list[Solved]:
    """Solve linears (out, in) of the same input, whose Hessian is of all tokens; where it has a
    drift, aim at the float model's outputs.
    """
    hessian, drift = statistics.matrix, statistics.drift
    stack = torch.cat(weights) if len(weights) > 1 else weights[0]
    count = len(stack)
    mine = stack[distributed.share(count)]
    aim = mine if drift is None else towards_float(mine, hessian, drift, options.target)
    solution = solve(aim, hessian, config, options)
    plain = solve(mine, hessian, config, RTNOptions()).tensor
    known = (solution.losses if drift is None else None, None)  # else it is of another weight
    losses = _losses(mine, (solution.tensor, plain), known, hessian)
    losses = distributed.gather_rows(losses, count)
    whole = _gather(solution.tensor, count)
    results, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start = rows.stop
        error, rtn_error, energy = losses[rows].sum(0).tolist()
        energy = energy or 1.0  # of nothing, nothing is lost
        shares = error / energy, rtn_error / energy
        results.append(Solved(whole.rows(rows), *shares, solution.damp, solution.notes))
    return results


def _losses(
    weight: Tensor,
    tensors: tuple[QuantizedTensor, ...],
    known: tuple[Tensor | None, ...],
    hessian: Tensor,
) -> Tensor:
    """(out, tensors + 1) float64: the energy each tensor loses of every row, where its solver has
    not told, and the whole energy.
    """
    losses = torch.empty(len(weight), len(tensors) + 1, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        for column, (tensor, told) in enumerate(zip(tensors, known, strict=True)):
            if told is not None:
                losses[rows, column] = told[rows]
                continue
            error = weight[rows] - tensor.rows(rows).dequantize()
            losses[rows, column] = output_energy(error, hessian)
        losses[rows, -1] = output_energy(weight[rows], hessian)
    return losses


def _gather(part: QuantizedTensor, count: int) -> QuantizedTensor:
    """All rows of a tensor of which this process has its share."""
    scales = distributed.gather_rows(part.grid.scales, count)
    zeros = distributed.gather_rows(part.grid.zeros, count)
    codes = distributed.gather_rows(part.codes, count)
    return replace(part, codes=codes, grid=Grid(scales, zeros, part.bits))
