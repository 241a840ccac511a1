"""GPTQ (Frantar et al., arXiv 2210.17323) with one Cholesky factor and no inverse.

Columns are rounded one after another; each rounding error is passed on to the columns still to
come, so that the layer's output changes least. With H = R R^T, R upper triangular, the column to
round is

    v_j = w_j + sum over k < j of (w_k - q_k) R_kj / R_jj ,      q_j = nearest grid value to v_j

with the original w_k, and the loss it adds is (v_j - q_j)^2 R_jj^2. This is the classical method
exactly: its upper factor of the inverse Hessian is U = R^-1. Where H was damped by d_j, so is that
loss, and d_j (w_j - q_j)^2 is taken off again.

Worked example: W = [0.4, 0.4], H = [[2, 1], [1, 1]], scale 1. Then R = [[1, 1], [0, 1]]. Column 0:
v = 0.4, q = 0, error 0.4. Column 1: v = 0.4 + 0.4 * 1 / 1 = 0.8, q = 1. Rounding gives [0, 0] with
loss 0.8, GPTQ [0, 1] with 0.2.

Group grids are fitted to the original weights beforehand, so columns may be taken in the order of
falling diag(H) (act-order) and the codes are put back in place: no runtime ever sees the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.grid import Grid, QuantizedTensor, fit_minmax
from quant.native import solving
from quant.native.products import add_product_
from quant.solvers.columns import by_column, round_block
from quant.solvers.factor import damped, factor, shrunk
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.loss import Solution
from quant.solvers.refit import refit
from quant.solvers.row_feedback import solve_in_turn
from quant.solvers.scale_search import fit_weighted
from quant.solvers.sweeps import sweep

_SPAN, _ROWS = 4, 1024  # blocks that share a product; rows that are judged at a time


def solve(
    weight: Tensor,
    hessian: Tensor,
    config: QuantConfig,
    options: GPTQOptions,
    fisher: list[Tensor] | None = None,
) -> Solution:
    """Quantize a weight.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32, the sum of x x^T over tokens.
        fisher: matrices of the outputs of each linear, for quant.solvers.row_feedback.

    Returns:
        Codes on static, float16-exact grids, with the damping used and any retry in `notes`.

    Raises:
        ValueError: weight or Hessian is not finite.
    """
    if not _is_finite(weight) or not _is_finite(hessian):
        raise ValueError("GPTQ: the weight or the Hessian is not finite")
    with shrunk(hessian, options.shrink):
        columns = _Columns.of(hessian, options)
        if fisher is not None:
            return solve_in_turn(
                weight, fisher, lambda rows: _solve(rows, columns, config, options)
            )
        solution = _solve(weight, columns, config, options)
    return _without_shrinkage(weight, hessian, options.shrink, solution)


def _without_shrinkage(
    weight: Tensor, hessian: Tensor, share: float, solution: Solution
) -> Solution:
    """The solution with its losses and energies for the Hessian itself."""
    tensor = replace(solution.tensor, codes=solution.tensor.codes.contiguous())
    losses, energies = solution.losses, solution.energies
    if share:
        beyond = share / (1 - share)  # of the diagonal's energy has been counted
        blocks = [slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS)]
        errors = (weight[rows] - tensor.rows(rows).dequantize(weight.dtype) for rows in blocks)
        assert losses is not None
        losses = losses - beyond * _diagonal_energy(errors, hessian)
        if energies is not None:
            energies = energies - beyond * _diagonal_energy(weight.split(_ROWS), hessian)
    return replace(solution, tensor=tensor, losses=losses, energies=energies)


def _diagonal_energy(parts: Iterable[Tensor], hessian: Tensor) -> Tensor:
    """sum of h_jj a_j^2 of every row a, given some rows at a time; (rows,) float64."""
    return torch.cat([part.square() @ hessian.diagonal() for part in parts]).double()


@dataclass(frozen=True)
class _Columns:
    """The Hessian made ready for any rows.

    Attributes:
        order: in which columns are rounded.
        ratio: (in, in), R_kj / R_jj in that order.
        judged: (2, in), R_jj^2, and what damping added to H_jj.
        damp, notes: of the factor.
    """

    hessian: Tensor
    order: Tensor
    ratio: Tensor
    judged: Tensor
    damp: float
    notes: tuple[str, ...]

    @staticmethod
    def of(hessian: Tensor, options: GPTQOptions) -> _Columns:
        order = torch.arange(len(hessian), device=hessian.device)
        if options.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        R, damp, notes = factor(hessian, order, options.damp)
        diagonal = hessian.diagonal()[order].double()
        added = (damped(diagonal, damp) - diagonal).to(hessian.dtype)
        judged = torch.stack((R.diagonal().square(), added))
        return _Columns(hessian, order, R.div_(R.diagonal().clone()), judged, damp, notes)


def _solve(
    weight: Tensor, columns: _Columns, config: QuantConfig, options: GPTQOptions
) -> Solution:
    """The solution, its codes column by column in memory."""
    hessian = columns.hessian
    grid = _fit(weight, hessian, config, options)
    codes, losses = _round_columns(weight, columns, grid, options.block_size)
    tensor, energies = QuantizedTensor(codes, grid), None
    for index in range(options.sweeps):
        if index < options.refits:
            tensor, gained, kept = refit(weight, hessian, tensor)
            energies = kept + losses if energies is None else energies
            losses += gained
        tensor, gained = sweep(weight, hessian, tensor, options.block_size)
        losses += gained
    return Solution(tensor, columns.damp, columns.notes, losses, energies)


def _is_finite(matrix: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all())


def _fit(weight: Tensor, hessian: Tensor, config: QuantConfig, options: GPTQOptions) -> Grid:
    """The grids of all groups, as `options.scales` says."""
    if options.scales == "minmax":
        return fit_minmax(weight, config)
    return fit_weighted(weight, hessian.diagonal(), config, signed=options.scales == "signed")


def _round_columns(
    weight: Tensor, columns: _Columns, grid: Grid, block_size: int
) -> tuple[Tensor, Tensor]:
    """The column loop, left-looking: a span of blocks first receives all earlier errors as one
    product, then each block those of the span.

    Works on transposed tensors, (in, out), so that a column of W is a contiguous row.

    Returns:
        Codes (out, in) uint8, column by column in memory, and the energy that each row loses,
        (out,) float64.
    """
    order, ratio = columns.order, columns.ratio
    grids = by_column(grid, order)
    errors = torch.empty(weight.T.shape, dtype=weight.dtype, device=weight.device)  # w_k - q_k
    codes = torch.empty(errors.shape, dtype=torch.uint8, device=weight.device)
    losses = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for first, originals in _spans(weight, order, _SPAN * block_size):
        last = first + len(originals)
        values = originals.clone()
        add_product_(values, ratio[:first, first:last].T, errors[:first])
        for start in range(first, last, block_size):
            end = min(start + block_size, last)
            here = slice(start - first, end - first)
            add_product_(values[here], ratio[first:start, start:end].T, errors[first:start])
            square, judged = ratio[start:end, start:end], columns.judged[:, start:end]
            block = solving.Block(values[here], originals[here], square, judged)
            results = round_block(block, grids.of(slice(start, end)), errors[start:end])
            codes[order[start:end]] = results[0]
            losses += results[1]
    return codes.T, losses


def _spans(weight: Tensor, order: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Where each span of columns begins, and its columns (span, out). Four are gathered at a time:
    each row is read once for all of them, and no second weight is held.
    """
    for start in range(0, len(order), 4 * size):
        rows = weight.index_select(1, order[start : start + 4 * size])
        for first, columns in enumerate(rows.split(size, dim=1)):
            yield start + first * size, columns.T.contiguous()
