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
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.grid import Grid, QuantizedTensor, fit_minmax
from quant.native import solving
from quant.native.products import add_product_
from quant.solvers.columns import by_column, round_block
from quant.solvers.factor import damped, factor
from quant.solvers.loss import Solution
from quant.solvers.refit import refit
from quant.solvers.scale_search import fit_weighted
from quant.solvers.sweeps import sweep

_SPAN, _ROWS = 4, 1024  # blocks that share a product; rows that are judged at a time

SCALES = ("minmax", "weighted", "signed")


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ runs; none of it is visible in the file.

    Attributes:
        act_order: take columns by falling diag(H), else from left to right.
        damp: added to the diagonal of H, as a fraction of its mean.
        block_size: columns per block between two large updates.
        scales: how group grids are chosen, one of SCALES: "minmax" spans each group's range,
            "weighted" searches for the least error weighted by diag(H), "signed" the same with
            negative scales allowed in symmetric grids.
        shrink: how far H is taken to be its own diagonal, 0 to below 1; its other entries, known
            from few tokens of one kind of text, count so much less. See `_shrunk`.
        target: how far to aim at the float model's outputs rather than at the weights, 0 to 1; 0
            is off. Used by the pipeline, see quant.solvers.target.
        residual: the same of o_proj and down_proj and the float model's residual stream.
        sink: how much more often the first token of a window counts for q, k and v than any other,
            as a share of the window's tokens, since most attention goes to it; 0 is once. Used by
            the pipeline, see calib.capture.
        sweeps: passes of coordinate descent over the finished codes, see quant.solvers.sweeps.
        refits: of these, how many begin with scales refit to the codes, see quant.solvers.refit.
    """

    act_order: bool = True
    damp: float = 0.01
    block_size: int = 128
    scales: str = "weighted"
    shrink: float = 0.0
    target: float = 0.0
    residual: float = 0.0
    sink: float = 0.0
    sweeps: int = 0
    refits: int = 0

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ValueError(
                f"scales {self.scales!r} is unknown; choose one of {', '.join(SCALES)}"
            )
        for name in ("target", "residual", "sink"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is out of range; 0 <= {name} <= 1")
        if not 0 <= self.refits <= self.sweeps:
            raise ValueError(
                f"refits {self.refits} and sweeps {self.sweeps} do not fit; 0 <= refits <= sweeps"
            )
        if not 0 <= self.shrink < 1:
            raise ValueError(f"shrink {self.shrink} is out of range; 0 <= shrink < 1")
        if not 0 <= self.damp < 1:
            raise ValueError(
                f"damp {self.damp} is out of range; it is a fraction of the mean diagonal, 0 <= "
                "damp < 1"
            )

    @property
    def needs_float(self) -> bool:
        """Whether the float model has to run beside the quantized one."""
        return self.target > 0 or self.residual > 0


_FAST = GPTQOptions(scales="signed", shrink=0.25, sink=0.2, sweeps=1, refits=1)
_BALANCED = replace(_FAST, sink=0.0, target=0.5, residual=0.5)  # a target needs no sink
EFFORTS = {"fast": _FAST, "balanced": _BALANCED, "max": _BALANCED}


def solve(weight: Tensor, hessian: Tensor, config: QuantConfig, options: GPTQOptions) -> Solution:
    """Quantize a weight.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32, the sum of x x^T over tokens.

    Returns:
        Codes on static, float16-exact grids, with the damping used and any retry in `notes`.

    Raises:
        ValueError: weight or Hessian is not finite.
    """
    if not _is_finite(weight) or not _is_finite(hessian):
        raise ValueError("GPTQ: the weight or the Hessian is not finite")
    with _shrunk(hessian, options.shrink):
        solution = _solve(weight, hessian, config, options)
    tensor = replace(solution.tensor, codes=solution.tensor.codes.contiguous())
    if not options.shrink:
        return replace(solution, tensor=tensor)
    beyond = options.shrink / (1 - options.shrink)  # of the diagonal's energy has been counted
    blocks = [slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS)]
    errors = (weight[rows] - tensor.rows(rows).dequantize(weight.dtype) for rows in blocks)
    losses, energies = solution.losses, solution.energies
    assert losses is not None
    losses -= beyond * _diagonal_energy(errors, hessian)
    if energies is not None:
        energies -= beyond * _diagonal_energy(weight.split(_ROWS), hessian)
    return replace(solution, tensor=tensor)


@contextmanager
def _shrunk(hessian: Tensor, share: float) -> Iterator[None]:
    """Within, the Hessian is (1 - share) H + share diag(H), over 1 - share: the estimator of Ledoit
    and Wolf (2004) towards a diagonal, but for its factor, which changes no code. No second matrix
    is made.
    """
    diagonal = hessian.diagonal().clone()
    hessian.diagonal().div_(1 - share)
    try:
        yield
    finally:
        hessian.diagonal().copy_(diagonal)


def _diagonal_energy(parts: Iterable[Tensor], hessian: Tensor) -> Tensor:
    """sum of h_jj a_j^2 of every row a, given some rows at a time; (rows,) float64."""
    return torch.cat([part.square() @ hessian.diagonal() for part in parts]).double()


def _solve(weight: Tensor, hessian: Tensor, config: QuantConfig, options: GPTQOptions) -> Solution:
    """The solution, its codes column by column in memory."""
    order = torch.arange(len(hessian), device=hessian.device)
    if options.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    R, damp, notes = factor(hessian, order, options.damp)
    grid = _fit(weight, hessian, config, options)
    diagonal = hessian.diagonal()[order].double()
    added = (damped(diagonal, damp) - diagonal).to(weight.dtype)
    codes, losses = _round_columns(weight, R, grid, (order, added), options.block_size)
    tensor, energies = QuantizedTensor(codes, grid), None
    for index in range(options.sweeps):
        if index < options.refits:
            tensor, gained, kept = refit(weight, hessian, tensor)
            energies = kept + losses if energies is None else energies
            losses += gained
        tensor, gained = sweep(weight, hessian, tensor, options.block_size)
        losses += gained
    return Solution(tensor, damp, notes, losses, energies)


def _is_finite(matrix: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all())


def _fit(weight: Tensor, hessian: Tensor, config: QuantConfig, options: GPTQOptions) -> Grid:
    """The grids of all groups, as `options.scales` says."""
    if options.scales == "minmax":
        return fit_minmax(weight, config)
    return fit_weighted(weight, hessian.diagonal(), config, signed=options.scales == "signed")


def _round_columns(
    weight: Tensor, R: Tensor, grid: Grid, order_added: tuple[Tensor, Tensor], block_size: int
) -> tuple[Tensor, Tensor]:
    """The column loop, left-looking: a span of blocks first receives all earlier errors as one
    product, then each block those of the span.

    Works on transposed tensors, (in, out), so that a column of W is a contiguous row.

    Args:
        order_added: the order of the columns, and what is added to the diagonal of H in it.

    Returns:
        Codes (out, in) uint8, column by column in memory, and the energy that each row loses,
        (out,) float64.
    """
    order, added = order_added
    grids = by_column(grid, order)
    judged = torch.stack((R.diagonal().square(), added))  # (2, in)
    ratio = R.div_(R.diagonal().clone())  # R_kj / R_jj
    errors = torch.empty(weight.T.shape, dtype=weight.dtype, device=weight.device)  # w_k - q_k
    codes = torch.empty(errors.shape, dtype=torch.uint8, device=weight.device)
    losses = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for first, columns in _spans(weight, order, _SPAN * block_size):
        last = first + len(columns)
        values = columns.clone()
        add_product_(values, ratio[:first, first:last].T, errors[:first])
        for start in range(first, last, block_size):
            end = min(start + block_size, last)
            here = slice(start - first, end - first)
            add_product_(values[here], ratio[first:start, start:end].T, errors[first:start])
            square = ratio[start:end, start:end]
            block = solving.Block(values[here], columns[here], square, judged[:, start:end])
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
