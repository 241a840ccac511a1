"""pytest tests/test_solvers.py: GPTQ against a literal column-by-column solution in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quant.config import QuantConfig
from quant.grid import Grid, fit_minmax
from quant.solvers import SOLVERS, gptq
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.loss import relative_error


def problem(
    rows: int, columns: int, seed: int, tokens: int = 400
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x


def literal_obq(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, width: int, damp: float
) -> torch.Tensor:
    """Optimal brain quantization, column by column, inverting the Hessian of the columns left."""
    W, H = weight.double().clone(), hessian.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    codes = torch.zeros_like(W)
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        scale, zero = grid.scales[:, j // width].double(), grid.zeros[:, j // width].double()
        code = ((W[:, j] / scale).round() + zero).clamp(0, grid.max_code)
        codes[:, j] = code
        error = (W[:, j] - scale * (code - zero)) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0][None]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_literal_obq(bits: int, symmetric: bool) -> None:
    weight, hessian = problem(24, 64, bits)
    weight, hessian = weight.double(), hessian.double()
    config = QuantConfig(bits, 32, symmetric)
    solution = gptq.solve(
        weight, hessian, config, GPTQOptions(act_order=False, block_size=16, scales="minmax")
    )
    expected = literal_obq(weight, hessian, fit_minmax(weight, config), 32, 0.01)
    assert torch.equal(solution.tensor.codes, expected)


def test_act_order_is_obq_on_sorted_columns() -> None:
    weight, hessian = (t.double() for t in problem(8, 32, 5))
    config = QuantConfig(4, 32)
    order = hessian.diagonal().argsort(descending=True)
    grid = fit_minmax(weight, config)
    expected = literal_obq(weight[:, order], hessian[order][:, order], grid, 32, 0.01)
    assert torch.equal(
        gptq.solve(weight, hessian, config, GPTQOptions(scales="minmax")).tensor.codes[:, order],
        expected,
    )


def test_worked_example() -> None:
    weight, hessian = torch.tensor([[0.4, 0.4]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    columns = gptq._Columns.of(hessian, GPTQOptions(damp=0.0))
    assert columns.order.tolist() == [0, 1]
    assert torch.equal(columns.ratio, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    grid = Grid(torch.ones(1, 1), torch.full((1, 1), 8, dtype=torch.uint8), 4)
    codes, losses = gptq._round_columns(weight, columns, grid, 128)
    assert codes.tolist() == [[8, 9]] and round(losses.item(), 4) == 0.2
    errors = {q: torch.tensor([[0.4 - q[0], 0.4 - q[1]]]) for q in ((0, 0), (0, 1))}
    assert [round((e @ hessian @ e.T).item(), 4) for e in errors.values()] == [0.8, 0.2]


def test_gptq_beats_rounding_on_20_problems() -> None:
    for seed in range(20):
        weight, hessian = problem(17, 64, seed)
        config = QuantConfig(4, 32)
        errors = {}
        for name, (solve, options) in SOLVERS.items():
            dense = solve(weight, hessian, config, options()).tensor.dequantize()
            errors[name] = relative_error(weight, dense, hessian)
        assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_shapes_and_ranges(name: str, group_size: int, rows: int) -> None:
    weight, hessian = problem(rows, 128, 0)
    before = weight.clone(), hessian.clone()
    solve, options = SOLVERS[name]
    qt = solve(weight, hessian, QuantConfig(4, group_size), options()).tensor
    assert qt.codes.dtype == torch.uint8 and qt.codes.shape == weight.shape and qt.codes.max() <= 15
    assert qt.grid.scales.shape == (rows, 1 if group_size == -1 else 128 // group_size)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_rank_one_hessian_is_solved_and_reported() -> None:
    weight, _ = problem(4, 64, 0)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 1e4
    solution = gptq.solve(weight, x.T @ x, QuantConfig(4, 32), GPTQOptions(damp=0.0))
    assert torch.isfinite(solution.tensor.dequantize()).all()
    assert solution.damp > 0 and any("damping raised" in note for note in solution.notes)


def test_dead_inputs_are_rounded_and_reported() -> None:
    weight, hessian = problem(4, 64, 0)
    hessian[5], hessian[:, 5] = 0, 0
    config = QuantConfig(4, 32)
    solution = gptq.solve(weight, hessian, config, GPTQOptions(scales="minmax"))
    rounded = SOLVERS["rtn"][0](weight, hessian, config, None).tensor
    assert torch.equal(solution.tensor.codes[:, 5], rounded.codes[:, 5])
    assert any("1 of 64 channels" in note for note in solution.notes)


def test_what_is_not_finite_is_refused() -> None:
    weight, hessian = problem(4, 64, 0)
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq.solve(weight, hessian, QuantConfig(4, 32), GPTQOptions())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="damp 1.5 is out of range"):
        GPTQOptions(damp=1.5)
    with pytest.raises(ValueError, match="scales 'best' is unknown"):
        GPTQOptions(scales="best")
    assert dataclasses.asdict(GPTQOptions())["damp"] == 0.01


@pytest.mark.parametrize("steps", [{}, {"sweeps": 1, "refits": 1}])
def test_a_shrunk_hessian_is_one_with_a_larger_diagonal(steps: dict[str, int]) -> None:
    weight, hessian = problem(24, 96, 3)
    before, config = hessian.clone(), QuantConfig(4, 32)
    shrunk = gptq.solve(weight, hessian, config, GPTQOptions(shrink=0.25, **steps)).tensor
    assert torch.equal(hessian, before)
    other = hessian.clone()
    other.diagonal().mul_(4 / 3)
    assert torch.equal(
        gptq.solve(weight, other, config, GPTQOptions(**steps)).tensor.codes, shrunk.codes
    )
    plain = gptq.solve(weight, hessian, config, GPTQOptions(**steps)).tensor
    assert not torch.equal(plain.codes, shrunk.codes)


def test_a_hessian_is_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(8, 32, 3)
    before = hessian.clone()
    monkeypatch.setattr(gptq, "factor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gptq.solve(weight, hessian, QuantConfig(4, 32), GPTQOptions(shrink=0.5))
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("shrink", [-0.1, 1.0])
def test_shrinkage_is_a_share(shrink: float) -> None:
    with pytest.raises(ValueError, match=f"shrink {shrink} is out of range"):
        GPTQOptions(shrink=shrink)
