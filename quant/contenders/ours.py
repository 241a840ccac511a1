"""Our CPU kernel, in its three precisions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.kernels import PRECISIONS, cpu
from quant.native import library
from quant.native.weight import DTYPES, pack_call, view

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


def bare_call(mode: str, packed: dict[str, Tensor], x: Tensor) -> Callable[[], int]:
    """The compiled function alone, its arguments ready."""
    kern, weight, y = library(), view(**packed), torch.empty(len(x), packed["extent"].shape[0])
    rows = x.data_ptr(), 0, x.shape[1], DTYPES[x.dtype]
    call = pack_call(ctypes.addressof(weight), *rows, y.data_ptr(), len(x), PRECISIONS.index(mode))
    return lambda kept=(weight, x, y): kern.kern_matmul(call)  # type: ignore[misc, union-attr]


def _copy(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """In memory of the kind that `pack` takes."""
    return {name: cpu.in_large_pages(tensor.clone()) for name, tensor in packed.items()}
