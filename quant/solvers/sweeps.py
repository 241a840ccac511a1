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
same compiled loop runs it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.native import solving
from quant.native.products import add_product_, product
from quant.solvers.columns import by_column, round_block

_ROWS = 512  # rows at a time that are dequantized
_SPAN, _WIDE = 4, 2048  # blocks that share a product, and inputs from which that gains time


def sweep(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor, block_size: int
) -> QuantizedTensor:
    """One pass over all columns, from left to right.

    Args:
        weight: (out, in) float32, what the codes are to approach.
        hessian: (in, in) float32, symmetric.
        tensor: codes on their grid, in groups of consecutive columns.
        block_size: columns per block between two large products.

    Returns:
        New codes on the same grid; no row loses more than before, up to rounding in float32.
    """
    grid = tensor.grid
    order = torch.arange(weight.shape[1], device=weight.device)
    grids = by_column(grid, order)
    codes = tensor.codes.T.contiguous()  # (in, out)
    errors = torch.empty(codes.shape, dtype=weight.dtype, device=weight.device)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        errors[:, rows] = (weight[rows] - tensor.rows(rows).dequantize(weight.dtype)).T
    diagonal = hessian.diagonal()
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
            codes[block] = _round(
                pulls[here], codes[block], grids.of(block), ratio[here, block], changes[here]
            )
        errors[first:last] += changes
    return replace(tensor, codes=codes.T.contiguous())


def _round(
    pulls: Tensor, codes: Tensor, grids: solving.Grids, ratio: Tensor, changes: Tensor
) -> Tensor:
    """The new codes of a block of columns; fills `changes` with what that takes off its values."""
    before = grids.scales[grids.groups] * (codes - grids.zeros[grids.groups])
    unjudged = before.new_zeros(2, len(before))
    block = solving.Block(pulls.add_(before), before, ratio.T, unjudged)
    return round_block(block, grids, changes)[0]
