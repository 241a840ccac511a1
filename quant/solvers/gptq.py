"""GPTQ (Frantar et al., arXiv 2210.17323) with one Cholesky factor and no inverse.

Columns are rounded one after another; each rounding error is passed on to the columns still to
come, so that the layer's output changes least. With H = R R^T, R upper triangular, the column to
round is

    v_j = w_j + sum over k < j of (w_k - q_k) R_kj / R_jj ,      q_j = nearest grid value to v_j

with the original w_k, and the loss it adds is (v_j - q_j)^2 R_jj^2. This is the classical method
exactly: its upper factor of the inverse Hessian is U = R^-1.

Worked example: W = [0.4, 0.4], H = [[2, 1], [1, 1]], scale 1. Then R = [[1, 1], [0, 1]]. Column 0:
v = 0.4, q = 0, error 0.4. Column 1: v = 0.4 + 0.4 * 1 / 1 = 0.8, q = 1. Rounding gives [0, 0] with
loss 0.8, GPTQ [0, 1] with 0.2.

Group grids are fitted to the original weights beforehand, so columns may be taken in the order of
falling diag(H) (act-order) and the codes are put back in place: no runtime ever sees the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.grid import Grid, QuantizedTensor, fit_minmax
from quant.solvers.columns import round_block
from quant.solvers.loss import Solution
from quant.solvers.refit import refit
from quant.solvers.scale_search import fit_weighted
from quant.solvers.sweeps import sweep

_ROWS = 256  # of a matrix that are permuted at a time
_SWAPPED = 1 << 20  # numbers that are reversed at a time

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
        target: how far to aim at the float model's outputs rather than at the weights, 0 to 1; 0
            is off. Used by the pipeline, see quant.solvers.target.
        residual: the same of o_proj and down_proj and the float model's residual stream.
        sweeps: passes of coordinate descent over the finished codes, see quant.solvers.sweeps.
        refits: of these, how many begin with scales refit to the codes, see quant.solvers.refit.
    """

    act_order: bool = True
    damp: float = 0.01
    block_size: int = 128
    scales: str = "weighted"
    target: float = 0.0
    residual: float = 0.0
    sweeps: int = 0
    refits: int = 0

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ValueError(
                f"scales {self.scales!r} is unknown; choose one of {', '.join(SCALES)}"
            )
        for name in ("target", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is out of range; 0 <= {name} <= 1")
        if not 0 <= self.refits <= self.sweeps:
            raise ValueError(
                f"refits {self.refits} and sweeps {self.sweeps} do not fit; 0 <= refits <= sweeps"
            )
        if not 0 <= self.damp < 1:
            raise ValueError(
                f"damp {self.damp} is out of range; it is a fraction of the mean diagonal, 0 <= "
                "damp < 1"
            )

    @property
    def needs_float(self) -> bool:
        """Whether the float model has to run beside the quantized one."""
        return self.target > 0 or self.residual > 0

    @property
    def extra_products(self) -> int:
        """Products with H that sweeps and refits make beyond plain GPTQ, for forecasts of time."""
        return 2 * self.sweeps + 5 * self.refits


EFFORTS = {"fast": GPTQOptions(), "balanced": GPTQOptions(target=0.5)}


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
    if not torch.isfinite(weight).all() or not torch.isfinite(hessian).all():
        raise ValueError("GPTQ: the weight or the Hessian is not finite")
    order = torch.arange(len(hessian), device=hessian.device)
    if options.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    R, damp, notes = factor(hessian, order, options.damp)
    grid = _fit(weight, hessian, config, options)
    codes = _round_columns(
        weight, R, grid, order, config.width(weight.shape[1]), options.block_size
    )
    tensor = _improve(weight, hessian, QuantizedTensor(codes, grid), options)
    return Solution(tensor, damp, notes)


def _improve(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor, options: GPTQOptions
) -> QuantizedTensor:
    """The codes and scales after the sweeps that `options` ask for."""
    for index in range(options.sweeps):
        if index < options.refits:
            tensor = refit(weight, hessian, tensor)
        tensor = sweep(weight, hessian, tensor, options.block_size)
    return tensor


def _fit(weight: Tensor, hessian: Tensor, config: QuantConfig, options: GPTQOptions) -> Grid:
    """The grids of all groups, as `options.scales` says."""
    if options.scales == "minmax":
        return fit_minmax(weight, config)
    return fit_weighted(weight, hessian.diagonal(), config, signed=options.scales == "signed")


def factor(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float, tuple[str, ...]]:
    """R upper triangular with R R^T = H + damp * mean(diag H) * I, H in the given order.

    An input that is never active gets the mean diagonal: it is rounded and spreads nothing. If
    float32 finds H not positive definite, float64 is tried, then ten times the damping, and so on.
    The Cholesky factor L of the matrix with its rows and columns reversed is R reversed.

    Returns:
        R in H's dtype, the damping used, and a note for every departure.
    """
    notes: tuple[str, ...] = ()
    diagonal = hessian.diagonal()[order]
    dead = diagonal <= 0
    diagonal = torch.where(dead, diagonal.mean().clamp(min=1e-12), diagonal)
    if dead.any():
        notes += (f"{int(dead.sum())} of {len(dead)} input channels are never active",)
    mean = diagonal.double().mean()
    backwards = order.flip(0)
    while True:
        for dtype in (hessian.dtype, torch.float64):
            flipped = _gather(hessian, backwards, dtype)
            damped = diagonal.flip(0).to(dtype) + (damp * mean).to(dtype)
            flipped.diagonal().copy_(damped)
            # Symmetric, so its transpose is the same matrix, in the layout LAPACK works in place.
            info = torch.empty((), dtype=torch.int32, device=hessian.device)
            torch.linalg.cholesky_ex(flipped.T, upper=True, out=(flipped.T, info))
            if not info.item() and torch.isfinite(flipped.diagonal()).all():
                _reverse_(flipped.view(-1))
                return flipped.to(hessian.dtype), damp, notes
            if dtype != torch.float64:
                notes += (f"Cholesky failed in float32 at damping {damp:g}; retried in float64",)
        damp = max(10 * damp, 1e-4)
        notes += (f"Cholesky failed in float64; damping raised to {damp:g}",)


def _gather(hessian: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and columns in the given order, with room for some rows only beside the result."""
    result = torch.empty(hessian.shape, dtype=dtype, device=hessian.device)
    for rows, into in zip(order.split(_ROWS), result.split(_ROWS), strict=True):
        into.copy_(hessian[rows].index_select(1, order))
    return result


def _reverse_(values: Tensor) -> None:
    """Reverse a vector in place; a matrix read as one is flipped along both axes."""
    half = len(values) // 2
    for start in range(0, half, _SWAPPED):
        end = min(start + _SWAPPED, half)
        front, back = values[start:end], values[len(values) - end : len(values) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _round_columns(
    weight: Tensor, R: Tensor, grid: Grid, order: Tensor, width: int, block_size: int
) -> Tensor:
    """The column loop, left-looking: a block first receives all earlier errors as one GEMM.

    Works on transposed tensors, (in, out), so that a column of W is a contiguous row.
    """
    columns = weight.T[order].contiguous()  # (in, out)
    groups = order // width
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.float().contiguous()  # (groups, out)
    ratio = R.div_(R.diagonal().clone())  # R_kj / R_jj
    errors = torch.empty_like(columns)  # w_k - q_k
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(columns), block_size):
        end = min(start + block_size, len(columns))
        values = columns[start:end]
        if start:
            values = torch.addmm(values, ratio[:start, start:end].T, errors[:start])
        of_block = groups[start:end]
        codes[start:end], errors[start:end] = round_block(
            values,
            columns[start:end],
            ratio[start:end, start:end],
            scales[of_block],
            zeros[of_block],
            grid.max_code,
        )
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()
