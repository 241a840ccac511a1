"""Values of GGUF tensors, exactly.

A row is a run of blocks; of 32 values in the types that are read here:

    F32, F16, BF16    plain
    Q8_0  34 bytes    float16 d; 32 int8 q                       d * q
    Q4_0  18 bytes    float16 d; 16 bytes of two codes           d * (q - 8)
    Q4_1  20 bytes    float16 d, m; 16 bytes of two codes        d * q + m

Byte j of 16 holds code j in its low and code j + 16 in its high half. d * q has at most 19 bits and
is exact in float32. Other types are read by the `gguf` package where it is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.checkpoint import StoredType

_PLAIN = {0: (torch.float32, 4), 1: (torch.float16, 2), 30: (torch.bfloat16, 2)}
_BLOCK_BYTES = {2: 18, 3: 20, 8: 34}
_NAMES = {
    0: "F32", 1: "F16", 30: "BF16",
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def row_bytes(kind: int, width: int) -> int:
    """Bytes of a row of `width` values.

    Raises:
        ValueError: the type is unknown, or its blocks do not divide the row.
    """
    if kind in _PLAIN:
        return width * _PLAIN[kind][1]
    block, size = (32, _BLOCK_BYTES[kind]) if kind in _BLOCK_BYTES else _foreign_size(kind)
    if width % block:
        raise ValueError(f"rows of {width} values do not consist of blocks of {block}")
    return width // block * size


def stored_type(kind: int, width: int) -> StoredType:
    """The name of a type, and its bits a value in rows of `width`."""
    return StoredType(_NAMES.get(kind, f"type {kind}"), row_bytes(kind, width) * 8 / width)


def values(kind: int, raw: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """The tensor in bytes `raw`: plain types as they are, blocks as float32."""
    if kind in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[kind][0]).reshape(shape)
    if kind not in _BLOCK_BYTES:
        package = _package(kind)
        rows = raw.reshape(*shape[:-1], -1)
        dense = package.quants.dequantize(rows, package.GGMLQuantizationType(kind))
        return torch.from_numpy(np.ascontiguousarray(dense, np.float32)).reshape(shape)
    blocks = torch.from_numpy(raw).view(-1, _BLOCK_BYTES[kind])
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == 8:
        return (blocks[:, 2:].view(torch.int8).float() * d).reshape(shape)
    packed = blocks[:, 2 if kind == 2 else 4 :]
    codes = torch.cat((packed & 15, packed >> 4), 1).float()
    if kind == 2:
        return (codes.sub_(8) * d).reshape(shape)
    m = blocks[:, 2:4].contiguous().view(torch.float16).float()
    return (codes * d).add_(m).reshape(shape)


def _foreign_size(kind: int) -> tuple[int, int]:
    """(values, bytes) of a block of another type."""
    package = _package(kind)
    return package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]


def _package(kind: int) -> Any:
    """The gguf package, if it knows the type."""
    try:
        package: Any = import_module("gguf")
    except ImportError:
        raise ValueError(
            f"type {_NAMES.get(kind, kind)} is read through the gguf package; run: "
            "pip install llama-gptq[gguf]"
        ) from None
    known = {int(k) for k in package.GGMLQuantizationType}
    traits = getattr(package.quants, "_type_traits", {})
    if kind not in known or package.GGMLQuantizationType(kind) not in traits:
        raise ValueError(f"type {_NAMES.get(kind, kind)} is not supported")
    return package
