"""Coordinate descent over finished codes, on the exact loss tr (W - Q) H (W - Q)^T.

GPTQ rounds a column once, knowing nothing of the columns to come. Afterwards each can be rounded
again with all others in place (QuantEase, arXiv 2309.01885): with E = W - Q, the value of column j
that loses least is

    v_j = q_j + (E H)_j / H_jj ,      q_j <- nearest grid value to v_j ,

which never raises the loss. A block of columns starts from one product, E H[:, block]; inside it,
every change d_i = q_i(old) - q_i(new) is passed on at once,

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
from quant.native.products import product
from quant.solvers.columns import by_column, round_block

_ROWS = 512  # rows at a time that are dequantized


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
    for start in range(0, len(codes), block_size):
        block = slice(start, min(start + block_size, len(codes)))
        here = grids.of(block)
        before = here.scales[here.groups] * (codes[block] - here.zeros[here.groups])
        diagonal = hessian.diagonal()[block]
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0)  # an input never seen moves nothing
        pulls = product(hessian[block], errors).mul_(inverse[:, None]).add_(before)
        ratio = hessian[block, block] * inverse
        changes, unjudged = torch.empty_like(before), before.new_zeros(2, len(before))
        some = solving.Block(pulls, before, ratio, unjudged)
        codes[block], _ = round_block(some, here, changes)
        errors[block] += changes
    return replace(tensor, codes=codes.T.contiguous())
