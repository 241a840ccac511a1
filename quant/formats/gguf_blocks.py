"""Blocks of 32 weights as ggml lays them out, made of codes without rounding them again.

    Q4_0  18 bytes  float16 d; byte j holds code j and, above it, code j + 16;  w = d (q - 8)
    Q4_1  20 bytes  float16 d, float16 m; the same bytes;                       w = d q + m
    Q8_0  34 bytes  float16 d; 32 int8;                                         w = d q

A symmetric grid of 4 bits (zero 8) is exactly Q4_0 and one of 8 bits (zero 128) exactly Q8_0; the
scale of a group stands in each of its blocks. A 4-bit grid with other zeros is Q4_1 with m = -scale
x zero, which is exact where that product is a float16 number and else off by at most half a unit in
its last place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.grid import QuantizedTensor

BLOCK = 32
F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8  # ggml's numbers of the types


@dataclass(frozen=True)
class Blocks:
    """One tensor as ggml stores it.

    Attributes:
        kind: number of the type.
        data: bytes, any shape.
        error: largest distance of a weight from the grid's, in scales; 0 where exact.
    """

    kind: int
    data: Tensor
    error: float = 0.0


def of_grid(name: str, qt: QuantizedTensor) -> Blocks:
    """The block type that holds the grid of a linear.

    Raises:
        ValueError: there is none, or groups and blocks do not line up.
    """
    width = qt.in_features // qt.grid.scales.shape[1]
    if qt.group_index is not None:
        raise ValueError(
            f"{name}: its groups are not consecutive inputs (desc_act), which GGUF cannot store; "
            "export to gptq_v2 or float16"
        )
    if width % BLOCK:
        raise ValueError(f"{name}: groups of {width} inputs are not whole blocks of {BLOCK}")
    middle = bool((qt.grid.zeros == 2 ** (qt.bits - 1)).all())
    if qt.bits == 8 and middle:
        return Blocks(Q8_0, _join(_scales(qt), (qt.codes ^ 128).reshape(-1, BLOCK)))
    if qt.bits == 4 and middle:
        return Blocks(Q4_0, _join(_scales(qt), _nibbles(qt.codes)))
    if qt.bits == 4:
        return _q4_1(name, qt)
    kind = "symmetric" if middle else "asymmetric"
    raise ValueError(
        f"{name}: GGUF has no block for a grid of {qt.bits} bits, {kind}; it holds 4 bits, and 8 "
        "bits symmetric; export to float16, or to gguf from there"
    )


def q8_0(weight: Tensor) -> Blocks:
    """Floats (out, in) rounded to Q8_0 as ggml does: d = absmax / 127, halves away from zero."""
    groups = weight.float().reshape(-1, BLOCK)
    scales = groups.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    scaled = groups * inverse
    codes = (scaled.abs() + 0.5).floor().copysign(scaled).to(torch.int8)
    return Blocks(Q8_0, _join(scales.half(), codes))


def _q4_1(name: str, qt: QuantizedTensor) -> Blocks:
    exact = -qt.grid.scales * qt.grid.zeros  # at most 11 + 8 bits: exact in float32
    minimum = exact.half()
    if not torch.isfinite(minimum).all():
        raise ValueError(f"{name}: scale x zero is too large for float16; export to float32")
    error = ((minimum.float() - exact).abs() / qt.grid.scales.abs().clamp(min=1e-30)).max()
    per_group = torch.stack((qt.grid.scales.half(), minimum), -1)  # (out, groups, 2)
    return Blocks(Q4_1, _join(_per_block(qt, per_group), _nibbles(qt.codes)), float(error))


def _scales(qt: QuantizedTensor) -> Tensor:
    return _per_block(qt, qt.grid.scales.half()[..., None])


def _per_block(qt: QuantizedTensor, per_group: Tensor) -> Tensor:
    """(out, groups, n) -> (blocks, n), repeated for the blocks of a group."""
    repeats = qt.in_features // BLOCK // per_group.shape[1]
    return per_group.repeat_interleave(repeats, 1).reshape(-1, per_group.shape[-1])


def _nibbles(codes: Tensor) -> Tensor:
    """(out, in) codes of 4 bits -> (blocks, 16) bytes."""
    halves = codes.reshape(-1, 2, BLOCK // 2)
    return halves[:, 0] | (halves[:, 1] << 4)


def _join(floats: Tensor, codes: Tensor) -> Tensor:
    """(blocks, n) float16 in front of (blocks, m) bytes."""
    return torch.cat((floats.contiguous().view(torch.uint8), codes.view(torch.uint8)), 1)
