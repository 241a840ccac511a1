"""torch's int4 kernel, `_weight_int4pack_mm_for_cpu`; only its bfloat16 path is vectorized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant.grid import QuantizedTensor

MODES = ("bfloat16",)


def build(
    mode: str, qt: QuantizedTensor, copies: int
) -> tuple[list[Callable[[Tensor], object]], int]:
    groups = qt.grid.scales.shape[1]
    width = qt.in_features // groups
    codes = torch._convert_weight_to_int4pack_for_cpu(qt.codes.int(), 2)
    offsets = (8.0 - qt.grid.zeros.float()) * qt.grid.scales
    scales = torch.stack((qt.grid.scales, offsets), -1).transpose(0, 1).contiguous().bfloat16()
    weights = [(codes.clone(), scales.clone()) for _ in range(copies)]
    size = codes.numel() * codes.element_size() + scales.numel() * 2
    return [partial(_multiply, c, width, s) for c, s in weights], size


def _multiply(codes: Tensor, width: int, scales: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), codes, width, scales)
