"""One group of linears that share an input: solved as one stack of rows, judged row by row.

Rows are independent given the Hessian, so each of several processes solves and judges its share
of them, and all of them get the whole result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib.hessian import Hessian
from quant import distributed
from quant.config import QuantConfig
from quant.grid import Grid, QuantizedTensor
from quant.solvers import solve
from quant.solvers.loss import Solution, lost_share, output_energy
from quant.solvers.rtn import RTNOptions
from quant.solvers.target import towards_float

_BLOCK_ROWS = 2048  # judged at a time: enough for full GEMM speed, small next to a weight


@dataclass(frozen=True)
class Solved:
    """One linear: its codes, and what was lost to get them.

    Attributes:
        error, rtn_error: the relative error of these codes, and of rounding to nearest.
        aim_errors: both again as distances from W*; empty where the weight itself was the aim.
    """

    tensor: QuantizedTensor
    error: float
    rtn_error: float
    damp: float
    notes: tuple[str, ...]
    aim_errors: tuple[float, ...]


def solve_group(
    weights: list[Tensor],
    statistics: Hessian,
    config: QuantConfig,
    options: Any,
    fisher: list[Tensor] | None = None,
) -> list[Solved]:
    """Solve linears (out, in) of the same input, whose Hessian is of all tokens; where it has a
    drift or a lag, aim at the float model's outputs; where the Fisher matrices (out, out) of their
    outputs are given, let rows make up for each other's errors.
    """
    hessian = statistics.matrix
    stack = torch.cat(weights) if len(weights) > 1 else weights[0]
    count = len(stack)
    share = distributed.share(count)
    mine = stack[share]
    aim = _aim(mine, statistics, share, options)
    among = None if fisher is None else _among(fisher, share)
    solution = solve(mine if aim is None else aim, hessian, config, options, among)
    plain = solve(mine, hessian, config, RTNOptions()).tensor
    both = (solution.tensor, plain)
    told = (solution.losses, None)  # of what was solved for
    energies = solution.energies if aim is None else None
    losses = [(output_energy(mine, hessian) if energies is None else energies)[:, None]]
    losses.append(_losses(mine, both, told if aim is None else (None, None), hessian))
    if aim is not None:
        losses.append(_losses(aim, both, told, hessian))
    judged = distributed.gather_rows(torch.cat(losses, dim=1), count)
    whole = replace(solution, tensor=_gather(solution.tensor, count))
    return list(_one_by_one(weights, whole, judged))


def _among(fisher: list[Tensor], rows: slice) -> list[Tensor]:
    """What these rows of the stack have to do with each other, linear by linear."""
    parts, start = [], 0
    for G in fisher:
        own = slice(max(rows.start - start, 0), min(rows.stop - start, len(G)))
        if own.start < own.stop:
            parts.append(G[own, own])
        start += len(G)
    return parts


def _one_by_one(weights: list[Tensor], whole: Solution, judged: Tensor) -> Iterator[Solved]:
    """The stack's solution, linear by linear, with the losses (out, 3 or 5) of its rows."""
    start = 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start = rows.stop
        energy, *lost = judged[rows].sum(0).tolist()
        error, rtn_error, *towards_aim = (lost_share(loss, energy) for loss in lost)
        tensor, damp, notes = whole.tensor.rows(rows), whole.damp, whole.notes
        yield Solved(tensor, error, rtn_error, damp, notes, tuple(towards_aim))


def _aim(weight: Tensor, statistics: Hessian, rows: slice, options: Any) -> Tensor | None:
    """W* of these rows of a weight; None where the weight itself is to be approached."""
    missing = []
    if statistics.drift is not None and options.target:
        missing.append(options.target * (weight @ statistics.drift))
    if statistics.lag is not None and options.residual:
        missing.append(options.residual * statistics.lag[rows])
    if not missing:
        return None
    return towards_float(weight, statistics.matrix, sum(missing, torch.zeros_like(weight)))


def _losses(
    weight: Tensor,
    tensors: tuple[QuantizedTensor, ...],
    known: tuple[Tensor | None, ...],
    hessian: Tensor,
) -> Tensor:
    """(out, tensors) float64: the energy that separates each tensor from every row, where its
    solver has not told.
    """
    losses = torch.empty(len(weight), len(tensors), dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        for column, (tensor, told) in enumerate(zip(tensors, known, strict=True)):
            if told is not None:
                losses[rows, column] = told[rows]
                continue
            error = weight[rows] - tensor.rows(rows).dequantize()
            losses[rows, column] = output_energy(error, hessian)
    return losses


def _gather(part: QuantizedTensor, count: int) -> QuantizedTensor:
    """All rows of a tensor of which this process has its share."""
    scales = distributed.gather_rows(part.grid.scales, count)
    zeros = distributed.gather_rows(part.grid.zeros, count)
    codes = distributed.gather_rows(part.codes, count)
    return replace(part, codes=codes, grid=Grid(scales, zeros, part.bits))
