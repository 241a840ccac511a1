"""pytest tests/test_damage.py: tensors that are missing or misshapen, found before any work;
weights that are not finite, found late or when a model runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import cli

from quant import QuantConfig, RunOptions, quantize_checkpoint
from quant.evaluate import evaluate
from quant.llama.generate import generate, generate_batch
from quant.loader import load_model

Make = Callable[..., Path]
CONFIG = QuantConfig(4, 64)


def spoil(source: Path, name: str) -> None:
    for shard in source.glob("*.safetensors"):
        state = load_file(shard)
        if name in state:
            state[name].fill_(torch.nan)
            save_file(state, shard, metadata={"format": "pt"})


LAST = "model.layers.2.mlp.up_proj.weight"
HEADERS = {
    "missing": f"tensor {LAST} is missing from the checkpoint",
    "shape": f"{LAST}: shape (224, 128) in the file, (256, 128) by config.json; one is wrong",
    "layers": "has tensors of 3 layers, but num_hidden_layers in config.json is 2; correct one",
}


@pytest.mark.parametrize("damage", HEADERS)
def test_headers_are_compared_with_the_config_first(
    make_checkpoint: Make, tmp_path: Path, damage: str
) -> None:
    source = make_checkpoint(num_hidden_layers=3)
    states = [load_file(shard) for shard in sorted(source.glob("*.safetensors"))]
    state = {name: tensor for part in states for name, tensor in part.items()}
    state[LAST] = state[LAST][:224] if damage == "shape" else state[LAST]
    if damage == "missing":
        del state[LAST]
    (source / "model.safetensors.index.json").unlink()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    if damage == "layers":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    for command in (
        ["quantize", "--model", source, "--output", "out", "--samples", 4, "--seq-len", 64],
        ["convert", source, "out"],
        ["export", "--to", "float32", source, "out"],
        ["export", "--to", "gguf", source, "out.gguf"],
    ):
        run = cli(*command, cwd=tmp_path)
        assert (run.returncode, run.stdout) == (2, "") and len(run.stderr.splitlines()) == 1
        assert run.stderr.startswith(f"error: {source}: ") and HEADERS[damage] in run.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_run_goes_on_when_a_late_layer_is_mended(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = make_checkpoint(num_hidden_layers=3), tmp_path / "out"
    whole = {shard: shard.read_bytes() for shard in source.glob("*.safetensors")}
    quantize_checkpoint(source, tmp_path / "quiet", windows, CONFIG)
    spoil(source, "model.layers.2.mlp.up_proj.weight")
    message = (
        r"^model.layers.2.mlp.up_proj.weight: holds NaN.*; finished layers are kept in "
        r".*out.partial; "
        "mend the file, and continue with the same command and --resume$"
    )
    for resume in (False, True):
        with pytest.raises(ValueError, match=message):
            options = RunOptions(resume=resume)
            quantize_checkpoint(source, out, windows, CONFIG, run_options=options)
    for shard, data in whole.items():
        shard.write_bytes(data)
    layers: list[int] = []
    options = RunOptions(resume=True, on_step=lambda step: layers.append(step.layer))
    with pytest.warns(UserWarning, match="out.partial: the weights were mended since"):
        quantize_checkpoint(source, out, windows, CONFIG, run_options=options)
    assert set(layers) == {2}
    first, second = (load_file(f / "model.safetensors") for f in (tmp_path / "quiet", out))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_promised_where_no_layer_was_finished(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source = make_checkpoint()
    spoil(source, "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="the checkpoint is damaged$"):
        quantize_checkpoint(source, tmp_path / "out", windows, CONFIG)


def test_logits_that_are_not_finite_are_an_error(
    make_checkpoint: Make, windows: torch.Tensor
) -> None:
    """In any window, of any of the two models, and in generation."""
    model, fine = (load_model(make_checkpoint(name), "cpu") for name in ("a", "b"))
    model.model.embed_tokens.weight[7] = torch.nan  # the storage is this model's own
    ids = windows.clamp(min=8).flatten()
    ids[70] = 7  # in the second window
    with pytest.raises(ValueError, match="the model's logits are not finite in window 2; its"):
        evaluate(model, ids, 64, fine)
    with pytest.raises(ValueError, match="the reference's logits are not finite in window 2; its"):
        evaluate(fine, ids, 64, model)
    with pytest.raises(ValueError, match="generate: the model's logits are not finite"):
        list(generate(model, [8, 7], 2))
    with pytest.raises(ValueError, match="generate: the model's logits are not finite"):
        generate_batch(model, [[8], [8, 7]], 2)


def test_the_commands_end_in_one_line(make_checkpoint: Make, tmp_path: Path) -> None:
    source, text = make_checkpoint(), tmp_path / "text.txt"
    text.write_text("some text to judge with\n" * 200)
    spoil(source, "model.norm.weight")
    judge = ["eval", "--data", text, "--window", 64]
    for command in (judge, ["generate", "def "]):
        run = cli(*command, "--model", source, cwd=tmp_path)
        assert run.returncode == 2 and run.stdout == ""
        assert "logits are not finite" in run.stderr.splitlines()[-1]
