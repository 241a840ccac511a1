"""The scales that lose least for given codes: least squares over a row's groups.

With c = code - zero and one scale a group, a row's loss (w - q) H (w - q)^T is quadratic in its
scales. Changing them by d, the normal equations are

    A d = b ,    A_gh = c_g^T H_gh c_h ,    b_g = c_g^T ((w - q) H)_g ,

and as d is small, float32 products suffice. The new scales are rounded to float16, and a row keeps
its old ones unless its exact loss falls.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.grid import LARGEST_SCALE, SMALLEST_SCALE, QuantizedTensor
from quant.solvers.loss import output_energy

_ROWS = 256  # rows at a time: (rows, groups, groups) float64 stays small
_RIDGE = 1e-6  # of the mean diagonal of A: codes of two groups may be all but dependent


def refit(weight: Tensor, hessian: Tensor, tensor: QuantizedTensor) -> QuantizedTensor:
    """Refit all scales to the codes.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32, symmetric.
        tensor: codes on their grid, in groups of consecutive columns.

    Returns:
        The same codes; float16-exact scales of the same signs, with no row's loss above what it
        was.
    """
    parts = [
        _refit_rows(weight[rows], hessian, tensor.rows(rows))
        for rows in (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS))
    ]
    return replace(tensor, grid=replace(tensor.grid, scales=torch.cat(parts)))


def _refit_rows(weight: Tensor, hessian: Tensor, tensor: QuantizedTensor) -> Tensor:
    """The scales (rows, groups) of some rows."""
    old = tensor.grid.scales
    errors = weight - tensor.dequantize(weight.dtype)
    A, b = normal_equations(errors, hessian, tensor)
    diagonal = A.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    diagonal.add_(_RIDGE * mean)  # also what a group of zeros has: it keeps its scale
    lower, failed = torch.linalg.cholesky_ex(A)
    change = torch.cholesky_solve(b[..., None], lower)[..., 0].to(old.dtype)
    sizes = (old + change) * old.sign()
    fitted = sizes.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().to(old.dtype).copysign(old)
    usable = (failed == 0)[:, None] & torch.isfinite(fitted) & (sizes > 0)
    fitted = torch.where(usable, fitted, old)
    moved = weight - replace(tensor, grid=replace(tensor.grid, scales=fitted)).dequantize()
    falls = output_energy(moved, hessian) < output_energy(errors, hessian)
    return torch.where(falls[:, None], fitted, old)


def normal_equations(
    errors: Tensor, hessian: Tensor, tensor: QuantizedTensor
) -> tuple[Tensor, Tensor]:
    """A (rows, groups, groups) and b (rows, groups), float64, for errors (rows, in) of the rows."""
    shape = (*tensor.grid.scales.shape, -1)  # (rows, groups, width)
    zeros = tensor.grid.zeros[..., None].to(errors.dtype)
    steps = tensor.codes.view(shape).to(errors.dtype) - zeros
    rows, groups, width = steps.shape
    A = torch.empty(rows, groups, groups, dtype=torch.float64, device=errors.device)
    for group in range(groups):  # the lower triangle, and its mirror
        columns = slice(group * width, (group + 1) * width)
        product = steps[:, group] @ hessian[columns, : columns.stop]  # (rows, columns so far)
        part = torch.einsum(
            "rgw,rgw->rg", product.view(rows, group + 1, width), steps[:, : group + 1]
        )
        A[:, group, : group + 1] = part
        A[:, : group + 1, group] = part
    b = ((errors @ hessian).view(shape) * steps).sum(-1, dtype=torch.float64)
    return A, b
