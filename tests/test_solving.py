"""pytest tests/test_solving.py: the native column loop against torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import ISAS, KERN, built
from test_solvers import problem

from calib.hessian import Hessian
from quant.config import QuantConfig
from quant.native import solving
from quant.solvers import gptq
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.loss import output_energy, relative_error


def block(
    rows: int, columns: int, seed: int = 0, negative: bool = False
) -> tuple[solving.Block, solving.Grids]:
    """What round_block takes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    groups = torch.randint(0, 5, (columns,), generator=generator)
    scales = random(5, rows).abs() + 0.1
    if negative:
        scales[::2] *= -1
    zeros = torch.randint(0, 16, (5, rows), generator=generator).float()
    original = random(columns, rows) * 3
    ratio = random(columns, columns) * 0.1
    values, judged = original + random(columns, rows) * 0.1, random(2, columns)
    grids = solving.Grids(scales, zeros, groups, 15)
    return solving.Block(values, original, ratio, judged), grids


def in_float64(
    block: solving.Block, grids: solving.Grids
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, how far each was from another one, and losses, by the formula in float64."""
    values, original, ratio, judged = (t.double() for t in vars(block).values())
    scales, zeros = grids.scales.double()[grids.groups], grids.zeros.double()[grids.groups]
    losses = torch.zeros_like(values[0])
    errors, codes, margin = torch.zeros_like(values), values.clone(), values.clone()
    for j in range(len(values)):
        steps = (values[j] + ratio[:j, j] @ errors[:j]) / scales[j]
        margin[j] = (steps - steps.floor() - 0.5).abs()
        codes[j] = (steps.round() + zeros[j]).clamp(0, grids.max_code)
        errors[j] = original[j] - scales[j] * (codes[j] - zeros[j])
        moved = steps * scales[j] - scales[j] * (codes[j] - zeros[j])
        losses += judged[0, j] * moved**2 - judged[1, j] * errors[j] ** 2
    return codes, margin, losses


def rounded(block: solving.Block, grids: solving.Grids) -> tuple[torch.Tensor, ...]:
    """Codes, errors and losses of the library."""
    errors = torch.empty(block.values.shape)
    codes, losses = solving.round_block(block, grids, errors)
    return codes, errors, losses


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (31, 128), (32, 64), (100, 256)])
def test_native_codes_equal_float64(isa: str, rows: int, columns: int, negative: bool) -> None:
    assert KERN is not None
    some, grids = block(rows, columns, rows, negative)
    expected, margin, lost = in_float64(some, grids)
    KERN.kern_select(isa.encode())
    try:
        codes, errors, losses = rounded(some, grids)
    finally:
        KERN.kern_select(None)
    # A tie decided otherwise changes the rest of its row, so only rows without one are compared.
    sure = (margin > 1e-4).all(0)
    assert sure.float().mean() > 0.5 or rows == 1
    assert torch.equal(codes[:, sure].double(), expected[:, sure])
    scales, zeros = grids.scales[grids.groups], grids.zeros[grids.groups]
    assert torch.equal(errors, some.original - scales * (codes.float() - zeros))
    torch.testing.assert_close(losses[sure].double(), lost[sure], rtol=1e-3, atol=1e-2)


@built
@pytest.mark.parametrize("symmetric", [True, False])
def test_native_and_torch_solve_alike(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(70, 320, 3)
    config = QuantConfig(4, 64, symmetric)
    native = gptq.solve(weight, hessian, config, GPTQOptions()).tensor
    monkeypatch.setattr(solving, "can_round", lambda block: False)
    plain = gptq.solve(weight, hessian, config, GPTQOptions()).tensor
    assert (native.codes != plain.codes).float().mean() < 0.002  # ties
    errors = [relative_error(weight, qt.dequantize(), hessian) for qt in (native, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@built
def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    whole, grids = block(90, 64)
    some = slice(37, 71)
    part = replace(whole, values=whole.values[:, some], original=whole.original[:, some])
    of_part = replace(grids, scales=grids.scales[:, some], zeros=grids.zeros[:, some])
    expected = rounded(whole, grids)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codes, _, losses = rounded(part, of_part)
    torch.set_num_threads(threads)
    assert torch.equal(codes, expected[0][:, some]) and torch.equal(losses, expected[2][some])


@built
def test_blocks_that_do_not_fit_are_refused() -> None:
    good, grids = block(4, 8)
    with pytest.raises(ValueError, match=r"original \(8, 4\) torch.float64 on cpu: expected"):
        rounded(replace(good, original=good.original.double()), grids)
    with pytest.raises(ValueError, match=r"ratio \(7, 8\) .*: expected \(8, 8\)"):
        rounded(replace(good, ratio=good.ratio[:7]), grids)
    with pytest.raises(ValueError, match="a block of 8 columns with 7 groups"):
        rounded(good, grids.of(slice(7)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("damp", [0.0, 0.01, 0.3])
@pytest.mark.parametrize(("sweeps", "refits"), [(0, 0), (2, 1)])
@pytest.mark.parametrize("shrink", [0.0, 0.4])
def test_the_solver_knows_what_it_loses(
    native: bool,
    damp: float,
    sweeps: int,
    refits: int,
    shrink: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not native:
        monkeypatch.setattr(solving, "can_round", lambda block: False)
    weight, hessian = problem(70, 320, 3, 2000)
    hessian[7], hessian[:, 7] = 0, 0  # an input that is never active
    options = GPTQOptions(damp=damp, sweeps=sweeps, refits=refits, shrink=shrink)
    solution = gptq.solve(weight, hessian, QuantConfig(4, 64), options)
    error = (weight - solution.tensor.dequantize()).double()
    assert solution.losses is not None and solution.losses.dtype is torch.float64
    torch.testing.assert_close(
        solution.losses, (error @ hessian.double() * error).sum(1), rtol=2e-4, atol=0
    )
    if not refits:
        assert solution.energies is None
        return
    assert solution.energies is not None and solution.energies.dtype is torch.float64
    w = weight.double()
    energies = (w @ hessian.double() * w).sum(1)
    torch.testing.assert_close(solution.energies, energies, rtol=1e-5, atol=0)


def test_energy_is_the_trace_in_float64() -> None:
    weight, hessian = problem(5, 1200, 1, 2000)
    w, h = weight.double(), hessian.double()
    torch.testing.assert_close(
        output_energy(weight, hessian), (w @ h * w).sum(1), rtol=1e-5, atol=0
    )


def test_the_sum_is_symmetric_and_complete() -> None:
    hessian, x = Hessian(300), torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    hessian.add(x[:200])
    first = hessian.matrix.clone()
    hessian.add(x[200:])
    exact = x.double().T @ x.double()
    assert torch.equal(first, first.T) and torch.equal(hessian.matrix, hessian.matrix.T)
    torch.testing.assert_close(hessian.matrix.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [1, 300, 1101])  # the last is reversed in two pieces
def test_the_factor_follows_the_order_and_leaves_the_hessian(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2 * size, size, generator=generator)
    hessian, order = x.T @ x, torch.randperm(size, generator=generator)
    before = hessian.clone()
    R, damp, notes = gptq.factor(hessian, order, 0.01)
    assert torch.equal(hessian, before) and (damp, notes) == (0.01, ())
    assert torch.equal(R, R.triu()) and R.T.is_contiguous()
    expected = hessian.double()[order][:, order]
    expected.diagonal().add_(0.01 * expected.diagonal().mean())
    error = (R.double() @ R.double().T - expected).abs().max() / expected.abs().max()
    assert error < size * torch.finfo(torch.float32).eps + 1e-6
