"""Random quantized tensors and activations for the tests of the backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant import native
from quant.grid import Grid, QuantizedTensor

KERN = native.library()
ISAS = KERN.kern_available().decode().split() if KERN else []
built = pytest.mark.skipif(KERN is None, reason="the native library is not built")


def make(
    n: int, k: int, width: int = -1, bits: int = 4, one_zero: bool = False, seed: int = 0
) -> QuantizedTensor:
    """A random tensor, half of its scales negative."""
    generator = torch.Generator().manual_seed(seed)
    width = k if width == -1 else width
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.randn(n, k // width, generator=generator).half().float()
    zeros = torch.randint(1, 2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    if one_zero:
        zeros.fill_(2 ** (bits - 1))
    return QuantizedTensor(codes, Grid(scales, zeros, bits))


def shuffled(qt: QuantizedTensor, groups: int) -> QuantizedTensor:
    """The same codes with the columns dealt to groups of unequal size."""
    index = torch.randint(0, groups, (qt.in_features,), generator=torch.Generator().manual_seed(9))
    grid = make(qt.out_features, 32 * groups, 32, qt.bits).grid
    return QuantizedTensor(qt.codes, grid, index.int())


def rows(m: int, k: int, seed: int = 1) -> Tensor:
    """Activations with outliers, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x[:, :: max(1, k // 3)] *= 30
    return x


def worst_error(y: Tensor, x: Tensor, qt: QuantizedTensor) -> float:
    """Largest |y - x W^T| as a share of sum |x| |W|, by float64."""
    weight = qt.dequantize(torch.float64)
    expected = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    return float(((y.double() - expected).abs() / size.clamp(min=1e-30)).max())
