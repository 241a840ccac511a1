"""Codes <-> int32 words, in the bit order of GPTQ files.

Codes are packed along the first dimension, lowest bits first. With 4 bits, word r of a column holds
codes 8r..8r+7:

    bit   31..28  27..24  ...   7..4    3..0
    code   8r+7    8r+6   ...   8r+1     8r

2 and 8 bits are the same with 16 and 4 codes a word. With 3 bits, 32 codes are one run of 96 bits
in 3 words, and codes 10 and 21 lie across two words. All widths are thus one rule: code i occupies
bits i*b .. i*b+b-1 of the run.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """(K, N) uint8 codes -> (K * bits / 32, N) int32 words.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    count = codes.shape[0]
    if count % 32:
        raise ValueError(f"cannot pack {count} codes: the GPTQ format needs a multiple of 32")
    runs = codes.reshape(count // 32, 32, -1).to(torch.int64)  # 32 codes fill `bits` words
    words = torch.zeros(count // 32, bits, runs.shape[-1], dtype=torch.int64)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= (runs[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= runs[:, i] >> (32 - shift)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).reshape(count * bits // 32, -1)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(count * bits / 32, N) int32 words -> (count, N) uint8 codes.

    Raises:
        ValueError: the number of words is not that of `count` codes, a multiple of 32.
    """
    if words.shape[0] * 32 != count * bits or count % 32 or words.dtype != torch.int32:
        raise ValueError(
            f"{words.shape[0]} {words.dtype} words do not hold {count} codes of {bits} bits"
        )
    runs = words.reshape(count // 32, bits, -1)
    mask = 2**bits - 1
    codes = torch.empty(count // 32, 32, runs.shape[-1], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = (runs[:, word] >> shift) & mask
        if shift + bits > 32:
            low_bits = 32 - shift
            value = (value & (2**low_bits - 1)) | ((runs[:, word + 1] << low_bits) & mask)
        codes[:, i] = value
    return codes.reshape(count, -1)
