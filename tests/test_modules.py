"""pytest tests/test_modules.py: linears with a grid of their own, the head among them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quant.config import QuantConfig
from quant.export import export
from quant.formats import autogptq
from quant.formats.gptq_rules import dynamic_rules
from quant.geometry import check_shapes, stored_bytes
from quant.grid import QuantizedTensor
from quant.inspection import describe, will_it_load
from quant.llama.config import LlamaConfig
from quant.loader import load_model
from quant.pipeline import quantize_checkpoint
from quant.run_options import RunOptions, Step
from quant.sources import open_checkpoint
from tests.test_cli import cli

Make = Callable[..., Path]
LAYER = "model.layers.1."
QKV = tuple(f"{LAYER}self_attn.{name}_proj" for name in "qkv")
DOWN = f"{LAYER}mlp.down_proj"
EIGHT, THREE = QuantConfig(8, 64), QuantConfig(3, 32)
MODULES = (*((name, EIGHT) for name in QKV), (DOWN, THREE), ("lm_head", EIGHT))
MIXED = QuantConfig(4, 64, modules=MODULES)


@pytest.fixture
def source(make_checkpoint: Make) -> Path:
    return make_checkpoint()


@pytest.fixture
def mixed(source: Path, windows: torch.Tensor, tmp_path: Path) -> Path:
    quantize_checkpoint(source, tmp_path / "mixed", windows, MIXED)
    return tmp_path / "mixed"


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantize_config.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def overridden(rules: dict[str, dict[str, int]], name: str) -> dict[str, int]:
    """What a reader that takes the first matching rule finds for a module."""
    for pattern, values in rules.items():
        if re.match(pattern.removeprefix("+:"), name):
            return values
    return {}


def plain_reader(file: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """(out, in) of a linear of version 1 by a literal formula; not for 3 bits."""
    words, zero_words = (file[f"{name}.{s}"].numpy().view(np.uint32) for s in ("qweight", "qzeros"))
    many, mask = 32 // bits, 2**bits - 1
    codes = np.stack(
        [words[k // many] >> bits * (k % many) & mask for k in range(len(words) * many)]
    )
    zeros = np.stack(
        [zero_words[:, n // many] >> bits * (n % many) & mask for n in range(codes.shape[1])], 1
    )
    group = file[f"{name}.g_idx"].numpy()
    scales = file[f"{name}.scales"].float().numpy()
    return torch.from_numpy(scales[group] * (codes - (zeros[group] + 1.0))).T.float()


def test_every_linear_is_stored_on_its_own_grid(mixed: Path) -> None:
    read = dict(autogptq.read(open_checkpoint(mixed)))
    linears = {name: qt for name, qt in read.items() if isinstance(qt, QuantizedTensor)}
    assert len(linears) == 15 and "lm_head.weight" not in read
    for name, qt in linears.items():
        assert qt.bits == MIXED.of(name).bits
        assert qt.in_features // qt.grid.scales.shape[1] == MIXED.of(name).group_size
    file = tensors(mixed)
    for name in (*QKV, "lm_head", f"{LAYER}mlp.up_proj"):
        expected = plain_reader(file, name, MIXED.of(name).bits)
        assert torch.equal(linears[name].dequantize(), expected)
    assert set(autogptq.quant_config(open_checkpoint(mixed)).modules) == set(MODULES)


def test_other_readers_find_the_grid_of_every_module(mixed: Path) -> None:
    stored = settings(mixed)
    rules = stored["dynamic"]
    assert stored["bits"] == 4 and stored["group_size"] == 64 and stored["lm_head"] is True
    assert json.loads((mixed / "config.json").read_text())["quantization_config"] == stored
    for name in (*QKV, f"{LAYER}self_attn.qkv_proj", "lm_head"):  # the second is vLLM's
        assert overridden(rules, name) == {"bits": 8, "group_size": 64}
    assert overridden(rules, DOWN) == {"bits": 3, "group_size": 32}
    for name in (f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.gate_up_proj", f"{LAYER}self_attn.o_proj"):
        assert not overridden(rules, name)
    for name in (*QKV, DOWN):  # 1 is no prefix of 11, nor a pattern's dot any character
        assert not overridden(rules, name.replace(".1.", ".11."))
        assert not overridden(rules, name.replace(".1.", "x1x"))


def test_linears_that_are_not_joined_have_rules_of_their_own() -> None:
    modules = {QKV[0]: EIGHT, QKV[1]: THREE}
    rules = dynamic_rules(modules, QuantConfig(4, 64))
    assert [overridden(rules, name).get("bits") for name in QKV] == [8, 3, None]


def test_the_model_computes_with_what_is_stored(mixed: Path, windows: torch.Tensor) -> None:
    loaded = load_model(mixed, precision="exact")
    export(mixed, mixed.with_name("float"), "float32")
    plain = load_model(mixed.with_name("float"))
    with torch.inference_mode():
        expected, found = plain(windows[:2]), loaded(windows[:2])
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


def test_the_head_is_solved_for_what_it_sees(
    source: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    """Its error in the report is that of the logits, computed from the finished model."""
    config = QuantConfig(4, 64, modules=(("lm_head", QuantConfig(3, 64)),))
    report = quantize_checkpoint(source, tmp_path / "out", windows, config)
    linear, layer = report.linears[-1], report.layers[-1]
    assert linear.name == "lm_head" and layer["name"] == "head" and len(report.layers) == 3
    export(tmp_path / "out", tmp_path / "float", "float32")
    model, original = load_model(tmp_path / "float"), load_model(source)
    with torch.inference_mode():
        states = model.model(windows).flatten(0, 1).double()
        weight = original.lm_head.weight.double()
        lost = (states @ (weight - model.lm_head.weight.double()).T).square().sum()
        expected = (lost / (states @ weight.T).square().sum()).item()
    assert linear.relative_error == pytest.approx(expected, rel=1e-3)
    assert linear.relative_error < linear.rtn_relative_error


def test_a_run_stopped_at_the_head_goes_on(
    source: Path, mixed: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    def stop(step: Step) -> None:
        if step.layer == step.num_layers:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, windows, MIXED, run_options=RunOptions(on_step=stop))
    steps: list[int] = []
    options = RunOptions(resume=True, on_step=lambda step: steps.append(step.layer))
    report = quantize_checkpoint(source, out, windows, MIXED, run_options=options)
    assert steps == [2] and len(report.linears) == 15
    one, other = tensors(out), tensors(mixed)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_exports_keep_the_grids(mixed: Path, tmp_path: Path) -> None:
    export(mixed, tmp_path / "v2", "gptq_v2")
    assert settings(tmp_path / "v2")["dynamic"].items() == settings(mixed)["dynamic"].items()
    assert settings(tmp_path / "v2")["lm_head"] is True
    one, other = (dict(autogptq.read(open_checkpoint(f))) for f in (mixed, tmp_path / "v2"))
    for name in (*QKV, DOWN, "lm_head"):
        assert torch.equal(one[name].dequantize(), other[name].dequantize())
    with pytest.raises(ValueError, match=r"has another grid than the checkpoint"):
        export(mixed, tmp_path / "ct", "compressed-tensors")
    with pytest.raises(ValueError, match=r"down_proj"):  # 3 bits
        export(mixed, tmp_path / "x.gguf", "gguf")


def test_an_eight_bit_head_is_exact_in_gguf(
    source: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    config = QuantConfig(4, 64, modules=(("lm_head", EIGHT),))
    quantize_checkpoint(source, tmp_path / "out", windows, config)
    export(tmp_path / "out", tmp_path / "x.gguf", "gguf")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}["output.weight"]
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    expected = dict(autogptq.read(open_checkpoint(tmp_path / "out")))["lm_head"].dequantize()
    assert found.tensor_type.name == "Q8_0" and torch.equal(torch.from_numpy(values), expected)


def test_foreign_rules_are_not_run(mixed: Path) -> None:
    """An expression that never ends on a name that does not match; bits come from the shapes."""
    before = dict(autogptq.read(open_checkpoint(mixed)))
    for file in ("config.json", "quantize_config.json"):
        stored = json.loads((mixed / file).read_text())
        target = stored.get("quantization_config", stored)
        target["dynamic"] = {"(.+)+(.+)+(.+)+!$": {"bits": 2}}
        (mixed / file).write_text(json.dumps(stored))
    after = dict(autogptq.read(open_checkpoint(mixed)))
    assert torch.equal(after[DOWN].dequantize(), before[DOWN].dequantize())


def test_what_runtimes_do_with_it(mixed: Path) -> None:
    found = {verdict.runtime: verdict for verdict in will_it_load(mixed)}
    assert "lm_head is quantized" in found["transformers"].why
    assert found["vllm"].why == f"takes 4 and 8 bits; {DOWN} is 3"
    assert not found["exllamav2"].loads and found["gptqmodel"].loads
    assert (
        "1 linears with 3 bits, group size 32; 4 linears with 8 bits, group size 64; lm_head"
        in (describe(mixed)["other grids"])
    )


def test_sizes_are_counted(mixed: Path) -> None:
    llama = LlamaConfig.from_dict(json.loads((mixed / "config.json").read_text()))
    inside, outside = stored_bytes(llama, MIXED, 2)
    packed = {
        k: v.nbytes for k, v in tensors(mixed).items() if not k.endswith(("g_idx", "norm.weight"))
    }
    head = sum(n for name, n in packed.items() if "layers" not in name)
    assert outside == pytest.approx(head, rel=1e-9)
    layers = sum(n for name, n in packed.items() if "layers" in name and "layernorm" not in name)
    assert inside == pytest.approx(layers, rel=1e-9)


@pytest.mark.parametrize(
    ("modules", "changes", "message"),
    [
        ((("lm_head", EIGHT),), {"tie_word_embeddings": True}, "tied to the embedding"),
        ((("lm_head", EIGHT),), {"vocab_size": 2081}, r"lm_head: shape \(2081, 128\)"),
        ((("lm_head", QuantConfig(8, 96)),), {}, "lm_head: in_features 128 is not divisible"),
        (((QKV[0], EIGHT),), {}, "share an input and need the same grid"),
        ((("model.layers.2.mlp.down_proj", EIGHT),), {}, "is no linear of this model"),
        ((("model.norm", EIGHT),), {}, "is no linear of this model"),
    ],
)
def test_what_does_not_fit_is_refused(
    source: Path, modules: Any, changes: dict[str, Any], message: str
) -> None:
    config = {**json.loads((source / "config.json").read_text()), **changes}
    with pytest.raises(ValueError, match=message):
        check_shapes(LlamaConfig.from_dict(config), QuantConfig(4, 64, modules=modules))


def test_the_head_on_the_command_line(source: Path, make_checkpoint: Make, tmp_path: Path) -> None:
    sizes = ["--samples", "4", "--seq-len", "64", "--lm-head-bits", "8", "--output", "out"]
    run = cli("quantize", "--model", source, *sizes, cwd=tmp_path)
    assert run.returncode == 0 and "head  relative error" in run.stderr
    assert settings(tmp_path / "out")["lm_head"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| other grids | lm_head: 8 bits, groups of 128 |" in card
    assert "lm_head" in (tmp_path / "out" / "quantize_report.html").read_text(encoding="utf-8")
    generated = cli("generate", "x", "--model", "out", "--max-new-tokens", 2, cwd=tmp_path)
    assert generated.returncode == 0
    tied = make_checkpoint("tied", tie_word_embeddings=True)
    run = cli("quantize", "--model", tied, *sizes[:-1], "other", cwd=tmp_path)
    assert run.returncode == 2 and "is tied to the embedding" in run.stderr
    assert len(run.stderr.splitlines()) == 1 and not (tmp_path / "other").exists()
