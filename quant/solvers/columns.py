"""The loop inside a block of columns, which GPTQ and the sweeps after it share.

Column j receives the errors of the columns before it and is rounded:

    v_j = values_j + sum over i < j of errors_i ratio_ij ,
    code_j = nearest code to v_j ,   q_j = scale_j (code_j - zero_j) ,   errors_j = original_j - q_j

and what that loses is s_j (v_j - q_j)^2 - d_j errors_j^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grid import Grid
from quant.native import solving


def by_column(grid: Grid, order: Tensor) -> solving.Grids:
    """A grid of groups of consecutive columns, for columns in the given order."""
    groups = order // (len(order) // grid.scales.shape[1])
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.float().contiguous()
    return solving.Grids(scales, zeros, groups, grid.max_code)


def round_block(
    block: solving.Block, grids: solving.Grids, errors: Tensor
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn, compiled where that is possible.

    Args:
        errors: (columns, rows), filled with w - q.

    Returns:
        Codes (columns, rows) uint8, and the energy each row loses.
    """
    rounding = solving.round_block if solving.can_round(block) else _in_torch
    return rounding(block, grids, errors)


def _in_torch(block: solving.Block, grids: solving.Grids, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Round the columns of one block in turn: what native/solve.h does.

    Returns:
        Codes (columns, rows) uint8, and the energy each row loses; fills `errors` with w - q.
    """
    codes, losses = block.values.clone(), torch.zeros_like(block.values[0])
    for j, group in enumerate(grids.groups.tolist()):
        scale, zero = grids.scales[group], grids.zeros[group]
        value = codes[j].addmv_(errors[:j].T, block.ratio[:j, j]) if j else codes[j]
        code = (value / scale).round_().add_(zero).clamp_(0, grids.max_code)
        rounded = (code - zero) * scale
        torch.sub(block.original[j], rounded, out=errors[j])
        square, added = block.judged[:, j]
        losses += square * (value - rounded) ** 2 - added * errors[j] ** 2
        codes[j] = code
    return codes.to(torch.uint8), losses
