"""Rows that make up for each other's errors.

A solver judges an error E of a weight by tr E H E^T, row by row. What the model's predictions
suffer is closer to

    tr G E H E^T ,      G = sum of g g^T over tokens,

with g the gradient to the linear's output (K-FAC, arXiv 1503.05671): outputs that the model reads
together may let their errors cancel. With G = R R^T, R upper triangular, this is the sum over rows
i of R_ii^2 F_i H F_i^T with

    F_i = E_i + sum over k < i of E_k R_ki / R_ii ,

so once the rows before it are rounded, row i has the aim

    w_i + sum over k < i of (w_k - q_k) R_ki / R_ii ,

GPTQ's own recursion for columns, over rows (two-sided feedback, YAQA, arXiv 2505.22988). Rows are
taken by falling G_ii, some at a time: these see the errors of the rows before, but not each
other's. Any solver of rows serves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.native.products import product
from quant.solvers.factor import factor, shrunk
from quant.solvers.loss import Solution

_BLOCKS, _LEAST = 64, 16  # times that the rows of a linear wait for others; rows at a time
_SHRINK = 0.5  # of G towards its diagonal: it is known from few tokens
_DAMP = 0.01


def solve_in_turn(
    weight: Tensor, fisher: list[Tensor], solve: Callable[[Tensor], Solution]
) -> Solution:
    """Solve a stack of linears that share an input, the rows of each with feedback.

    Args:
        weight: (out, in) float32.
        fisher: G (rows, rows) float32 of each linear, in the order of the stack.
        solve: solves some rows (rows, in) for their common input.

    Returns:
        A solution without losses, since those of `solve` are distances from aims that moved.
    """
    tensors: list[QuantizedTensor] = []
    told: dict[str, None] = {}  # notes, each once, in order
    start = 0
    for G in fisher:
        rows = weight[start : start + len(G)]
        start += len(G)
        solution, order = _solve_linear(rows, G, solve)
        told |= dict.fromkeys(solution.notes)
        tensors.append(solution.tensor.rows(order.argsort()))
    return Solution(QuantizedTensor.stack(tensors), solution.damp, tuple(told))


def rows_at_a_time(rows: int) -> int:
    """Of a linear with so many."""
    return max(_LEAST, -(-rows // _BLOCKS))


def _solve_linear(
    weight: Tensor, G: Tensor, solve: Callable[[Tensor], Solution]
) -> tuple[Solution, Tensor]:
    """The rows of one linear in the order that they were solved in, and that order."""
    order = G.diagonal().argsort(descending=True, stable=True)
    with shrunk(G, _SHRINK):
        R, _, told = factor(G, order, _DAMP)
    errors = torch.empty_like(weight)
    parts: list[QuantizedTensor] = []
    step = rows_at_a_time(len(weight))
    for start in range(0, len(weight), step):
        here = slice(start, start + step)
        rows = weight[order[here]]
        aim = rows
        if start:
            pull = product(R[:start, here].T, errors[:start])
            square = R[here, here].T.contiguous()
            aim = rows + torch.linalg.solve_triangular(square, pull, upper=False)
        solution = solve(aim)
        parts.append(solution.tensor)
        torch.sub(rows, solution.tensor.dequantize(), out=errors[here])
    notes = (*solution.notes, *(f"between rows: {note}" for note in told))
    return Solution(QuantizedTensor.stack(parts), solution.damp, notes), order
