"""The native search for the scales of least weighted error (search.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quant.native import library

LANES = 16  # SEARCH_LANES of search.h: groups must be a multiple of it


class _Search(ctypes.Structure):
    """`kern_search` of kern.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "importance", "coarse", "fine")),
        *((name, ctypes.c_void_p) for name in ("scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width")),
        *((name, ctypes.c_int64) for name in ("coarse_count", "fine_count")),
        ("shift", ctypes.c_int32),
        ("max_code", ctypes.c_float),
    ]


def can_search(weight: Tensor, width: int) -> bool:
    """Whether the library can search for groups of this width."""
    fits = weight.dtype is torch.float32 and weight.is_cpu and width % LANES == 0
    return fits and library() is not None


def search(
    weight: Tensor,
    importance: Tensor,
    start: tuple[Tensor, Tensor],
    fractions: tuple[list[float], list[float]],
    limits: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The best scales and zeros; all matrices float32 on the CPU.

    Args:
        weight: (out, in).
        importance: (groups, width).
        start: scales and zeros (out, groups) that the search starts from, and may return.
        fractions: of the scale: coarse, and fine around the best coarse one.
        limits: how far zeros may move, and the largest code.

    Returns:
        Scales with float16 values, and zeros, (out, groups) float32.
    """
    weight, importance = weight.contiguous(), importance.contiguous()
    scales, zeros = (t.to(torch.float32, copy=True).contiguous() for t in start)
    coarse, fine = (torch.tensor(part, dtype=torch.float32) for part in fractions)
    tensors = weight, importance, coarse, fine, scales, zeros
    pointers = (t.data_ptr() for t in tensors)
    sizes = *weight.shape, importance.shape[1], len(coarse), len(fine)
    library().kern_fit_scales(  # type: ignore[union-attr]
        ctypes.byref(_Search(*pointers, *sizes, *limits))
    )
    return scales, zeros
