"""Our CPU kernel, in its three precisions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.kernels import PRECISIONS, cpu

MODES = PRECISIONS


def build(
    mode: str, qt: QuantizedTensor, copies: int
) -> tuple[list[Callable[[Tensor], object]], int]:
    if not cpu.is_available(torch.device("cpu")):
        raise ImportError("the native library is not built")
    packed = cpu.pack(qt)
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    all_packed = [packed, *(_copy(packed) for _ in range(copies - 1))]
    return [partial(cpu.matmul, packed=p, precision=mode) for p in all_packed], size


def _copy(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """In memory of the kind that `pack` takes."""
    return {name: cpu.in_large_pages(tensor.clone()) for name, tensor in packed.items()}
