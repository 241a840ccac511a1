"""The integer precisions of the CPU kernel in numpy: the same arithmetic, written as its formula.

Every integer sum is exact in int64; the float32 steps are one product, or one fused
multiply-add, at a time, in the order that `quant/kernels/cpu.py` promises.
"""

from __future__ import annotations

import numpy as np

from quant.grid import QuantizedTensor

TOP = {"high": np.float32(32767), "fast": np.float32(127)}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """round(a * b + c) in float32: the sum is rounded to odd in float64, then to float32."""
    product, wide = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + wide
    back = total - product
    error = (product - (total - back)) + (wide - back)
    even = (total.view(np.int64) & 1) == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, nudged, total).astype(np.float32)


def block_length(precision: str, width: int) -> int:
    """Inputs that share an activation scale, in groups of `width`."""
    if precision == "fast":
        return 32
    return next(b for b in range(256, 0, -32) if width % b == 0)


def quantize(x: np.ndarray, block: int, top: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(M, K) -> integers (M, K / block, block) and scales (M, K / block)."""
    blocks = x.reshape(len(x), -1, block)
    largest = np.abs(blocks).max(-1)
    empty = largest < np.float32(2.0**-100)
    inverse = np.where(empty, np.float32(0), top / np.where(empty, np.float32(1), largest))
    integers = np.rint((blocks * inverse[..., None]).astype(np.float32)).astype(np.int64)
    return integers, np.where(empty, np.float32(0), largest / top)


def matmul(x: np.ndarray, qt: QuantizedTensor, precision: str) -> np.ndarray:
    """x (M, K) float32 -> (M, N) float32."""
    codes, grid = qt.codes.numpy().astype(np.int64), qt.grid
    scales = grid.scales.numpy().astype(np.float32)
    zeros = grid.zeros.numpy().astype(np.int64)
    groups = scales.shape[1]
    index = np.arange(x.shape[1]) // (x.shape[1] // groups)
    if qt.group_index is not None:
        index = qt.group_index.numpy()
    longest = max(np.bincount(index, minlength=groups))
    width = -(-longest // 32) * 32  # a group is padded to whole blocks of 32
    block = block_length(precision, width)
    y = np.zeros((len(x), len(codes)), np.float32)
    for g in range(groups):
        columns = np.flatnonzero(index == g)
        padding = width - len(columns)
        integers, steps = quantize(
            np.pad(x[:, columns], ((0, 0), (0, padding))), block, TOP[precision]
        )
        padded = np.pad(codes[:, columns], ((0, 0), (0, padding)))
        part, total = np.zeros_like(y), np.zeros((len(x), 1), np.float32)
        for b in range(width // block):
            step = steps[:, b : b + 1]
            dots = integers[:, b] @ padded[:, b * block : (b + 1) * block].T
            part = fma(dots.astype(np.float32), step, part)
            total = fma(integers[:, b].sum(1, keepdims=True).astype(np.float32), step, total)
        part = fma(-zeros[None, :, g].astype(np.float32), total, part)
        y = fma(part, scales[None, :, g], y)
    return y
