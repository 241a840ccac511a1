"""The grid of a quantized weight, and the one definition everything agrees on:

    weight = scale * (code - zero)

Codes and zeros are integers in 0..2^bits-1; each row has one scale and one zero per group of input
channels. Scales are rounded to float16 when the grid is fitted, before any solver looks at it, so
that the grid a solver works on is the grid on disk. Two facts of the classical min-max fit are kept
from its published form: a symmetric grid has scale 2 absmax / max_code and zero 2^(bits-1); an
asymmetric range always includes 0. Zeros stay in 1..max_code, because the older file format stores
zero - 1 and cannot hold 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.config import QuantConfig

_ROWS, _MANY_ROWS = 64, 4096  # dequantized at a time: as stay in a CPU's cache, and elsewhere
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class Grid:
    """Scales (out, groups) float32 with float16 values, zeros (out, groups) uint8."""

    scales: Tensor
    zeros: Tensor
    bits: int

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes (out, in) uint8 on a grid; group_index (in,) int32, or None for groups of consecutive
    columns.
    """

    codes: Tensor
    grid: Grid
    group_index: Tensor | None = None

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def rows(self, rows: slice | Tensor) -> QuantizedTensor:
        """The same tensor restricted to some output rows, or with its rows in another order."""
        grid = replace(self.grid, scales=self.grid.scales[rows], zeros=self.grid.zeros[rows])
        return replace(self, codes=self.codes[rows], grid=grid)

    @staticmethod
    def stack(parts: list[QuantizedTensor]) -> QuantizedTensor:
        """The outputs of several tensors one after another; they share bits, groups and inputs."""
        scales = torch.cat([part.grid.scales for part in parts])
        grid = replace(parts[0].grid, scales=scales, zeros=torch.cat([p.grid.zeros for p in parts]))
        return replace(parts[0], codes=torch.cat([part.codes for part in parts]), grid=grid)

    def stacks_with(self, other: QuantizedTensor) -> bool:
        """Whether both have the same bits, inputs and groups."""
        if self.bits != other.bits or self.codes.shape[1] != other.codes.shape[1]:
            return False
        if self.grid.scales.shape[1] != other.grid.scales.shape[1]:
            return False
        if self.group_index is None or other.group_index is None:
            return self.group_index is other.group_index
        return torch.equal(self.group_index, other.group_index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * (code - zero), (out, in); computed in float32, then cast."""
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        step = _ROWS if weight.is_cpu else _MANY_ROWS
        for start in range(0, len(weight), step):
            part = self.rows(slice(start, start + step))
            weight[start : start + step] = part._dequantize()
        return weight

    def _dequantize(self) -> Tensor:
        """The values in float32."""
        scales, zeros = self.grid.scales, self.grid.zeros.float()
        if self.group_index is None:
            codes = self.codes.reshape(*scales.shape, -1).float()  # (out, groups, width)
            values = codes.sub_(zeros[..., None]).mul_(scales[..., None])
            return values.view(self.codes.shape)
        index = self.group_index.long()
        return self.codes.float().sub_(zeros[:, index]).mul_(scales[:, index])


def fit_minmax(weight: Tensor, config: QuantConfig) -> Grid:
    """The grid that spans each group's range.

    Args:
        weight: (out, in) float32; in must be divisible by the group size.

    Returns:
        A Grid whose scales are positive, finite and float16-exact; an all-zero group gets a
        harmless scale.
    """
    groups = weight.reshape(len(weight), -1, config.width(weight.shape[1]))  # (out, groups, width)
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    if config.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scales = ((high - low) / config.max_code).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    zeros = torch.full_like(scales, 2 ** (config.bits - 1))
    if not config.symmetric:
        zeros = (-low / scales).round().clamp(1, config.max_code)
    return Grid(scales, zeros.to(torch.uint8), config.bits)


def nearest_codes(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest code of every weight (out, in), uint8, for groups of consecutive columns."""
    groups = weight.reshape(*grid.scales.shape, -1)
    codes = groups.div(grid.scales[..., None]).round_().add_(grid.zeros[..., None].float())
    return codes.clamp_(0, grid.max_code).to(torch.uint8).reshape(weight.shape)
