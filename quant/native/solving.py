"""The native column loop of GPTQ: one block of columns of all rows (solve.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quant.native import library

MOST_COLUMNS = 256  # SOLVE_MOST_COLUMNS of kern.h


class _Block(ctypes.Structure):
    """`kern_block` of kern.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "original", "ratio", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("codes", "errors")),
        *((name, ctypes.c_int64) for name in ("columns", "rows")),
        ("max_code", ctypes.c_float),
    ]


def can_round(values: Tensor) -> bool:
    """Whether the library can take a block (columns, rows): float32 on the CPU, not too wide."""
    fits = values.dtype is torch.float32 and values.is_cpu and len(values) <= MOST_COLUMNS
    return fits and library() is not None


def round_block(
    values: Tensor, original: Tensor, ratio: Tensor, scales: Tensor, zeros: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn; all matrices float32 on the CPU.

    Args:
        values, original, scales, zeros: (columns, rows); what is rounded, and what errors are
            measured from.
        ratio: (columns, columns), R_kj / R_jj.
        max_code: the largest code.

    Returns:
        Codes uint8 and errors float32, (columns, rows). A row's result does not depend on the
        other rows, nor on the number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    columns, rows = values.shape
    matrices = [t.contiguous() for t in (values, original, scales, zeros)]
    if any(t.shape != values.shape or not can_round(t) for t in matrices):
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in matrices)
        raise ValueError(
            f"matrices of a block must be float32 on the CPU, of one shape, with at most "
            f"{MOST_COLUMNS} columns; found {found}"
        )
    if ratio.shape != (columns, columns) or ratio.dtype is not torch.float32:
        raise ValueError(
            f"ratio {tuple(ratio.shape)} {ratio.dtype}: expected {(columns, columns)} in float32"
        )
    by_column = ratio.T.contiguous()
    codes, errors = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
    v, w, s, z = (t.data_ptr() for t in matrices)
    outputs = codes.data_ptr(), errors.data_ptr()
    block = _Block(v, w, by_column.data_ptr(), s, z, *outputs, columns, rows, max_code)
    library().kern_round_block(ctypes.byref(block))  # type: ignore[union-attr]
    return codes, errors
