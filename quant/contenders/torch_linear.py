"""The float model: torch's own linear."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.grid import QuantizedTensor

MODES = ("float32", "bfloat16")


def build(
    mode: str, qt: QuantizedTensor, copies: int
) -> tuple[list[Callable[[Tensor], object]], int]:
    dtype = getattr(torch, mode)
    weight = qt.dequantize(dtype)
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    size = weight.numel() * weight.element_size()
    return [partial(_multiply, w) for w in weights], size


def _multiply(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)
