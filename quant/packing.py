"""Codes <-> int32 words, in the bit order of GPTQ files.

Codes are packed along the first dimension, lowest bits first. With 4 bits, word r of a column holds
codes 8r..8r+7:

    bit   31..28  27..24  ...   7..4    3..0
    code   8r+7    8r+6   ...   8r+1     8r

2 and 8 bits are the same with 16 and 4 codes a word. With 3 bits, 32 codes are one run of 96 bits
in 3 words, and codes 10 and 21 lie across two words. All widths are thus one rule: code i occupies
bits i*b .. i*b+b-1 of the run. As words are stored lowest byte first, the rule holds for bytes too:
8 codes fill b bytes. That is how it is computed, with every row of codes side by side in memory and
a few rows at a time, which stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK, _LARGE_CHUNK = 64, 4096  # rows at a time: on a CPU, and elsewhere


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
    codes = torch.empty(words.shape[1], count, dtype=torch.uint8, device=words.device)
    step = _CHUNK if words.is_cpu else _LARGE_CHUNK
    for part, into in zip(words.split(step, 1), codes.split(step), strict=True):
        data = part.T.reshape(-1).view(torch.uint8)
        flat = _spread_3(data) if bits == 3 else _spread(data, bits)
        into.copy_(flat.view(into.shape))
    return codes.T


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 codes -> (N, K * bits / 32) int32 words; raises as `pack` does."""
    count = codes.shape[1]
    if count % 32:
        raise ValueError(f"cannot pack {count} codes: the GPTQ format needs a multiple of 32")
    words = torch.empty(len(codes), count * bits // 32, dtype=torch.int32, device=codes.device)
    step = _CHUNK if codes.is_cpu else _LARGE_CHUNK
    for part, into in zip(codes.split(step), words.split(step), strict=True):
        flat = part.reshape(-1)
        data = _squeeze_3(flat) if bits == 3 else _squeeze(flat, bits)
        into.copy_(data.view(torch.int32).view(into.shape))
    return words


def _spread(data: Tensor, bits: int) -> Tensor:
    """Codes of 2, 4 or 8 bits from bytes: these are halved until each holds one code. An int16
    is two bytes, lowest first, and takes both halves of one.
    """
    half = 4
    while half >= bits:
        wide = data.to(torch.int16)
        wide = (wide | wide << (8 - half)).bitwise_and_(0x0101 * (2**half - 1))
        data, half = wide.view(torch.uint8), half // 2
    return data


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes of 2, 4 or 8 bits: the inverse of `_spread`."""
    while bits < 8:
        wide = codes.view(torch.int16)
        codes, bits = (wide | wide >> (8 - bits)).to(torch.uint8), 2 * bits
    return codes


def _spread_3(data: Tensor) -> Tensor:
    """Codes of 3 bits from bytes: 8 from each run of 3."""
    runs = data.view(-1, 3)
    codes = torch.empty(len(runs), 8, dtype=torch.uint8, device=data.device)
    for i in range(8):
        byte, shift = divmod(3 * i, 8)
        value = runs[:, byte] >> shift
        if shift > 5:
            value |= runs[:, byte + 1] << (8 - shift)
        torch.bitwise_and(value, 7, out=codes[:, i])
    return codes.view(-1)


def _squeeze_3(codes: Tensor) -> Tensor:
    """Bytes of codes of 3 bits: the inverse of `_spread_3`."""
    runs = codes.view(-1, 8)
    data = torch.zeros(len(runs), 3, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(3 * i, 8)
        data[:, byte] |= runs[:, i] << shift
        if shift > 5:
            data[:, byte + 1] |= runs[:, i] >> (8 - shift)
    return data.view(-1)
