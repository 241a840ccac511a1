"""A packed matrix as the library sees it: addresses and sizes, checked once.

The library trusts what it is given; that it never reads past a tensor is decided here.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from quant.native import TILE


class Weight(ctypes.Structure):
    """`kern_weight` of kern.h."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("one_zero", ctypes.c_int32),
    ]


# The bytes of a `kern_call`: addresses of weight, x and gather, elements from a row of x to the
# next, dtype, address of y, m and precision. Bytes are what ctypes passes with the least work: it
# looks at one argument, not at eight.
pack_call = struct.Struct("3P2qP2q").pack
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `enum dtype` of kern.h


def view(
    codes: Tensor, scales: Tensor, zeros: Tensor, extent: Tensor, gather: Tensor | None = None
) -> Weight:
    """The library's view of a packed matrix, valid while its tensors are.

    Raises:
        ValueError: they do not belong together.
    """
    n, k = extent.shape[0], extent.shape[1]
    tiles, groups, padded = scales.shape[0], scales.shape[1], k if gather is None else len(gather)
    bits = codes.numel() * 8 // max(1, tiles * TILE * padded)
    one_zero = zeros.numel() == 1
    fit = (
        bits in (4, 8)
        and codes.numel() * 8 == tiles * TILE * padded * bits
        and padded % (32 * groups) == 0
        and (tiles - 1) * TILE < n <= tiles * TILE
        and (one_zero or zeros.shape == scales.shape)
        and (codes.dtype, scales.dtype, zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
        and all(t.is_contiguous() and t.is_cpu for t in (codes, scales, zeros))
        and (gather is None or _are_columns(gather, k))
    )
    if not fit:
        raise ValueError(
            f"packed tensors do not belong together: codes {tuple(codes.shape)}, scales "
            f"{tuple(scales.shape)}, zeros {tuple(zeros.shape)} for {n} outputs, {padded} inputs"
        )
    pointers = codes.data_ptr(), scales.data_ptr(), zeros.data_ptr()
    return Weight(*pointers, n, padded, padded // groups, bits, one_zero)


def _are_columns(gather: Tensor, k: int) -> bool:
    """Whether the library may read a row of k inputs at these places, -1 being none."""
    plain = gather.dtype is torch.int32 and gather.is_contiguous() and gather.is_cpu
    return plain and (not len(gather) or -1 <= int(gather.min()) <= int(gather.max()) < k)
