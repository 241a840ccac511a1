"""The loop inside a block of columns, which GPTQ and the sweeps after it share.

Column j receives the errors of the columns before it and is rounded:

    v_j = values_j + sum over i < j of errors_i ratio_ij ,
    code_j = nearest code to v_j ,   q_j = scale_j (code_j - zero_j) ,   errors_j = original_j - q_j

and what that loses is s_j (v_j - q_j)^2 - d_j errors_j^2.

On the CPU the loop is compiled. A GPU is given all its steps at once, recorded for each shape of
block the first time: one by one they take it less time than it takes to ask for them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
    if solving.can_round(block):
        return solving.round_block(block, grids, errors)
    scales, zeros = grids.scales[grids.groups], grids.zeros[grids.groups]
    given = block.values, block.original, block.ratio, scales, -zeros, grids.max_code - zeros
    if errors.is_cuda and errors.dtype is torch.float32:
        values, steps = _recorded(errors.shape, errors.device).play(given)
    else:
        values, steps = _in_torch(given)
    rounded = steps * scales
    torch.sub(block.original, rounded, out=errors)
    squares, added = block.judged[:, :, None]
    losses = (values - rounded).square_().mul_(squares).sub_(errors.square().mul_(added))
    return (steps + zeros).to(torch.uint8), losses.sum(0)


def _in_torch(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Round the columns of one block in turn: what native/solve.h does.

    Args:
        given: values and original (columns, rows), ratio (columns, columns), and for every value
            its scale, the least and the largest of code - zero, (columns, rows).

    Returns:
        v and code - zero, (columns, rows) in the dtype of the values.
    """
    values, original, ratio, scales, low, high = given
    values = values.clone()
    steps, errors = torch.empty_like(values), torch.empty_like(values)
    passed_on = ratio.T.contiguous()  # (to, from)
    for j, (value, step, scale) in enumerate(zip(values, steps, scales, strict=True)):
        if j:
            value.addmv_(errors[:j].T, passed_on[j, :j])
        torch.div(value, scale, out=step).round_().clamp_(low[j], high[j])
        torch.addcmul(original[j], step, scale, value=-1, out=errors[j])  # of few bits: q is exact
    return values, steps


class _Recording:
    """`_in_torch` on blocks of one shape, as a CUDA graph."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        sizes = shape, shape, (shape[0], shape[0]), shape, shape, shape
        self._given = [torch.ones(size, device=device) for size in sizes]
        _in_torch(self._given)  # what is set up at the first call is not recorded
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._made = _in_torch(self._given)

    def play(self, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """v and code - zero, which stay as they are until the next call."""
        for mine, theirs in zip(self._given, given, strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        return self._made


@functools.lru_cache(maxsize=8)  # shapes in a layer: one for each input, two where blocks differ
def _recorded(shape: torch.Size, device: torch.device) -> _Recording:
    return _Recording(shape, device)
