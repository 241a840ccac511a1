"""Coordinate descent over finished codes, on the exact loss tr (W - Q) H (W - Q)^T.

GPTQ rounds a column once, knowing nothing of the columns to come. Afterwards each can be rounded
again with all others in place (QuantEase, arXiv 2309.01885): with E = W - Q, the value of column j
that loses least is

    v_j = q_j + (E H)_j / H_jj ,      q_j <- nearest grid value to v_j ,

which never raises the loss. A span of columns starts from one product, E H[:, span], and each block
in it from the changes of the blocks before it; inside a block, every change d_i = q_i(old) -
q_i(new) is passed on at once,

    v_j = q_j + (E H)_j / H_jj + sum over i < j of d_i H_ij / H_jj ,

the same recursion as GPTQ's own with H in the place of R and d in the place of the errors, so the
same compiled loop runs it. The changes D of a block add tr (2 E H + D H) D^T to the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.native import solving
from quant.native.products import add_product_, product
from quant.solvers.columns import by_column, round_block

_SPAN, _WIDE = 4, 2048  # blocks that share a product, and inputs from which that gains time


def sweep(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor, block_size: int
) -> tuple[QuantizedTensor, Tensor]:
    """One pass over all columns, from left to right.

    Args:
        weight: (out, in) float32, what the codes are to approach.
        hessian: (in, in) float32, symmetric.
        tensor: codes on their grid, in groups of consecutive columns.
        block_size: columns per block between two large products.

    Returns:
        New codes on the same grid, column by column in memory; and what they add to the loss of
        each row, (out,) float64, not above 0 up to rounding in float32.
    """
    grids = by_column(tensor.grid, torch.arange(weight.shape[1], device=weight.device))
    codes = tensor.codes.T.clone(memory_format=torch.contiguous_format)  # (in, out)
    errors = _errors(weight, codes, grids, block_size)
    diagonal = hessian.diagonal()
    added = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)  # an input never seen moves nothing
    span = block_size * (_SPAN if len(codes) >= _WIDE else 1)
    for first in range(0, len(codes), span):
        last = min(first + span, len(codes))
        ratio = hessian[first:last] * inverse[first:last, None]  # H_ij / H_jj at (j, i)
        pulls = product(ratio, errors)
        changes = torch.empty_like(pulls)
        for start in range(0, last - first, block_size):
            here = slice(start, min(start + block_size, last - first))
            block = slice(first + start, first + here.stop)
            earlier = slice(first, block.start)
            add_product_(pulls[here], ratio[here, earlier], changes[:start])
            square = ratio[here, block]
            values = pulls[here].clone()
            codes[block] = _round(values, codes[block], grids.of(block), square, changes[here])
            added += _added(pulls[here], square, changes[here], diagonal[block])
        errors[first:last] += changes
    return replace(tensor, codes=codes.T), added


def _added(pulls: Tensor, ratio: Tensor, changes: Tensor, diagonal: Tensor) -> Tensor:
    """What the changes D of a block add to each row's loss, (2 E H + D H) D^T; uses up `pulls`,
    which are E H over the diagonal of H, as `ratio` is H.
    """
    slope = pulls.mul_(2)
    add_product_(slope, ratio, changes)
    return slope.mul_(changes).mul_(diagonal[:, None]).sum(0, dtype=torch.float64)


def _errors(weight: Tensor, codes: Tensor, grids: solving.Grids, block_size: int) -> Tensor:
    """What the values of codes (in, out) lack of a weight (out, in); (in, out)."""
    errors = torch.empty(codes.shape, dtype=weight.dtype, device=weight.device)
    for start in range(0, len(codes), block_size):
        block = slice(start, min(start + block_size, len(codes)))
        errors[block] = weight[:, block].T - _values(codes[block], grids.of(block))
    return errors


def _round(
    pulls: Tensor, codes: Tensor, grids: solving.Grids, ratio: Tensor, changes: Tensor
) -> Tensor:
    """The new codes of a block of columns; fills `changes` with what that takes off its values."""
    before = _values(codes, grids)
    unjudged = before.new_zeros(2, len(before))
    block = solving.Block(pulls.add_(before), before, ratio.T, unjudged)
    return round_block(block, grids, changes)[0]


def _values(codes: Tensor, grids: solving.Grids) -> Tensor:
    """The values of codes (columns, rows)."""
    return grids.scales[grids.groups] * (codes - grids.zeros[grids.groups])
