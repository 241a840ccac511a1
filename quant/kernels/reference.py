"""The reference backend, plain torch: dequantize a block of columns, multiply, next block.

    y = x W^T,  W[n, k] = scale[n, g(k)] * (code[n, k] - zero[n, g(k)])

Weights stay packed as in the file (int32 words along K); only one block of output columns is in
floating point at a time. It runs on any device torch knows, and is what every faster backend is
compared with.

Letters: M rows of x, K in_features, N out_features, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.packing import pack as pack_words
from quant.packing import unpack

# Elements of W that are dequantized at a time: 16 MB in float32 on the CPU, elsewhere 256 MB.
_BLOCK, _LARGE_BLOCK = 4 << 20, 64 << 20


def is_available(device: torch.device) -> bool:
    """True: torch's own operators run everywhere."""
    return True


def pack(qt: QuantizedTensor) -> dict[str, Tensor]:
    """Packed tensors of one matrix.

    Returns:
        words: int32 (K * bits / 32, N), codes along K, lowest bits first.
        scales: float16 (G, N).
        zeros: uint8 (G, N).
        group_index: int64 (K,), the group of each input channel.
        bits: int64 scalar.
    """
    groups = qt.grid.scales.shape[1]
    group_index = qt.group_index
    if group_index is None:
        group_index = torch.arange(qt.in_features) // (qt.in_features // groups)
    return {
        "words": pack_words(qt.codes.T.contiguous(), qt.bits),
        "scales": qt.grid.scales.T.to(torch.float16).contiguous(),
        "zeros": qt.grid.zeros.T.contiguous(),
        "group_index": group_index.long(),
        "bits": torch.tensor(qt.bits),
    }


def matmul(x: Tensor, packed: dict[str, Tensor], precision: str = "exact") -> Tensor:
    """x (..., K) in any float dtype -> (..., N) in the same dtype, in which all sums are made;
    every precision is exact here.
    """
    words, group_index, bits = packed["words"], packed["group_index"], int(packed["bits"])
    in_features, out_features = len(group_index), words.shape[1]
    step = max(1, (_BLOCK if words.is_cpu else _LARGE_BLOCK) // in_features)
    y = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, step):
        end = min(start + step, out_features)
        codes = unpack(words[:, start:end], bits, in_features).T  # (block, K), side by side
        scales = packed["scales"][:, start:end].T.float()[:, group_index]
        zeros = packed["zeros"][:, start:end].T.float()[:, group_index]
        weight = codes.float().sub_(zeros).mul_(scales)
        y[..., start:end] = F.linear(x, weight.to(x.dtype))
    return y
