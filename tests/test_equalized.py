"""pytest tests/test_equalized.py: sizes moved between linears, against the formula in float64 and
what the layer computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import stop_after
from torch import Tensor

from calib.hidden import HiddenStates
from quant import QuantConfig, RunOptions, distributed, equalized, load_model, quantize_checkpoint
from quant.checkpoint import llama_config
from quant.equalized import equalize_, equalize_first_
from quant.geometry import linear_shapes
from quant.llama.config import LlamaConfig
from quant.llama.model import DecoderLayer
from quant.plan import job_of, make_plan
from quant.solvers.gptq_options import GPTQOptions
from quant.sources import open_checkpoint

Make = Callable[..., Path]
LLAMA = LlamaConfig(2080, 128, 256, 2, 4, 2, 32)


def layer_of(llama: LlamaConfig) -> DecoderLayer:
    """A random layer, some of whose value channels and neurons are far stronger than others."""
    torch.manual_seed(0)
    layer = DecoderLayer(llama)
    for writer in (layer.self_attn.v_proj, layer.mlp.up_proj):
        writer.weight.data *= torch.rand(len(writer.weight), 1).mul(6).exp()
    return layer.requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(3, 40, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_layer_computes_the_same(kv_heads: int, strength: float) -> None:
    layer, x = layer_of(replace(LLAMA, num_key_value_heads=kv_heads)), inputs()
    expected, before = layer(x), layer.self_attn.o_proj.weight.clone()
    equalize_(layer, x, None, strength)
    assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (layer.self_attn.o_proj.weight - before).abs().max() > 0.1 * before.abs().max()


def test_sizes_are_those_of_the_formula() -> None:
    layer, x = layer_of(LLAMA), inputs()
    attention, mlp = layer.self_attn, layer.mlp
    seen = attention.mix(layer.input_layernorm(x)).double()
    between = x + attention(layer.input_layernorm(x))
    read = mlp.mix(layer.post_attention_layernorm(between)).double()
    v, o = attention.v_proj.weight.double(), attention.o_proj.weight.double()
    up, down = mlp.up_proj.weight.double(), mlp.down_proj.weight.double()
    equalize_(layer, x, None, 0.5)

    c = (read.square().mean((0, 1)) / down.square().mean(0)).pow(0.25)
    c = (c / c.log().mean().exp()).clamp(0.125, 8)
    assert torch.allclose(mlp.up_proj.weight.double(), up / c[:, None], rtol=1e-5)
    assert torch.allclose(mlp.down_proj.weight.double(), down * c, rtol=1e-5)

    for kv in range(2):  # each read by two heads
        rows = slice(32 * kv, 32 * kv + 32)
        heads = [slice(32 * head, 32 * head + 32) for head in (2 * kv, 2 * kv + 1)]
        energy = sum(seen[..., head].square().sum((0, 1)) for head in heads)
        size = sum(o[:, head].square().sum(0) for head in heads)
        c = (energy / size).pow(0.25)
        found = v[rows] / attention.v_proj.weight.double()[rows]
        assert torch.allclose(found / found[:1], (c / c[:1])[:, None].expand_as(found), rtol=1e-4)
        for head in heads:
            moved = attention.o_proj.weight.double()[:, head] / o[:, head]
            assert torch.allclose(moved, found[:, 0].expand_as(moved), rtol=1e-4)


def test_padding_does_not_count() -> None:
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1:, 20:] = False
    left = [layer_of(LLAMA), layer_of(LLAMA)]
    for layer, filled in zip(left, (0.0, 100.0), strict=True):
        x = inputs()
        x[~mask] = filled
        equalize_(layer, x, mask, 0.5)
    assert torch.equal(left[0].mlp.up_proj.weight, left[1].mlp.up_proj.weight)
    assert torch.equal(left[0].self_attn.o_proj.weight, left[1].self_attn.o_proj.weight)


def test_linears_with_a_bias_and_neurons_that_are_off_are_left_alone() -> None:
    layer = layer_of(replace(LLAMA, attention_bias=True))
    before = layer.self_attn.v_proj.weight.clone()
    layer.mlp.up_proj.weight[3] = 0
    layer.mlp.down_proj.weight[:, 4] = 0
    equalize_(layer, inputs(), None, 0.5)
    assert torch.equal(layer.self_attn.v_proj.weight, before)
    assert all(torch.isfinite(weight).all() for weight in layer.parameters())


def test_a_checkpoint_of_equalized_layers_predicts_the_same(
    make_checkpoint: Make, tmp_path: Path, windows: Tensor
) -> None:
    """Read back, at 8 bits; the scales of up differ by the factors that moved."""
    made, config, errors, scales = make_checkpoint(), QuantConfig(8, 32), [], []
    expected = load_model(made, "cpu")(windows)
    for strength in (0.0, 0.5):
        folder = tmp_path / str(strength)
        solver = GPTQOptions(equalize=strength)
        quantize_checkpoint(made, folder, windows, config, solver)
        errors.append((load_model(folder, "cpu")(windows) - expected).norm() / expected.norm())
        scales.append(load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.scales"])
    assert errors[1] < 1.5 * errors[0] < 0.05
    assert not torch.equal(*scales)


def test_a_run_that_is_continued_gets_the_same(
    make_checkpoint: Make, tmp_path: Path, windows: Tensor
) -> None:
    """Though the float model's states are computed again; 8 bits show their last bits."""
    made, config = make_checkpoint(num_hidden_layers=3), QuantConfig(8, 32)
    solver, files = GPTQOptions(equalize=1.0, target=0.5, residual=0.5), []
    for stop in (None, 1, 2):
        folder, options = tmp_path / str(stop), RunOptions()
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                watch = RunOptions(on_step=stop_after(stop))
                quantize_checkpoint(made, folder, windows, config, solver, watch)
            options = RunOptions(resume=True)
        quantize_checkpoint(made, folder, windows, config, solver, options)
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_each_process_looks_at_its_part_of_the_first_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 2,048 tokens, 16 windows of 128, when each of three processes has 10 windows."""
    seen: list[int] = []
    monkeypatch.setattr(equalized, "equalize_", lambda layer, x, mask, _: seen.append(len(x)))
    monkeypatch.setattr(distributed, "total", lambda count: 3 * count)
    for rank in range(3):
        share = slice(10 * rank, 10 * rank + 10)
        monkeypatch.setattr(distributed, "share", lambda count, share=share: share)
        equalize_first_(layer_of(LLAMA), HiddenStates(10, 128, 128), None, 0.5)
    assert seen == [10, 6, 0]


def test_a_process_without_windows_adds_nothing() -> None:
    layer = layer_of(LLAMA)
    before = layer.mlp.down_proj.weight.abs().sum(0)
    equalize_(layer, inputs()[:0], None, 0.5)
    after = layer.mlp.down_proj.weight.abs().sum(0)
    assert torch.isfinite(after).all() and not torch.equal(before, after)  # by the columns alone


def test_the_plan_counts_the_tokens_that_are_looked_at(make_checkpoint: Make) -> None:
    """One more product with every weight of a layer."""
    reader = open_checkpoint(make_checkpoint())
    llama, flops = llama_config(reader), []
    for strength in (0.0, 0.25):
        solver = GPTQOptions(equalize=strength)
        job = job_of(reader, llama, QuantConfig(4, 32), (100, 64), solver)
        flops.append(make_plan(job).flops["forward"])
    weights = sum(rows * width for rows, width in linear_shapes(llama).values())
    assert flops[1] - flops[0] == 2 * 2 * weights * 2048
