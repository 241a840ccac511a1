"""pytest tests/test_runtimes.py: will it load? Each runtime's rules, and what decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.config import QuantConfig
from quant.export import export
from quant.inspection import will_it_load
from quant.pipeline import quantize_checkpoint
from quant.runtime_rules import Facts
from quant.runtimes import RUNTIMES, check_target, verdict, verdicts
from quant.solvers.rtn import RTNOptions

Make = Callable[..., Path]
DOWN = "model.layers.0.mlp.down_proj"
LLAMA_7B = {"model.layers.0.self_attn.q_proj": (4096, 4096), DOWN: (4096, 11008)}
GPTQ = Facts("gptq", QuantConfig(4, 128), LLAMA_7B)
ASYMMETRIC = QuantConfig(4, 128, symmetric=False)


def test_the_default_loads_everywhere() -> None:
    assert [found.runtime for found in verdicts(GPTQ) if found.loads] == list(RUNTIMES)


@pytest.mark.parametrize(
    ("runtime", "changes", "why"),
    [
        ("transformers", {"settings_in_config": False}, "from config.json alone"),
        ("transformers", {"quantized_head": True}, "lm_head is quantized"),
        (
            "transformers",
            {"method": "compressed-tensors", "config": ASYMMETRIC},
            "expects unpacked zeros",
        ),
        ("vllm", {"config": QuantConfig(3, 128)}, "takes 4 and 8 bits; bits is 3"),
        ("vllm", {"method": "gptq_v2", "config": ASYMMETRIC}, "symmetric is false"),
        ("vllm", {"config": QuantConfig(4, 256)}, "group_size is 256"),
        (
            "vllm",
            {"config": QuantConfig(4, 128), "shapes": {DOWN: (64, 192)}},
            f"128 does not divide in_features 192 of {DOWN}",
        ),
        (
            "vllm",
            {"config": QuantConfig(4, 32), "shapes": {DOWN: (96, 128)}, "shuffled": DOWN},
            f"multiples of 64 outputs and 128 inputs; {DOWN} is \\(96, 128\\)",
        ),
        ("sglang", {"repeated_head": True}, "lm_head.weight is there"),
        ("exllamav2", {"method": "compressed-tensors"}, "finds quantized linears by .qweight"),
        ("exllamav2", {"config": QuantConfig(8, 128)}, "takes 4 bits; bits is 8"),
        ("exllamav2", {"config": QuantConfig(4, 96)}, "power of two; group_size is 96"),
        ("exllamav2", {"method": "gptq_v2", "zero_zero": DOWN}, f"{DOWN} has one"),
        ("gptqmodel", {"config": ASYMMETRIC}, "refuses version 1 with sym false"),
        ("gptqmodel", {"method": "compressed-tensors"}, "reads the GPTQ format"),
        ("llama.cpp", {"shuffled": DOWN}, f"{DOWN} is shuffled"),
        ("llama.cpp", {"config": QuantConfig(8, 128, False)}, "bits is 8, asymmetric"),
        ("llama.cpp", {"gguf_obstacle": "no tokenizer"}, "no tokenizer"),
    ],
)
def test_each_rule(runtime: str, changes: dict[str, object], why: str) -> None:
    found = verdict(runtime, replace(GPTQ, **changes))  # type: ignore[arg-type]
    assert found.loads is False
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found.why)


def test_vllm_takes_asymmetric_compressed_tensors() -> None:
    assert verdict("vllm", replace(GPTQ, method="compressed-tensors", config=ASYMMETRIC)).loads
    assert verdict("sglang", replace(GPTQ, method="gptq_v2", config=ASYMMETRIC)).loads
    assert verdict("vllm", replace(GPTQ, method="awq")).loads is None


def test_targets() -> None:
    check_target("vllm", QuantConfig(4, 128), LLAMA_7B)
    with pytest.raises(ValueError, match="--target vllm will not load the result: .*symmetric"):
        check_target("vllm", ASYMMETRIC, LLAMA_7B)
    with pytest.raises(ValueError, match="runtime 'x' is unknown; there are transformers"):
        check_target("x", QuantConfig(4, 128), LLAMA_7B)


def test_folders(make_checkpoint: Make, tmp_path: Path, windows: torch.Tensor) -> None:
    """What is read from a folder: format, groups, zeros, tokenizer, head."""
    source, out = make_checkpoint(), tmp_path / "out"
    quantize_checkpoint(source, out, windows, QuantConfig(4, 64), RTNOptions())
    assert all(found.loads for found in will_it_load(out)) and all(
        found.loads for found in will_it_load(source)
    )
    export(out, tmp_path / "ct", "compressed-tensors")
    found = {found.runtime: found.loads for found in will_it_load(tmp_path / "ct")}
    assert [name for name, loads in found.items() if not loads] == ["exllamav2", "gptqmodel"]
    state = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    state[f"{name}.g_idx"] = state[f"{name}.g_idx"].flip(0)
    state[f"{name}.qzeros"] = state[f"{name}.qzeros"] & ~15
    save_file(state, out / "model.safetensors")
    for file in ("config.json", "quantize_config.json"):
        text = (out / file).read_text()
        (out / file).write_text(text.replace('"checkpoint_format": "gptq"', '"format": "gptq_v2"'))
    (out / "tokenizer.model").unlink()
    why = {found.runtime: found.why for found in will_it_load(out)}
    assert name in why["exllamav2"] and "no tokenizer" in why["llama.cpp"]
    assert str(out) in why["llama.cpp"]


def test_json(make_checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    from quant.commands.inspect import inspect

    source = make_checkpoint()
    inspect(source, json_output=True)
    told = json.loads(capsys.readouterr().out)
    assert {entry["runtime"]: entry["loads"] for entry in told["runtimes"]} == dict.fromkeys(
        RUNTIMES, True
    )
    inspect(source)
    assert "  vllm                yes  a plain Llama folder" in capsys.readouterr().out
