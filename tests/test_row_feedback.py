"""pytest tests/test_row_feedback.py: rows that make up for each other's errors, against the
conditional optimum in float64; gradients against those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from calib.hidden import Storage
from quant import quantize_checkpoint
from quant.checkpoint import llama_config
from quant.config import QuantConfig
from quant.formats import autogptq
from quant.geometry import linear_shapes
from quant.grid import Grid, QuantizedTensor
from quant.group_solver import _among
from quant.llama import generate
from quant.llama.model import LINEAR_GROUPS
from quant.plan import make_plan
from quant.slopes import Slopes, backward, output_covariances
from quant.solvers import gptq, row_feedback
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.loss import Solution
from quant.solvers.row_feedback import solve_in_turn
from quant.sources import open_checkpoint
from quant.workload import Job, groups_of
from tests.test_solvers import problem

Make = Callable[..., Path]
CPU = torch.device("cpu")


def whole(rows: Tensor) -> Solution:
    """Every value rounded to a whole number."""
    grid = Grid(torch.ones(len(rows), 1), torch.full((len(rows), 1), 8, dtype=torch.uint8), 4)
    codes = rows.round().add(8).clamp(0, 15).to(torch.uint8)
    return Solution(QuantizedTensor(codes, grid), 0.25, ("a note",))


def conditional_optimum(weight: Tensor, fisher: Tensor, step: int) -> Tensor:
    """Codes by the definition: whatever the rows before lost, the rows to come, could they be any
    numbers, would best be w + G_rr^-1 G_rb E_b.
    """
    G = fisher.double()
    order = G.diagonal().argsort(descending=True)
    G = G + G.diagonal().diag()  # shrunk by half, times two
    G = G[order][:, order] + 0.01 * G.diagonal().mean() * torch.eye(len(G))
    w = weight.double()[order]
    values = torch.empty_like(w)
    for start in range(0, len(w), step):
        left = slice(start, None)
        errors = w[:start] - values[:start]
        best = w[left] + torch.linalg.solve(G[left, left], G[left, :start] @ errors)
        values[start : start + step] = best[:step].round().clamp(-8, 7)
    return (values + 8)[order.argsort()].to(torch.uint8)


def correlated(tokens: int, rows: int, seed: int) -> Tensor:
    """Of gradients that have much to do with each other, of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, rows, generator=generator)
    own = 0.3 * torch.randn(tokens, rows, generator=generator)
    slopes = (mixed + own) * torch.rand(rows, generator=generator)
    return slopes.T @ slopes


@pytest.mark.parametrize(("blocks", "least"), [(1000, 1), (4, 1), (64, 16)])
def test_rows_see_what_the_rows_before_lost(
    blocks: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_feedback, "_BLOCKS", blocks)
    monkeypatch.setattr(row_feedback, "_LEAST", least)
    weight = 2 * torch.randn(70, 12, generator=torch.Generator().manual_seed(0))
    fisher = [correlated(200, 40, 1), correlated(200, 30, 2)]
    solution = solve_in_turn(weight, fisher, whole)
    for rows, of_linear in ((slice(40), fisher[0]), (slice(40, 70), fisher[1])):
        step = max(least, -(-len(of_linear) // blocks))
        expected = conditional_optimum(weight[rows], of_linear, step)
        assert (solution.tensor.codes[rows] != expected).float().mean() < 0.005  # near ties
    assert solution.losses is None and solution.energies is None
    assert solution.damp == 0.25 and solution.notes == ("a note",)


def test_unrelated_outputs_change_nothing() -> None:
    weight, hessian = problem(48, 96, 3)
    options = GPTQOptions(scales="signed", shrink=0.25, sweeps=1, refits=1)
    sizes = torch.rand(48, generator=torch.Generator().manual_seed(0)).add(0.5)
    fisher = [sizes[:20].diag(), sizes[20:].diag()]
    for config in (QuantConfig(4, 32), QuantConfig(3, 32, False)):
        alone = gptq.solve(weight, hessian, config, options).tensor
        tensor = gptq.solve(weight, hessian, config, options, fisher).tensor
        assert torch.equal(tensor.codes, alone.codes)
        assert torch.equal(tensor.grid.scales, alone.grid.scales)
        assert torch.equal(tensor.grid.zeros, alone.grid.zeros)


def test_what_predictions_lose_falls() -> None:
    weight, hessian = problem(96, 64, 3)
    fisher = correlated(500, 96, 0)
    G, H = fisher.double(), hessian.double()
    losses = []
    for given in (None, [fisher]):
        options = GPTQOptions(scales="weighted")
        tensor = gptq.solve(weight, hessian, QuantConfig(4, 32), options, given).tensor
        error = weight.double() - tensor.dequantize().double()
        losses.append(torch.trace(G @ error @ H @ error.T))
    assert losses[1] < 0.7 * losses[0]


def test_outputs_without_gradients_are_told() -> None:
    weight, hessian = problem(32, 64, 3)
    fisher = correlated(500, 32, 0)
    fisher[5], fisher[:, 5] = 0, 0
    solution = gptq.solve(weight, hessian, QuantConfig(4, 32), GPTQOptions(), [fisher])
    assert solution.notes == ("between rows: 1 of 32 channels are never active",)


def through_transformers(
    folder: Path, windows: Tensor, mask: Tensor, drawn: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of layers and linears, and the gradients to their outputs, by name in float64.

    `drawn` (windows, tokens, 1): ids drawn from the predictions, if not the first of the seed.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, given: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            inputs[name], outputs[name] = given[0].detach(), output

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj") or name.removeprefix("model.layers.").isdigit():
            module.register_forward_hook(keep(name))
    log_p = model(windows).logits.log_softmax(-1)
    if drawn is None:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(*log_p.shape[:2], 1, generator=generator)
        drawn = (log_p.detach().exp().cumsum(-1) <= numbers).sum(-1, keepdim=True)
    (-log_p.gather(2, drawn)[..., 0] * mask).sum().backward()
    return inputs, {name: output.grad for name, output in outputs.items()}


def test_gradients_are_those_of_transformers(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    """Padding, here at the end of the last window, has none."""
    folder = make_checkpoint()
    reader = open_checkpoint(folder)
    llama = llama_config(reader)
    mask = torch.ones(windows.shape, dtype=torch.bool)
    mask[-1, 9:] = False
    inputs, slopes_there = through_transformers(folder, windows, mask)
    slopes = Slopes(llama, (len(windows), windows.shape[1]), Storage(spill=tmp_path))
    steps = list(backward(reader, llama, (windows, mask), slopes, CPU, lambda layer: 7))
    assert [(index, seven) for index, _, seven in steps] == [(1, 7), (0, 7)]
    for index, layer, _ in steps:
        name = f"model.layers.{index}"
        slope = slopes.read(index + 1)
        assert (slope[-1, 9:] == 0).all()
        close(slope, slopes_there[name])
        found = output_covariances(layer, inputs[name].float(), slope)
        assert found.keys() == {linear for group in LINEAR_GROUPS for linear in group}
        for linear, covariance in found.items():
            g = slopes_there[f"{name}.{linear}"].flatten(0, 1)
            close(covariance, g.T @ g)


def test_the_pipeline_takes_the_gradients_of_each_layer(
    make_checkpoint: Make, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tr G E H E^T of the first layer's q, with G and H by transformers, is what the solver reaches
    given these and the same draws: codes differ, since bfloat16 decides some ties and others
    follow.
    """
    folder, config, ids = make_checkpoint(), QuantConfig(4, 32), []

    def drawn(*given: Tensor) -> Tensor:
        ids.append(generate.drawn(*given))
        return ids[-1]

    monkeypatch.setattr("quant.slopes.drawn", drawn)
    out, options = folder.parent / "out", GPTQOptions(fisher=3 * windows.shape[1] + 1)
    quantize_checkpoint(folder, out, windows, config, options)
    name = "model.layers.0.self_attn.q_proj"
    mask = torch.ones(3, windows.shape[1])
    _, slopes = through_transformers(folder, windows[:3], mask, torch.stack(ids))
    inputs, _ = through_transformers(folder, windows, torch.ones(windows.shape))
    g, x = slopes[name].flatten(0, 1), inputs[name].flatten(0, 1)
    G, H = g.T @ g, x.T @ x
    weight = open_checkpoint(folder).tensor(f"{name}.weight").float()
    found = dict(autogptq.read(open_checkpoint(out)))[name]
    both = (gptq.solve(weight, H.float(), config, options, f).tensor for f in ([G.float()], None))
    losses = []
    for tensor in (found, *both):
        error = weight.double() - tensor.dequantize().double()
        losses.append(torch.trace(G @ error @ H @ error.T).item())
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0] < 0.8 * losses[2]


def test_rows_of_a_stack_keep_what_they_have_to_do_with_each_other() -> None:
    fisher = [torch.arange(size**2).view(size, size) for size in (3, 4, 2)]
    assert [G.tolist() for G in _among(fisher, slice(0, 9))] == [G.tolist() for G in fisher]
    among = _among(fisher, slice(2, 6))
    assert [G.tolist() for G in among] == [[[8]], fisher[1][:3, :3].tolist()]
    assert [G.tolist() for G in _among(fisher, slice(7, 9))] == [fisher[2].tolist()]


def close(found: Tensor, expected: Tensor) -> None:
    """float32 against float64."""
    assert (found.double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_plan_counts_gradients(make_checkpoint: Make) -> None:
    """Of tokens in whole windows, not more than there are; in a file, so not in memory."""
    llama = llama_config(open_checkpoint(make_checkpoint()))
    plain = Job(llama, QuantConfig(4, 32), 8, 64, 2, beside=True, sweeps=1, refits=1)
    shapes = linear_shapes(llama).values()
    weights, layers = sum(rows * width for rows, width in shapes), llama.num_hidden_layers
    square = sum(group.rows * group.width**2 for group in groups_of(llama))
    for asked, tokens in ((300, 256), (10_000, 512), (1, 64)):
        one, more = make_plan(plain), make_plan(replace(plain, fisher=asked))
        back = 10 * weights + sum(rows**2 for rows, _ in shapes)
        head = 4 * llama.vocab_size * llama.hidden_size
        assert more.flops["gradients"] == tokens * (layers * back + head)
        moved = square + sum(rows**2 * width for rows, width in shapes)
        assert more.flops["solve"] - one.flops["solve"] == layers * moved
        assert more.slopes == 2 * (layers + 1) * tokens * llama.hidden_size
        assert more.disk - one.disk == more.slopes
        logits = 3 * 4 * 64 * llama.vocab_size + 6 * llama.vocab_size * llama.hidden_size
        layer = 4 * (weights + 16 * tokens * llama.intermediate_size)
        gradients = max(logits, layer) + 8 * sum(rows**2 for rows, _ in shapes)
        assert 0 < more.memory - one.memory <= gradients
        assert more.cost > one.cost


def test_a_number_of_tokens_is_checked() -> None:
    with pytest.raises(ValueError, match="fisher -1 is out of range; it is a number of tokens"):
        GPTQOptions(fisher=-1)
