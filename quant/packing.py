"""Codes <-> int32 words, in the bit order of GPTQ files.

Codes are packed along the first dimension, lowest bits first. With 4 bits, word r of a column holds
codes 8r..8r+7:

    bit   31..28  27..24  ...   7..4    3..0
    code   8r+7    8r+6   ...   8r+1     8r

2 and 8 bits are the same with 16 and 4 codes a word. With 3 bits, 32 codes are one run of 96 bits
in 3 words, and codes 10 and 21 lie across two words. All widths are thus one rule: code i occupies
bits i*b .. i*b+b-1 of the run. As words are stored lowest byte first, the rule holds for bytes too:
8 codes fill b bytes. That is how it is computed, with every row of codes side by side in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """(K, N) uint8 codes -> (K * bits / 32, N) int32 words.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    return pack_rows(codes.T, bits).T.contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(count * bits / 32, N) int32 words -> (count, N) uint8 codes, side by side along `count`.

    Raises:
        ValueError: the number of words is not that of `count` codes, a multiple of 32.
    """
    if words.shape[0] * 32 != count * bits or count % 32 or words.dtype != torch.int32:
        raise ValueError(
            f"{words.shape[0]} {words.dtype} words do not hold {count} codes of {bits} bits"
        )
    rows = words.T.contiguous().view(torch.uint8)
    data = rows.reshape(-1, count // 8, bits)  # (N, runs, bytes)
    codes = torch.empty(len(data), count // 8, 8, dtype=torch.uint8, device=words.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = data[..., byte] >> shift
        if shift + bits > 8:
            value |= data[..., byte + 1] << (8 - shift)
        torch.bitwise_and(value, 2**bits - 1, out=codes[..., i])
    return codes.reshape(len(data), count).T


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 codes -> (N, K * bits / 32) int32 words; raises as `pack` does."""
    count = codes.shape[1]
    if count % 32:
        raise ValueError(f"cannot pack {count} codes: the GPTQ format needs a multiple of 32")
    runs = codes.contiguous().reshape(-1, count // 8, 8)  # (N, runs, 8 codes)
    data = torch.zeros(len(runs), count // 8, bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        data[..., byte] |= runs[..., i] << shift
        if shift + bits > 8:
            data[..., byte + 1] |= runs[..., i] >> (8 - shift)
    return data.reshape(len(runs), -1).view(torch.int32)
