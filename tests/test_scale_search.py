"""pytest tests/test_scale_search.py: the searched grid against every float16 scale there is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import ISAS, KERN, built
from test_solvers import problem
from torch import Tensor

from quant.config import QuantConfig
from quant.grid import Grid, fit_minmax, nearest_codes
from quant.kernels import BACKENDS
from quant.native import searching
from quant.solvers import gptq
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.loss import relative_error
from quant.solvers.scale_search import fit_weighted


def literal_loss(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """sum of h (w - s (c - z))^2 of each group in float64, c by trying every code."""
    groups = weight.double().reshape(*grid.scales.shape, 1, -1)
    codes = torch.arange(grid.max_code + 1).double().view(-1, 1)
    scales, zeros = grid.scales.double()[..., None, None], grid.zeros.double()[..., None, None]
    errors = (groups - scales * (codes - zeros)).square().amin(-2)  # (out, groups, width)
    return (errors * importance.double().view(1, grid.scales.shape[1], -1)).sum(-1)


def exhaustive(weight: Tensor, importance: Tensor, config: QuantConfig, signed: bool) -> Tensor:
    """The least loss of each group over 800 scales, both signs, and zeros next to min-max's."""
    start = fit_minmax(weight, config)
    best = literal_loss(weight, importance, start)
    for fraction in torch.linspace(0.3, 1.15, 800):
        for sign in (1, -1) if signed else (1,):
            for shift in (0,) if config.symmetric else (-1, 0, 1):
                scales = (start.scales * fraction).half().float() * sign
                zeros = (start.zeros.int() + shift).clamp(1, config.max_code).to(torch.uint8)
                grid = dataclasses.replace(start, scales=scales, zeros=zeros)
                best = torch.minimum(best, literal_loss(weight, importance, grid))
    return best


@pytest.mark.parametrize(("symmetric", "signed"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_exhaustive_search(bits: int, symmetric: bool, signed: bool) -> None:
    """About 20 evaluations find grids whose summed loss is within 3 % of the least there is."""
    config = QuantConfig(bits, 32, symmetric)
    weight, hessian = problem(12, 64, bits)
    importance = hessian.diagonal() * torch.logspace(-2, 1, 64)
    grid = fit_weighted(weight, importance, config, signed)
    found = literal_loss(weight, importance, grid).sum()
    least = exhaustive(weight, importance, config, signed).sum()
    plain = literal_loss(weight, importance, fit_minmax(weight, config)).sum()
    assert found <= 1.03 * least and found < 0.9 * plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_no_group_is_worse_than_min_max(bits: int, symmetric: bool, group_size: int) -> None:
    config = QuantConfig(bits, group_size, symmetric)
    weight, hessian = problem(40, 96, bits)
    weight[3, :32], weight[5] = 0, 1e-7
    grid, start = (
        fit_weighted(weight, hessian.diagonal(), config),
        fit_minmax(weight, config),
    )
    mine, plain = (literal_loss(weight, hessian.diagonal(), g) for g in (grid, start))
    assert (mine <= plain * (1 + 1e-5)).all()
    assert torch.equal(grid.scales, grid.scales.half().float()) and (grid.scales > 0).all()
    assert grid.zeros.min() >= 1 and grid.zeros.max() <= config.max_code


def test_chunks_and_scaling_of_importance_do_not_matter() -> None:
    config = QuantConfig(4, 32)
    weight, hessian = problem(5000, 64, 0)
    importance = hessian.diagonal()
    grid = fit_weighted(weight, importance, config)
    for rows in (slice(0, 7), slice(2040, 2060), slice(4993, 5000)):
        part = fit_weighted(weight[rows], importance * 2.0**40, config)
        assert torch.equal(part.scales, grid.scales[rows])


def test_groups_without_importance_keep_min_max() -> None:
    config = QuantConfig(4, 32)
    weight, hessian = problem(6, 64, 1)
    importance = hessian.diagonal().clone()
    importance[:32] = 0
    grid, start = fit_weighted(weight, importance, config), fit_minmax(weight, config)
    assert torch.equal(grid.scales[:, 0], start.scales[:, 0])
    assert not torch.equal(grid.scales[:, 1], start.scales[:, 1])
    assert torch.equal(fit_weighted(weight, importance * 0, config).scales, start.scales)


def test_negative_scales_reach_the_larger_side() -> None:
    """One weight of +8 steps: code 0 of a negative scale holds it exactly."""
    weight = torch.cat([torch.arange(-7.0, 8.0), torch.tensor([8.0] * 17)])[None]
    grid = fit_weighted(weight, torch.ones(32), QuantConfig(4, 32), signed=True)
    assert grid.scales.item() == -1.0
    grid = fit_weighted(-weight, torch.ones(32), QuantConfig(4, 32), signed=True)
    assert grid.scales.item() == 1.0


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_multiply_by_negative_scales(name: str) -> None:
    backend = BACKENDS[name]
    if not backend.is_available(torch.device("cpu")):
        pytest.skip(f"backend {name} is not available here")
    weight, hessian = problem(64, 128, 3)
    options = GPTQOptions(scales="signed")
    qt = gptq.solve(weight, hessian, QuantConfig(4, 64), options).tensor
    assert (qt.grid.scales < 0).any() and (qt.grid.scales > 0).any()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ qt.dequantize().double().T
    assert torch.allclose(backend.matmul(x, backend.pack(qt)).double(), exact, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_on_searched_grids_loses_less(bits: int) -> None:
    """Where channels differ in strength, as those of language models do."""
    strength = torch.logspace(-1, 1, 96)[torch.randperm(96, generator=torch.manual_seed(0))]
    for seed in range(8):
        weight, hessian = problem(48, 96, seed)
        hessian = strength[:, None] * hessian * strength
        errors = []
        for scales in ("minmax", "weighted"):
            options = GPTQOptions(scales=scales)
            qt = gptq.solve(weight, hessian, QuantConfig(bits, 32), options).tensor
            errors.append(relative_error(weight, qt.dequantize(), hessian))
        assert errors[1] < errors[0]


def test_nearest_codes_of_a_negative_scale_are_nearest() -> None:
    weight, hessian = problem(16, 64, 4)
    config = QuantConfig(4, 32)
    grid = fit_weighted(weight, hessian.diagonal(), config, signed=True)
    values = grid.scales[..., None, None] * (torch.arange(16.0) - 8)[:, None]
    distance = (weight.view(16, 2, 1, 32) - values).abs()  # (out, groups, codes, width)
    nearest = nearest_codes(weight, grid).view(16, 2, 1, 32).long()
    assert torch.equal(distance.gather(2, nearest)[:, :, 0], distance.amin(2))


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("symmetric", "signed"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("width", [32, 96, -1])
def test_native_search_finds_what_torch_finds(
    isa: str, symmetric: bool, signed: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KERN is not None
    config = QuantConfig(4, width, symmetric)
    weight, hessian = problem(40, 192, 5)
    # Down to scales below 2^-14, whose float16 steps are coarse, and groups that are all zero.
    weight *= torch.logspace(-4.5, 0, 40)[:, None]
    weight[3, :96] = 0
    KERN.kern_select(isa.encode())
    try:
        native = fit_weighted(weight, hessian.diagonal(), config, signed)
    finally:
        KERN.kern_select(None)
    monkeypatch.setattr(searching, "can_search", lambda weight, width: False)
    plain = fit_weighted(weight, hessian.diagonal(), config, signed)
    assert torch.equal(native.scales, native.scales.half().float())
    losses = [literal_loss(weight, hessian.diagonal(), grid) for grid in (native, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-12)  # candidates that tie may differ
    assert (native.scales == plain.scales).float().mean() > 0.95
    assert (native.zeros == plain.zeros).float().mean() > 0.95
