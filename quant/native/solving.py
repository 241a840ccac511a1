"""The native column loop of GPTQ: one block of columns of all rows (solve.h)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.native import library

MOST_COLUMNS = 256  # SOLVE_MOST_COLUMNS of kern.h


@dataclass(frozen=True)
class Grids:
    """Scales and zeros (groups, rows) float32, the group of each column, the largest code."""

    scales: Tensor
    zeros: Tensor
    groups: Tensor
    max_code: int

    def of(self, columns: slice) -> Grids:
        """The same for some of the columns."""
        return replace(self, groups=self.groups[columns])


@dataclass(frozen=True)
class Block:
    """Some columns of a weight, (columns, rows).

    Attributes:
        values, original: what is rounded, and what errors are measured from.
        ratio: (columns, columns), R_kj / R_jj.
        judged: (2, columns), the factors s and d of the loss s (v - q)^2 - d (w - q)^2.
    """

    values: Tensor
    original: Tensor
    ratio: Tensor
    judged: Tensor


class _Block(ctypes.Structure):
    """`kern_block` of kern.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "original", "ratio", "judged")),
        *((name, ctypes.c_void_p) for name in ("scales", "zeros", "groups")),
        *((name, ctypes.c_void_p) for name in ("codes", "errors", "losses")),
        *((name, ctypes.c_int64) for name in ("columns", "rows")),
        ("max_code", ctypes.c_float),
    ]


def can_round(block: Block) -> bool:
    """Whether the library can take a block: float32 on the CPU, not too wide."""
    fits = _is_plain(block.values) and len(block.values) <= MOST_COLUMNS
    return fits and library() is not None


def _is_plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_cpu


def round_block(block: Block, grids: Grids, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn.

    Args:
        block: all its matrices float32 on the CPU, at most MOST_COLUMNS columns.
        errors: (columns, rows) float32, contiguous, filled with w - q.

    Returns:
        Codes (columns, rows) uint8, and the loss of each row, float32. A row's result does not
        depend on the other rows, nor on the number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    columns, rows = errors.shape
    groups = grids.groups.contiguous()
    _check(block, grids, errors)
    values, original, ratio, judged, scales, zeros = (
        t.contiguous()
        for t in (block.values, block.original, block.ratio.T, block.judged)
        + (grids.scales, grids.zeros)
    )
    codes, losses = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(rows)
    tensors = values, original, ratio, judged, scales, zeros, groups, codes, errors, losses
    call = _Block(*(t.data_ptr() for t in tensors), columns, rows, grids.max_code)
    library().kern_round_block(ctypes.byref(call))  # type: ignore[union-attr]
    return codes, losses


def _check(block: Block, grids: Grids, errors: Tensor) -> None:
    """Refuse what the library would misread."""
    columns, rows = errors.shape
    expected = {
        "values": (block.values, (columns, rows)),
        "original": (block.original, (columns, rows)),
        "ratio": (block.ratio, (columns, columns)),
        "judged": (block.judged, (2, columns)),
        "scales": (grids.scales, (len(grids.scales), rows)),
        "zeros": (grids.zeros, (len(grids.scales), rows)),
    }
    for name, (t, shape) in {**expected, "errors": (errors, (columns, rows))}.items():
        if t.shape != shape or not _is_plain(t):
            found = f"{tuple(t.shape)} {t.dtype} on {t.device}"
            raise ValueError(f"{name} {found}: expected {shape} in float32 on the CPU")
    if columns > MOST_COLUMNS or grids.groups.shape != (columns,) or not errors.is_contiguous():
        raise ValueError(
            f"a block of {columns} columns with {len(grids.groups)} groups: expected one group "
            f"for each of at most {MOST_COLUMNS} columns, and contiguous errors"
        )
