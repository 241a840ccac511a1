"""The scales that lose least for given codes: least squares over a row's groups.

With c = code - zero and one scale a group, a row's loss (w - q) H (w - q)^T is quadratic in its
scales. Changing them by d, it changes by d A d - 2 b d with

    A_gh = c_g^T H_gh c_h ,    b_g = c_g^T (H (w - q))_g ,

and is least where A d = b. As d is small, float32 products suffice. The new scales are rounded to
float16, and a row keeps its old ones unless the change is below zero for them as rounded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.grid import LARGEST_SCALE, SMALLEST_SCALE, QuantizedTensor
from quant.native.products import product, product_sums

_ROWS, _NUMBERS = 512, 1 << 23  # at a time: what a group makes of rows stays in the cache; in A
_MANY_ROWS, _MANY_NUMBERS = 4096, 1 << 25  # the same where that is no CPU's cache
_RIDGE = 1e-6  # of the mean diagonal of A: codes of two groups may be all but dependent


def refit(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Refit all scales to the codes.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32, symmetric.
        tensor: codes on their grid, in groups of consecutive columns.

    Returns:
        The same codes with float16-exact scales of the same signs; what that adds to the loss of
        each row, (out,) float64, never above 0; and by how much the energy w H w^T of each row was
        more than its loss, (out,) float64: q H q^T + 2 (w - q) H q^T = s A s + 2 b s.
    """
    most, numbers = (_ROWS, _NUMBERS) if weight.is_cpu else (_MANY_ROWS, _MANY_NUMBERS)
    step = min(most, max(16, numbers // tensor.grid.scales.shape[1] ** 2))
    parts = (
        _refit_rows(weight[rows], hessian, tensor.rows(rows))
        for rows in (slice(start, start + step) for start in range(0, len(weight), step))
    )
    scales, added, kept = (torch.cat(column) for column in zip(*parts, strict=True))
    return replace(tensor, grid=replace(tensor.grid, scales=scales)), added, kept


def _refit_rows(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The scales (rows, groups) of some rows, what they add to the losses, and the energies."""
    old = tensor.grid.scales
    A, b = normal_equations(weight, hessian, tensor)
    kept = _form(A, 2 * b, old.double())
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    diagonal.add_(ridge)  # also what a group of zeros has: it keeps its scale
    lower, failed = torch.linalg.cholesky_ex(A)
    change = torch.cholesky_solve(b[..., None], lower)[..., 0].to(old.dtype)
    sizes = (old + change) * old.sign()
    fitted = sizes.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().to(old.dtype).copysign(old)
    usable = (failed == 0)[:, None] & torch.isfinite(fitted) & (sizes > 0)
    fitted = torch.where(usable, fitted, old)
    d = fitted.double() - old.double()  # exact
    diagonal.sub_(ridge)
    added = _form(A, -2 * b, d)
    return torch.where(added[:, None] < 0, fitted, old), added.clamp(max=0), kept


def _form(A: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """x A x + slope x, row by row."""
    return ((A @ x[..., None])[..., 0] + slope).mul_(x).sum(1)


def normal_equations(
    weight: Tensor, hessian: Tensor, tensor: QuantizedTensor
) -> tuple[Tensor, Tensor]:
    """A (rows, groups, groups) and b (rows, groups), float64, of rows (rows, in) of a weight."""
    rows, groups = tensor.grid.scales.shape
    shape = (groups, -1, rows)  # of the transposes below, group by group
    zeros = tensor.grid.zeros.T[:, None].to(weight.dtype)
    steps = tensor.codes.T.to(weight.dtype).contiguous().view(shape).sub_(zeros)
    errors = (steps * tensor.grid.scales.T[:, None]).view(-1, rows).sub_(weight.T).neg_()
    pulls = product(hessian.T, errors).view(shape)
    b = pulls.mul_(steps).sum(1).T.double()
    A = torch.empty(groups, groups, rows, dtype=torch.float64, device=weight.device)
    width = steps.shape[1]
    for group in range(groups):  # the lower triangle, and its mirror
        end = (group + 1) * width
        columns = hessian[end - width : end, :end].T
        A[group, : group + 1] = product_sums(
            columns, steps[group], steps.view(-1, rows)[:end], width
        )
        A[:group, group] = A[group, :group]
    return A.permute(2, 0, 1).contiguous(), b
