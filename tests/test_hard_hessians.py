"""pytest tests/test_hard_hessians.py: Hessians of degenerate inputs, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_solvers import problem

from quant import quantize_checkpoint
from quant.config import QuantConfig
from quant.solvers import gptq
from quant.solvers.gptq_options import EFFORTS, GPTQOptions
from quant.solvers.loss import lost_share, relative_error

HARD = {
    "rank one": lambda x: x[:1].repeat(len(x), 1),
    "the same token again and again": lambda x: x[:3].repeat(20, 1),
    "inputs that are never active": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
    "magnitudes from 1e-12 to 1e12": lambda x: x * torch.logspace(-6, 6, x.shape[1]),
    "one huge input": lambda x: x * (1 + 1e6 * (torch.arange(x.shape[1]) == 5)),
    "no input at all": lambda x: x * 0,
}


@pytest.mark.parametrize("options", [GPTQOptions(), EFFORTS["fast"]], ids=["plain", "fast"])
@pytest.mark.parametrize("case", HARD)
def test_hard_hessians_are_solved_and_reported(case: str, options: GPTQOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    x = HARD[case](torch.randn(60, 64, generator=generator))
    weight, hessian = torch.randn(8, 64, generator=generator), x.T @ x
    solution = gptq.solve(weight, hessian, QuantConfig(4, 32), options)
    plain = gptq.solve(weight, torch.eye(64), QuantConfig(4, 32), GPTQOptions())
    error, rounding = (
        relative_error(weight, s.tensor.dequantize(), hessian) for s in (solution, plain)
    )
    assert error <= rounding * 1.001
    if case in ("inputs that are never active", "no input at all"):
        assert any("never active" in note for note in solution.notes)
    assert (solution.damp == 0.01) == (not any("raised" in note for note in solution.notes))


def test_no_share_is_below_zero() -> None:
    assert lost_share(-1e-9, 2.0) == 0.0 and lost_share(1.0, 4.0) == 0.25
    assert lost_share(3.0, 0.0) == lost_share(3.0, -1e-9) == 3.0  # no energy to lose


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_text_of_one_token_is_no_error(
    make_checkpoint: Callable[..., Path], tmp_path: Path, effort: str
) -> None:
    """The same id throughout, so Hessians have a few directions at most. These are served, but for
    the rounding of float32 sums.
    """
    windows = torch.full((4, 32), 7)
    solver = replace(EFFORTS[effort], own=0)
    report = quantize_checkpoint(
        make_checkpoint(), tmp_path / "out", windows, QuantConfig(4, 32), solver
    )
    assert all(0 <= line.relative_error < 1e-4 for line in report.linears)
    assert all(line.rtn_relative_error > 1e-3 for line in report.linears)


def test_a_hessian_with_a_nan_anywhere_is_refused() -> None:
    weight, hessian = problem(4, 64, 0)
    hessian[3, 9] = torch.nan
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        gptq.solve(weight, hessian, QuantConfig(4, 32), GPTQOptions())


def test_every_retry_of_the_factor_is_noted() -> None:
    indefinite = torch.eye(32) - 0.9 * torch.ones(32, 32)
    indefinite.diagonal().copy_(torch.ones(32))
    _, damp, notes = gptq.factor(indefinite, torch.arange(32), 0.01)
    assert damp > 0.01
    assert any("retried in float64" in note for note in notes)
    assert any(f"damping raised to {damp:g}" in note for note in notes)
