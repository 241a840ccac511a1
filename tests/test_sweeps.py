"""pytest tests/test_sweeps.py: sweeps over codes and refit scales against literal float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import built
from test_solvers import problem
from torch import Tensor

from quant.config import QuantConfig
from quant.grid import QuantizedTensor
from quant.native import solving
from quant.solvers import gptq, sweeps
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.refit import normal_equations, refit
from quant.solvers.sweeps import sweep


def solved(
    rows: int, columns: int, seed: int, config: QuantConfig, **options: object
) -> tuple[Tensor, Tensor, QuantizedTensor]:
    """A weight, its Hessian, and what GPTQ makes of them."""
    weight, hessian = problem(rows, columns, seed)
    return weight, hessian, gptq.solve(weight, hessian, config, GPTQOptions(**options)).tensor


def exact_losses(weight: Tensor, hessian: Tensor, tensor: QuantizedTensor) -> Tensor:
    """(w - q) H (w - q)^T of each row in float64."""
    errors = weight.double() - tensor.dequantize(torch.float64)
    return (errors @ hessian.double() * errors).sum(1)


def rescaled(tensor: QuantizedTensor, scales: Tensor) -> QuantizedTensor:
    """The same codes with other scales."""
    return dataclasses.replace(tensor, grid=dataclasses.replace(tensor.grid, scales=scales.float()))


def literal_sweep(weight: Tensor, hessian: Tensor, tensor: QuantizedTensor) -> tuple[Tensor, ...]:
    """Each code in turn the best of all codes by the whole loss; and how close the second was."""
    codes, margins = tensor.codes.clone(), torch.full(weight.shape[:1], torch.inf).double()
    for column in range(weight.shape[1]):
        losses = []
        for code in range(tensor.grid.max_code + 1):
            codes[:, column] = code
            losses.append(exact_losses(weight, hessian, dataclasses.replace(tensor, codes=codes)))
        best, second = torch.stack(losses).topk(2, dim=0, largest=False)[0]
        margins = torch.minimum(margins, (second - best) / best.clamp(min=1e-30))
        codes[:, column] = torch.stack(losses).argmin(0).to(torch.uint8)
    return codes, margins


@pytest.mark.parametrize(("block_size", "wide"), [(16, 2048), (16, 64), (12, 64), (128, 2048)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_sweep_takes_the_best_code_of_each_column(
    bits: int, symmetric: bool, block_size: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, and in spans of blocks that share a product."""
    monkeypatch.setattr(sweeps, "_WIDE", wide)
    weight, hessian, tensor = solved(24, 64, bits, QuantConfig(bits, 32, symmetric))
    expected, margins = literal_sweep(weight, hessian, tensor)
    codes = sweep(weight, hessian, tensor, block_size)[0].codes
    sure = margins > 1e-5  # a tie decided otherwise changes the rest of its row
    assert sure.float().mean() > 0.5
    assert torch.equal(codes[sure], expected[sure]) and not torch.equal(codes, tensor.codes)


@pytest.mark.parametrize("scales", ["minmax", "weighted", "signed"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_sweep_and_refit_lowers_the_exact_loss_of_every_row(bits: int, scales: str) -> None:
    """And by as much as it says."""
    weight, hessian, tensor = solved(40, 96, bits, QuantConfig(bits, 32), scales=scales)
    before = exact_losses(weight, hessian, tensor)
    first = before.sum()
    for _ in range(3):
        for step in (refit, lambda *problem: sweep(*problem, 32)):
            tensor, added, *_ = step(weight, hessian, tensor)
            after = exact_losses(weight, hessian, tensor)
            assert (after <= before * (1 + 1e-5)).all()
            assert added.dtype is torch.float64 and (added <= before * 1e-5).all()
            torch.testing.assert_close(before + added, after, rtol=1e-4, atol=0)
            before = after
    assert before.sum() < 0.97 * first
    assert torch.equal(tensor.grid.scales, tensor.grid.scales.half().float())


@built
def test_native_and_torch_sweep_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, tensor = solved(70, 320, 3, QuantConfig(4, 64))
    native, gain = sweep(weight, hessian, tensor, 128)
    monkeypatch.setattr(solving, "can_round", lambda values: False)
    plain, same = sweep(weight, hessian, tensor, 128)
    assert (native.codes != plain.codes).float().mean() < 0.002  # ties
    assert gain.sum() < 0 and abs(gain.sum() / same.sum() - 1) < 0.02


def test_normal_equations_are_those_of_the_formula() -> None:
    weight, hessian, tensor = solved(6, 96, 1, QuantConfig(4, 32, False))
    errors = weight.double() - tensor.dequantize(torch.float64)
    A, b = normal_equations(weight.double(), hessian.double(), tensor)
    zeros = tensor.grid.zeros.double().repeat_interleave(32, 1)
    steps = tensor.codes.double() - zeros
    for row in range(6):
        parts = torch.zeros(96, 3, dtype=torch.float64)  # column g: c_g, 0 in other groups
        for group in range(3):
            columns = slice(32 * group, 32 * group + 32)
            parts[columns, group] = steps[row, columns]
        assert torch.allclose(A[row], parts.T @ hessian.double() @ parts)
        assert torch.allclose(b[row], parts.T @ hessian.double() @ errors[row])


def test_refit_scales_are_the_least_squares_solution() -> None:
    """Against lstsq on the tokens themselves, of outputs on the parts of each group."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 64, generator=generator)
    hessian = (x.T @ x).float()
    tensor = gptq.solve(weight, hessian, QuantConfig(3, 32), GPTQOptions(scales="minmax")).tensor
    fitted, *_ = refit(weight, hessian, tensor)
    assert torch.equal(fitted.codes, tensor.codes)
    for row in range(5):
        steps = (tensor.codes[row].double() - 4).view(2, 32)
        outputs = torch.stack([x[:, :32] @ steps[0], x[:, 32:] @ steps[1]], 1)
        best = torch.linalg.lstsq(outputs, (x @ weight[row].double())[:, None]).solution[:, 0]
        assert torch.allclose(fitted.grid.scales[row].double(), best, rtol=2**-10)


def test_scales_that_rounding_would_make_worse_are_kept() -> None:
    """Two groups of nearly the same inputs: float16 neighbours of the solution may lose less."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x + 1e-4 * torch.randn(200, 32, generator=generator)], 1)
    hessian, start = (x.T @ x).float(), torch.randn(12, 32, generator=generator)
    weight = torch.cat([start, start], 1)
    tensor = gptq.solve(weight, hessian, QuantConfig(4, 32), GPTQOptions(scales="minmax")).tensor
    half = refit(weight, hessian, tensor)[0].grid.scales.half()
    steps = torch.tensor(list(itertools.product(range(-2, 3), repeat=2)), dtype=torch.int16)
    losses, kept = exact_losses(weight, hessian, rescaled(tensor, half)), half.float()
    for step in steps:
        scales = (half.view(torch.int16) + step).view(torch.float16).float()
        better = exact_losses(weight, hessian, rescaled(tensor, scales))
        kept = torch.where((better < losses)[:, None], scales, kept)
        losses = torch.minimum(better, losses)
    moved = (kept != half.float()).any(1)
    assert moved.sum() >= 3
    best = rescaled(tensor, kept)
    after, *_ = refit(weight, hessian, best)
    assert torch.equal(after.grid.scales[moved], kept[moved])


def test_inputs_never_seen_and_groups_of_zeros_keep_what_they_have() -> None:
    weight, hessian = problem(8, 96, 2)
    hessian[:32], hessian[:, :32] = 0, 0
    weight[:, 32:64] = 0
    options = GPTQOptions(scales="minmax")
    tensor = gptq.solve(weight, hessian, QuantConfig(4, 32), options).tensor
    moved, _ = sweep(weight, hessian, refit(weight, hessian, tensor)[0], 64)
    assert torch.equal(moved.codes[:, :32], tensor.codes[:, :32])
    assert torch.equal(moved.grid.scales[:, 0], tensor.grid.scales[:, 0])
    assert torch.isfinite(moved.grid.scales).all()


def test_options_run_the_steps_and_off_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(40, 96, 0)
    config, calls = QuantConfig(4, 32), []
    for name, step in (("sweep", sweep), ("refit", refit)):
        monkeypatch.setattr(gptq, name, lambda *a, n=name, s=step: calls.append(n) or s(*a))
    plain = gptq.solve(weight, hessian, config, GPTQOptions()).tensor
    assert calls == []
    swept = gptq.solve(weight, hessian, config, GPTQOptions(sweeps=3, refits=1)).tensor
    assert calls == ["refit", "sweep", "sweep", "sweep"]
    losses = [exact_losses(weight, hessian, t).sum() for t in (plain, swept)]
    assert losses[1] < losses[0]
    again = gptq.solve(weight, hessian, config, GPTQOptions(sweeps=3, refits=1)).tensor
    assert torch.equal(again.codes, swept.codes)


@pytest.mark.parametrize(("sweeps", "refits"), [(-1, 0), (1, 2), (2, -1)])
def test_counts_are_checked(sweeps: int, refits: int) -> None:
    with pytest.raises(ValueError, match=f"refits {refits} and sweeps {sweeps} do not fit"):
        GPTQOptions(sweeps=sweeps, refits=refits)
