"""pytest tests/test_grid.py: the grid's definition, its fit, and the packing of codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.config import QuantConfig
from quant.grid import Grid, QuantizedTensor, fit_minmax, nearest_codes
from quant.packing import pack, unpack


def test_definition_on_numbers() -> None:
    codes = torch.tensor([[0, 15, 8, 7]], dtype=torch.uint8)
    grid = Grid(torch.tensor([[0.5, 2.0]]), torch.tensor([[8, 1]], dtype=torch.uint8), 4)
    expected = torch.tensor([[0.5 * (0 - 8), 0.5 * (15 - 8), 2.0 * (8 - 1), 2.0 * (7 - 1)]])
    assert torch.equal(QuantizedTensor(codes, grid).dequantize(), expected)
    index = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    assert torch.equal(QuantizedTensor(codes, grid, index).dequantize(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fit_is_float16_exact_and_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(bits))
    grid = fit_minmax(weight, QuantConfig(bits, 64, symmetric))
    assert torch.equal(grid.scales.half().float(), grid.scales) and (grid.scales > 0).all()
    assert (grid.zeros >= 1).all() and (grid.zeros <= 2**bits - 1).all()
    dense = QuantizedTensor(nearest_codes(weight, grid), grid).dequantize()
    step = grid.scales.repeat_interleave(64, 1)
    # the symmetric grid clips +absmax by half a step; an asymmetric zero is rounded by half a step
    assert ((weight - dense).abs() <= 1.02 * step).all()


def test_a_group_without_negative_weights_uses_its_whole_side() -> None:
    grid = fit_minmax(torch.full((1, 32), 7.0), QuantConfig(4, 32))
    assert abs(grid.scales.item() - 14 / 15) < 1e-3


def test_an_empty_group_is_harmless() -> None:
    weight = torch.zeros(2, 64)
    for symmetric in (True, False):
        grid = fit_minmax(weight, QuantConfig(4, 32, symmetric))
        assert torch.equal(QuantizedTensor(nearest_codes(weight, grid), grid).dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_one_run_of_bits(bits: int) -> None:
    codes = torch.randint(
        0, 2**bits, (96, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (96 * bits // 32, 7)
    assert torch.equal(unpack(words, bits, 96), codes)
    for column in range(7):  # the bytes of a column, as one little-endian number
        number = int.from_bytes(words[:, column].numpy().astype("<i4").tobytes(), "little")
        assert [(number >> (bits * i)) % 2**bits for i in range(96)] == codes[:, column].tolist()


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="cannot pack 33 codes"):
        pack(torch.zeros(33, 2, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="do not hold 32 codes"):
        unpack(torch.zeros(3, 2, dtype=torch.int32), 4, 32)


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="bits 5 is not supported"):
        QuantConfig(bits=5)
    with pytest.raises(ValueError, match="group_size 48"):
        QuantConfig(group_size=48)
    assert np.isclose(QuantConfig(3).max_code, 7)
