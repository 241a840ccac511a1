"""pytest tests/test_pipeline.py: a checkpoint in, a quantized one out, loaded and judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import (
    QuantConfig,
    RunOptions,
    evaluate,
    load_model,
    load_quantized,
    quantize_checkpoint,
)
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.kernels import choose
from quant.solvers import SOLVERS
from quant.sources import open_checkpoint

Make = Callable[..., Path]


def entries(folder: Path) -> dict[str, Any]:
    return dict(FORMATS["autogptq"].read(open_checkpoint(folder)))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_load_and_compare(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, symmetric: bool, solver: str
) -> None:
    source, output = make_checkpoint(), tmp_path / "out"
    steps: list[Any] = []
    config = QuantConfig(4, 64, symmetric)
    options, watch = SOLVERS[solver][1](), RunOptions(on_step=steps.append)
    report = quantize_checkpoint(source, output, windows, config, options, watch)
    assert len(steps) == 8 and len(report.linears) == 14
    assert all(linear.tokens == windows.numel() for linear in report.linears)
    stored = json.loads((output / "quantize_report.json").read_text())
    assert stored["linears"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert {"tokenizer.model", "config.json", "quantize_config.json"} <= {
        p.name for p in output.iterdir()
    }
    model, tokenizer = load_quantized(output, device="cpu", precision="exact")
    dense = load_model(source, device="cpu")
    for name, value in entries(output).items():
        if isinstance(value, QuantizedTensor):
            dense.get_submodule(name).weight = torch.nn.Parameter(
                value.dequantize(), requires_grad=False
            )
    expected, actual = dense(windows), model(windows)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert tokenizer.decode(tokenizer.encode("def f():")) == "def f():"


def test_gptq_loses_less_than_rounding(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    report = quantize_checkpoint(make_checkpoint(), tmp_path / "out", windows, QuantConfig(3, 32))
    assert all(linear.relative_error < linear.rtn_relative_error for linear in report.linears)
    assert report.warnings == []


def test_padding_changes_nothing(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, config = make_checkpoint(), QuantConfig(4, 64)
    quantize_checkpoint(source, tmp_path / "plain", windows, config)
    padded = torch.cat([windows, torch.full((8, 9), 7)], dim=1)
    mask = torch.cat([torch.ones(8, 64), torch.zeros(8, 9)], dim=1)
    report = quantize_checkpoint(source, tmp_path / "padded", padded, config, attention_mask=mask)
    assert report.linears[0].tokens == windows.numel()
    plain, masked = entries(tmp_path / "plain"), entries(tmp_path / "padded")
    name = "model.layers.0.self_attn.q_proj"
    assert (plain[name].codes != masked[name].codes).float().mean() < 0.001  # summation order only
    with pytest.raises(ValueError, match="padding must be on the right"):
        quantize_checkpoint(source, tmp_path / "x", padded, config, attention_mask=mask.flip(1))
    with pytest.raises(
        ValueError, match=r"attention_mask: shape \(8, 64\), but windows have \(8, 73\)"
    ):
        quantize_checkpoint(source, tmp_path / "x", padded, config, attention_mask=mask[:, :64])


def test_tied_head_bfloat16_and_too_few_tokens(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source = make_checkpoint(dtype=torch.bfloat16, tie_word_embeddings=True)
    report = quantize_checkpoint(source, tmp_path / "out", windows[:1], QuantConfig(4, 32))
    few = [line for line in report.warnings if "calibration tokens" in line]
    assert few == [
        "model.layers.0.self_attn.q_proj: 64 calibration tokens for 128 inputs; use more --samples",
        "13 more linears have fewer calibration tokens than inputs",
    ]
    assert "lm_head.weight" not in entries(tmp_path / "out")
    model, _ = load_quantized(tmp_path / "out", device="cpu")
    assert model.lm_head.weight.dtype == torch.bfloat16 and torch.isfinite(model(windows)).all()


def damage(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shard in folder.glob("*.safetensors"):
        state = load_file(shard)
        if name in state:
            state[name] = change(state[name])
            save_file(state, shard)


def spoil(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 4] = torch.nan
    return weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil, "model.layers.1.mlp.up_proj.weight: holds NaN or inf"),
        (
            lambda w: w[:100],
            r"up_proj.weight: shape \(100, 128\) in the file, \(256, 128\) by config.json",
        ),
    ],
)
def test_damaged_weights_are_named(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, change: Any, message: str
) -> None:
    source = make_checkpoint()
    damage(source, "model.layers.1.mlp.up_proj.weight", change)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", windows, QuantConfig(4, 64))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_damage_outside_the_layers_is_named_before_they_are_worked_on(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, name: str
) -> None:
    steps: list[Any] = []

    def run() -> None:
        options = RunOptions(on_step=steps.append)
        quantize_checkpoint(
            source, tmp_path / "out", windows, QuantConfig(4, 64), run_options=options
        )

    source = make_checkpoint()
    damage(source, name, lambda w: w.index_fill(0, torch.tensor([-1 % len(w)]), torch.inf))
    with pytest.raises(ValueError, match=f"{name}: holds NaN or inf"):
        run()
    damage(source, name, lambda w: w[:100])
    with pytest.raises(ValueError, match=rf"{name}: shape \(100.* in the file, .* by config.json"):
        run()
    assert not steps and [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_overflow_names_the_module(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source = make_checkpoint(dtype=torch.float32)
    damage(source, "model.layers.1.input_layernorm.weight", lambda w: w * 1e30)
    with pytest.raises(
        ValueError, match="model.layers.1.self_attn.q_proj: its input is not finite"
    ):
        quantize_checkpoint(source, tmp_path / "out", windows, QuantConfig(4, 64))


def test_settings_and_data_are_checked(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    with pytest.raises(ValueError, match="in_features 128 is not divisible by group_size 96"):
        quantize_checkpoint(source, out, windows, QuantConfig(4, 96))
    with pytest.raises(ValueError, match="solver 'x' is unknown; give one of GPTQOptions"):
        quantize_checkpoint(source, out, windows, solver="x")
    with pytest.raises(ValueError, match="token id 2080 is outside the model's vocabulary of 2080"):
        quantize_checkpoint(source, out, windows * 0 + 2080)
    with pytest.raises(ValueError, match="calibration windows: shape"):
        quantize_checkpoint(source, out, windows[0])
    odd = make_checkpoint("odd", intermediate_size=272)
    with pytest.raises(ValueError, match="cannot be packed; the GPTQ format needs multiples of 32"):
        quantize_checkpoint(odd, out, windows, QuantConfig(4, -1))
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        quantize_checkpoint(source, out, windows)


def test_quantizing_twice_is_refused_and_overwriting_is_whole(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    quantize_checkpoint(source, out, windows, QuantConfig(4, 64))
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_checkpoint(out, tmp_path / "again", windows)
    quantize_checkpoint(
        source, out, windows, QuantConfig(8, 64), run_options=RunOptions(overwrite=True)
    )
    assert entries(out)["model.layers.0.mlp.up_proj"].bits == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_stays_where_no_layer_was_finished(
    make_checkpoint: Make,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    source = make_checkpoint()

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("quant.checkpoint_writer.save_file", fail)
    with pytest.raises(type(error)):
        quantize_checkpoint(source, tmp_path / "out", windows, QuantConfig(4, 64))
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_what_was_written_is_read_back(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FORMATS["autogptq"].Writer
    original = writer.add_quantized

    def flip(self: Any, name: str, qt: QuantizedTensor) -> None:  # what a bad disk does
        codes = qt.codes.clone()
        codes[0, 0] ^= name.endswith("1.mlp.down_proj")
        original(self, name, replace(qt, codes=codes))

    monkeypatch.setattr(writer, "add_quantized", flip)
    with pytest.raises(OSError, match="model.layers.1.mlp.down_proj differs from what was written"):
        quantize_checkpoint(make_checkpoint(), tmp_path / "out", windows, QuantConfig(4, 64))


def test_loading_is_checked(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(ValueError, match="not a quantized checkpoint"):
        load_quantized(source)
    with pytest.raises(ValueError, match="backend 'x' is unknown"):
        choose("cpu", "x")
    damage(source, "model.norm.weight", lambda w: w[:5])
    with pytest.raises(
        ValueError, match=r"model.norm.weight: shape \(5,\) in the file, \(128,\) by config.json"
    ):
        load_model(source, device="cpu")


def test_evaluation_by_a_literal_formula(make_checkpoint: Make) -> None:
    model, other = (
        load_model(make_checkpoint()),
        load_model(make_checkpoint("b", dtype=torch.bfloat16)),
    )
    ids = torch.randint(0, 2048, (330,), generator=torch.Generator().manual_seed(0))
    result = evaluate(model, ids, 100, other)
    losses, other_losses, divergences, same = [], [], [], []
    for start in (0, 100, 200):
        window = ids[start : start + 100]
        p, q = (m(window[None])[0, :-1].double().log_softmax(-1) for m in (model, other))
        losses.append(-p[range(99), window[1:]].mean().item())
        other_losses.append(-q[range(99), window[1:]].mean().item())
        divergences.append((q.exp() * (q - p)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert math.isclose(result.perplexity, math.exp(sum(losses) / 3), rel_tol=1e-6)
    assert (result.windows, result.scored_tokens) == (3, 297)
    against = result.reference
    assert against is not None
    differences = torch.tensor(losses) - torch.tensor(other_losses)
    assert math.isclose(
        against.nll_difference_standard_error, differences.std().item() / 3**0.5, rel_tol=1e-2
    )
    assert math.isclose(against.kl_mean, torch.cat(divergences).mean().item(), rel_tol=1e-3)
    assert math.isclose(
        against.kl_99th_percentile, torch.cat(divergences).sort().values[294].item(), rel_tol=1e-3
    )
    assert math.isclose(
        against.top1_agreement, torch.cat(same).double().mean().item(), rel_tol=1e-6
    )
    with pytest.raises(ValueError, match="330 tokens are fewer than one window of 400"):
        evaluate(model, ids, 400)
    with pytest.raises(ValueError, match="token id 9999 is outside"):
        evaluate(model, ids * 0 + 9999, 100)


def test_gptqmodel_loads_the_same_weights(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")  # installed by those who compare, not by CI
    quantize_checkpoint(make_checkpoint(), tmp_path / "out", windows, QuantConfig(4, 64))
    torch_backend = gptqmodel.BACKEND.TORCH
    theirs = gptqmodel.GPTQModel.load(
        str(tmp_path / "out"), device="cpu", backend=torch_backend, dtype=torch.float16
    )
    modules = dict(theirs.model.named_modules())
    ours = {k: v for k, v in entries(tmp_path / "out").items() if isinstance(v, QuantizedTensor)}
    assert len(ours) == 14
    for name, qt in ours.items():
        assert torch.equal(modules[name].dequantize_weight().T, qt.dequantize(torch.float16))
