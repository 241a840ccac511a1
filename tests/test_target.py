"""pytest tests/test_target.py: the weight that aims at the float model's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib import capture
from calib.hessian import Hessian
from calib.hidden import HiddenStates
from quant import QuantConfig, quantize_checkpoint
from quant.group_solver import solve_group
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer
from quant.plan import make_plan
from quant.run_options import RunOptions, Step
from quant.solvers import gptq
from quant.solvers.gptq_options import EFFORTS, GPTQOptions
from quant.solvers.target import towards_float
from quant.sources import open_checkpoint
from quant.workload import Job, groups_of


@pytest.fixture
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


def inputs(tokens: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 weight, input, and the float model's input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    original = x + 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    return torch.randn(5, columns, generator=generator, dtype=torch.float64), x, original


def test_equals_ridge_regression_on_8_columns() -> None:
    """V minimises |W x~ - V x|^2 + l |V - W|^2, solved as one least-squares problem."""
    weight, x, original = inputs(100, 8)
    H, drift = x.T @ x, (original - x).T @ x
    root = (0.3 * H.diagonal().mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    wanted = torch.cat([original @ weight.T, root @ weight.T])
    best = torch.linalg.lstsq(torch.cat([x, root]), wanted).solution.T
    assert torch.allclose(towards_float(weight, H, weight @ drift), best, atol=1e-10)


def test_the_residual_is_made_up_for_on_8_columns() -> None:
    """V minimises |W x~ + h~ - V x - h|^2 + l |V - W|^2, as one least-squares problem."""
    weight, x, original = inputs(100, 8)
    behind = torch.randn(100, 5, generator=torch.Generator().manual_seed(1)).double()
    H, drift, lag = x.T @ x, (original - x).T @ x, behind.T @ x
    root = (0.3 * H.diagonal().mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    wanted = torch.cat([original @ weight.T + behind, root @ weight.T])
    best = torch.linalg.lstsq(torch.cat([x, root]), wanted).solution.T
    assert torch.allclose(towards_float(weight, H, weight @ drift + lag), best, atol=1e-10)


def test_outputs_come_closer_to_those_of_the_float_model() -> None:
    weight, x, original = inputs(400, 32)
    H, drift = x.T @ x, (original - x).T @ x
    aims = [towards_float(weight, H, a * weight @ drift) for a in (0, 0.25, 0.5, 0.75, 1)]
    distances = [(original @ weight.T - x @ aim.T).square().sum().item() for aim in aims]
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0]


def test_no_drift_and_no_activity_change_nothing() -> None:
    weight, x, _ = inputs(40, 8)
    zero = torch.zeros(8, 8, dtype=torch.float64)
    assert torch.equal(towards_float(weight, x.T @ x, weight @ zero), weight)
    assert torch.equal(towards_float(weight, zero, weight @ zero), weight)


def test_a_nearly_singular_hessian_is_solved() -> None:
    x = torch.full((1, 600), 1e6)
    moved = towards_float(torch.ones(2, 600), x.T @ x, 0.05 * torch.ones(2, 600) @ (x.T @ x))
    assert torch.isfinite(moved).all()


def test_drift_leaves_out_padding_and_merges() -> None:
    _, x, original = (t.float() for t in inputs(30, 8))
    mask = torch.arange(30) < 20
    whole, first, second = Hessian(8), Hessian(8), Hessian(8)
    whole.add(x, mask, original)
    first.add(x[:11], None, original[:11])
    second.add(x[11:20], None, original[11:20])
    first.merge(second)
    assert whole.drift is not None and first.drift is not None
    assert torch.allclose(whole.drift, (original[:20] - x[:20]).T @ x[:20], atol=1e-4)
    assert torch.allclose(whole.drift, first.drift, atol=1e-4)
    assert whole.tokens == first.tokens == 20


def test_lag_leaves_out_padding_and_merges() -> None:
    _, x, original = (t.float() for t in inputs(30, 8))
    behind, mask = original[:, :3], torch.arange(30) < 20
    whole, merged = Hessian(8), Hessian(8)
    whole.add_lag(x, behind, mask)
    for rows in (slice(0, 11), slice(11, 20)):
        part = Hessian(8)
        part.add_lag(x[rows], behind[rows])
        merged.merge(part)
    assert whole.lag is not None and merged.lag is not None
    assert torch.allclose(whole.lag, behind[:20].T @ x[:20], atol=1e-4)
    assert torch.allclose(whole.lag, merged.lag, atol=1e-4)


def test_walk_beside_sees_both_models(tiny_checkpoint: Path) -> None:
    """Drifts equal those of two separate walks; the float stream ends where a plain one does."""
    torch.manual_seed(0)
    llama = LlamaConfig.from_dict(open_checkpoint(tiny_checkpoint).config)
    layer = DecoderLayer(llama)
    hidden, other = torch.randn(5, 40, llama.hidden_size), torch.randn(5, 40, llama.hidden_size)

    def states(values: Tensor, in_place: bool = False) -> HiddenStates:
        filled = HiddenStates(5, 40, llama.hidden_size, in_place=in_place)
        filled.set_windows(values)
        return filled

    def rows(walked: DecoderLayer, values: Tensor) -> list[Tensor]:
        seen = capture._stages(walked, states(values), "cpu", capture.Budget())
        return [torch.cat([x for _, x in batches]).flatten(0, 1) for _, batches in seen]

    with torch.inference_mode():
        mine, theirs = states(hidden), states(other, in_place=True)
        walking = capture.walk(layer, mine, beside=(copy.deepcopy(layer), theirs))
        drifts, lags = zip(*((hessian.drift, hessian.lag) for hessian in walking), strict=True)
        plain = states(other)
        capture.advance(layer, plain)
        assert torch.equal(theirs.output(), plain.output())
        assert torch.allclose(plain.output(), layer(other), atol=1e-4)
        assert len(drifts) == len(LINEAR_GROUPS) and drifts[3] is None
        pairs = zip(rows(layer, hidden), rows(layer, other), drifts[:3], strict=False)
        for x, original, drift in pairs:
            assert drift is not None
            assert torch.allclose(drift, (original - x).T @ x, atol=1e-2, rtol=1e-4)
        mids = [h + layer.self_attn(layer.input_layernorm(h)) for h in (other, hidden)]
        for stage, behind in ((1, other - hidden), (3, mids[0] - mids[1])):
            x, lag = rows(layer, hidden)[stage], lags[stage]
            assert lag is not None and lags[stage - 1] is None
            assert torch.allclose(lag, behind.flatten(0, 1).T @ x, atol=1e-2, rtol=1e-4)


def quantized(checkpoint: Path, folder: Path, options: GPTQOptions) -> dict[str, Tensor]:
    windows = torch.randint(0, 2000, (8, 64), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(checkpoint, folder, windows, QuantConfig(4, 32), options)
    reader = open_checkpoint(folder)
    return {name: reader.tensor(name).clone() for name in reader.names()}


def test_pipeline_aims_where_there_is_drift(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The first linears see what the float model sees, so the target is their own weight."""
    aimed = quantized(tiny_checkpoint, tmp_path / "a", GPTQOptions(target=0.5))
    plain = quantized(tiny_checkpoint, tmp_path / "b", GPTQOptions(target=0))
    again = quantized(tiny_checkpoint, tmp_path / "c", GPTQOptions(target=0.5))
    first = "model.layers.0.self_attn.{}_proj.qweight"
    for name in "qkv":
        assert torch.equal(aimed[first.format(name)], plain[first.format(name)])
    for name in ("layers.0.self_attn.o", "layers.1.self_attn.q", "layers.1.mlp.up"):
        key = f"model.{name}_proj.qweight"
        assert not torch.equal(aimed[key], plain[key])
    assert all(torch.equal(aimed[name], again[name]) for name in aimed)


def test_pipeline_makes_up_for_the_residual(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """down_proj of the first layer aims elsewhere, and nothing before it: h~ = h, and no drift."""
    aimed = quantized(tiny_checkpoint, tmp_path / "a", GPTQOptions(residual=1))
    plain = quantized(tiny_checkpoint, tmp_path / "b", GPTQOptions())
    for name in aimed:
        if name.endswith("qweight"):
            later = "layers.1" in name or "down" in name
            assert torch.equal(aimed[name], plain[name]) != later, name


def test_off_is_plain_gptq(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all improvements off none of their code runs: test_solvers compares with OBQ."""

    def never(*_: object) -> None:
        raise AssertionError("an improvement ran")

    monkeypatch.setattr("quant.group_solver.towards_float", never)
    monkeypatch.setattr("quant.layer_loop.original_states", never)
    monkeypatch.setattr(gptq, "fit_weighted", never)
    quantized(tiny_checkpoint, tmp_path / "a", GPTQOptions(scales="minmax", target=0))
    with pytest.raises(AssertionError, match="an improvement ran"):
        quantized(tiny_checkpoint, tmp_path / "b", GPTQOptions(scales="minmax", target=1))


def test_the_report_judges_by_what_was_aimed_at(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Far aims leave the weight for good reason; that is no error above round-to-nearest's."""
    windows = torch.randint(0, 2000, (8, 64), generator=torch.Generator().manual_seed(0))
    config, options = QuantConfig(4, 32), GPTQOptions(target=1, residual=1)
    report = quantize_checkpoint(tiny_checkpoint, tmp_path / "a", windows, config, options)
    further = [one for one in report.linears if one.relative_error > one.rtn_relative_error]
    assert further and not any("round-to-nearest" in line for line in report.warnings)
    worse = replace(report.linears[0], aim_error=0.2, rtn_aim_error=0.1)
    assert "error towards its aim 0.2 is above round-to-nearest's 0.1" in worse.warnings[0]
    plain = replace(worse, aim_error=None, relative_error=0.3, rtn_relative_error=0.1)
    assert "relative error 0.3 is above round-to-nearest's 0.1" in plain.warnings[0]


def test_errors_towards_the_aim_are_distances_from_it() -> None:
    weight, x, original = (t.float() for t in inputs(200, 32))
    statistics = Hessian(32)
    statistics.add(x, None, original)
    options = GPTQOptions(target=1)
    (one,) = solve_group([weight], statistics, QuantConfig(4, 32), options)
    H = statistics.matrix.double()
    aim = towards_float(weight, statistics.matrix, weight @ (original - x).T @ x).double()
    energy = (weight.double() @ H * weight).sum()
    for wanted, error in ((weight.double(), one.error), (aim, one.aim_errors[0])):
        away = wanted - one.tensor.dequantize(torch.float64)
        assert error == pytest.approx(((away @ H * away).sum() / energy).item(), rel=1e-3)
    assert one.error > one.aim_errors[0]
    (one,) = solve_group([weight], statistics, QuantConfig(4, 32), GPTQOptions())
    assert one.aim_errors == ()


@pytest.mark.parametrize("name", ["target", "residual"])
def test_shares_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 1.5 is out of range"):
        GPTQOptions(**{name: 1.5})


def test_plan_counts_the_second_stream(tiny_checkpoint: Path) -> None:
    llama = LlamaConfig.from_dict(open_checkpoint(tiny_checkpoint).config)
    job = Job(llama, QuantConfig(4, 32), 8, 64, 2)
    one, two = make_plan(job), make_plan(replace(job, beside=True))
    assert two.flops["forward"] == 2 * one.flops["forward"]
    widths = (llama.hidden_size,) * 3
    more = sum(2 * width**2 * job.tokens for width in widths)
    joining = llama.num_attention_heads * llama.head_dim + llama.intermediate_size
    more += 2 * llama.hidden_size * joining * job.tokens
    more *= llama.num_hidden_layers
    assert two.flops["Hessian"] - one.flops["Hessian"] == more
    assert two.memory - one.memory >= one.states
    assert two.flops["Cholesky"] == 2 * one.flops["Cholesky"]
    swept = make_plan(replace(job, sweeps=2, refits=1))
    told = 1  # times r n^2: the energy of W, which the refit tells
    assert swept.flops["solve"] / one.flops["solve"] == pytest.approx((3 + 2 * 2 + 3 - told) / 3)
    square = sum(group.rows * group.width**2 for group in groups_of(llama))
    plain = square - groups_of(llama)[-1].rows * llama.intermediate_size**2
    extra = (2 * square + 2 * plain + 2 * square) * llama.num_hidden_layers
    assert two.flops["solve"] - one.flops["solve"] == pytest.approx(extra)


def test_efforts_are_what_their_names_say() -> None:
    fast = GPTQOptions(scales="signed", shrink=0.25, sink=0.2, sweeps=1, refits=1)
    assert EFFORTS["fast"] == fast and not fast.needs_float
    assert EFFORTS["balanced"] == replace(fast, sink=0, target=0.5, residual=0.5)
    more = {"target": 1, "sweeps": 3, "refits": 3, "fisher": 16384, "own": 64, "equalize": 0.25}
    assert EFFORTS["max"] == replace(EFFORTS["balanced"], **more)


@pytest.mark.parametrize("more", [{}, {"fisher": 128}])
def test_a_resumed_run_aims_at_the_same_target(
    make_checkpoint: Callable[..., Path], more: dict[str, int]
) -> None:
    """The float stream and gradients are not kept on the disk; they are computed again, to the same
    bytes.
    """
    source = make_checkpoint(num_hidden_layers=3)
    windows = torch.randint(0, 2000, (8, 64), generator=torch.Generator().manual_seed(0))
    config, options = QuantConfig(4, 32), GPTQOptions(target=0.5, **more)
    quiet, out = source.parent / "quiet", source.parent / "out"
    quantize_checkpoint(source, quiet, windows, config, options)

    def stop(step: Step) -> None:
        if step.layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, windows, config, options, RunOptions(on_step=stop))
    layers: list[int] = []
    going_on = RunOptions(resume=True, on_step=lambda step: layers.append(step.layer))
    quantize_checkpoint(source, out, windows, config, options, going_on)
    assert set(layers) <= {1, 2} and 2 in layers
    mine, same = open_checkpoint(out), open_checkpoint(quiet)
    assert all(torch.equal(mine.tensor(name), same.tensor(name)) for name in same.names())
