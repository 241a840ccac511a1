"""The Cholesky factor of the damped Hessian, in the order of the columns, within one more matrix.

GPTQ takes R upper triangular with R R^T = H. Of H with its rows and columns reversed, Cholesky
gives U upper triangular with U^T U; U^T reversed likewise is R. LAPACK factors squares on the
diagonal alone; what connects them are large products, which run at the machine's full rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quant.native.products import add_product_, product

_ROWS = 256  # of a matrix that are permuted at a time
_SWAPPED = 1 << 20  # numbers that are reversed at a time
_FACTORED = 512  # columns that LAPACK factors at a time


def factor(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float, tuple[str, ...]]:
    """R upper triangular with R R^T = H + damp * mean(diag H) * I, H in the given order.

    An input that is never active gets the mean diagonal: it is rounded and spreads nothing. If
    float32 finds H not positive definite, float64 is tried, then ten times the damping, and so on.
    With U^T U the matrix with its rows and columns reversed, R is U^T reversed likewise.

    Returns:
        R in H's dtype, the transpose of a contiguous matrix; the damping used; a note for every
        departure.
    """
    notes: tuple[str, ...] = ()
    diagonal = hessian.diagonal()[order].double()
    if dead := int((diagonal <= 0).sum()):
        notes += (f"{dead} of {len(diagonal)} channels are never active",)
    backwards = order.flip(0)
    while True:
        for dtype in (hessian.dtype, torch.float64):
            flipped = _gather(hessian, backwards, dtype)
            flipped.diagonal().copy_(damped(diagonal, damp).flip(0))
            if _cholesky_(flipped):
                _reverse_(flipped.view(-1))
                return flipped.to(hessian.dtype).T, damp, notes
            if dtype != torch.float64:
                notes += (f"Cholesky failed in float32 at damping {damp:g}; retried in float64",)
        damp = max(10 * damp, 1e-4)
        notes += (f"Cholesky failed in float64; damping raised to {damp:g}",)


def damped(diagonal: Tensor, damp: float) -> Tensor:
    """The diagonal with damping, and the mean in place of what is not positive."""
    filled = torch.where(diagonal <= 0, diagonal.mean().clamp(min=1e-12), diagonal)
    return filled + damp * filled.mean()


@contextmanager
def shrunk(hessian: Tensor, share: float) -> Iterator[None]:
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


def _gather(hessian: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and columns in the given order, the upper triangle, with room for some rows only beside
    the result.
    """
    result = torch.empty(hessian.shape, dtype=dtype, device=hessian.device)
    for start in range(0, len(order), _ROWS):
        rows = hessian[order[start : start + _ROWS]]
        result[start : start + _ROWS, start:] = rows.index_select(1, order[start:])
    return result


def _cholesky_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix A, of which the upper triangle is read, by U upper triangular with
    U^T U = A; False where it is not positive definite.
    """
    for start in range(0, len(matrix), _FACTORED):
        end = min(start + _FACTORED, len(matrix))
        panel, above = matrix[start:end, start:], matrix[:start, start:]
        add_product_(panel, above[:, : end - start].T, above, alpha=-1)
        square, failed = torch.linalg.cholesky_ex(panel[:, : end - start], upper=True)
        if failed.item() or not torch.isfinite(square.diagonal()).all():
            return False
        identity = torch.eye(end - start, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(square, identity, upper=True)
        panel[:, end - start :] = product(inverse.T, panel[:, end - start :])
        panel[:, : end - start] = square
        matrix[start:end, :start] = 0
    return True


def _reverse_(values: Tensor) -> None:
    """Reverse a vector in place; a matrix read as one is flipped along both axes."""
    half = len(values) // 2
    for start in range(0, half, _SWAPPED):
        end = min(start + _SWAPPED, half)
        front, back = values[start:end], values[len(values) - end : len(values) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
