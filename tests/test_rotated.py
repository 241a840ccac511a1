"""pytest tests/test_rotated.py: the same model in another basis, against transformers and a dense
matrix in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import cli
from torch import Tensor
from transformers import LlamaForCausalLM

from quant import QuantConfig, load_model, quantize_checkpoint
from quant.rotated import RotatedReader, Rotation
from quant.solvers.gptq_options import GPTQOptions
from quant.sources import open_checkpoint

Make = Callable[..., Path]
WIDTH = 128
STREAM_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def cosine(size: int, row: int, column: int) -> float:
    """An entry of the orthogonal DCT-II."""
    at = torch.tensor(torch.pi * (row + 0.5) * column / size, dtype=torch.float64)
    return float(at.cos() * ((1 if column == 0 else 2) / size) ** 0.5)


@pytest.mark.parametrize("width", [1, 2, 7, 12, 128, 576])
def test_a_rotation_is_orthogonal_and_mixes_all_channels(width: int) -> None:
    Q = Rotation(width)(torch.eye(width)).double()
    assert (Q @ Q.T - torch.eye(width)).abs().max() < 1e-6
    assert Q.abs().max() <= 2 / width**0.5 + 1e-6
    assert (Q.square().sum(0) - 1).abs().max() < 1e-6


def test_a_rotation_is_a_kronecker_product_of_cosine_transforms() -> None:
    Q = Rotation(12)(torch.eye(12)).double()  # 3 x 4
    signs = Q[:, 0].sign()  # the first column is constant but for them
    assert set(signs.tolist()) == {-1.0, 1.0}
    for row in range(12):
        for column in range(12):
            at = cosine(3, row // 4, column // 4) * cosine(4, row % 4, column % 4)
            assert abs(Q[row, column] - signs[row] * at) < 1e-6


def lively(folder: Path) -> Path:
    """Give a checkpoint biases, unequal norms, and a channel that stands out."""
    generator = torch.Generator().manual_seed(1)
    reader = open_checkpoint(folder)
    state = {name: reader.tensor(name).clone() for name in reader.names()}
    state["model.embed_tokens.weight"][:, 5] *= 50
    for name in list(state):
        if name.endswith("norm.weight"):
            state[name] = torch.rand(WIDTH, generator=generator) + 0.5
        elif name.endswith("proj.weight"):
            bias = torch.randn(len(state[name]), generator=generator)
            state[name.replace("weight", "bias")] = bias
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_rotated_model_predicts_the_same(make_checkpoint: Make) -> None:
    """In float32 from end to end."""
    made = make_checkpoint(dtype=torch.float32, attention_bias=True, mlp_bias=True)
    rotated = RotatedReader(open_checkpoint(lively(made)), WIDTH)
    oracle = LlamaForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = torch.randint(0, 2080, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = oracle(ids).logits
        oracle.load_state_dict({name: rotated.tensor(name) for name in rotated.names()})
        found = oracle(ids).logits
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (rotated.tensor("model.layers.0.input_layernorm.weight") == 1).all()


def test_tensors_are_those_of_the_formula(make_checkpoint: Make) -> None:
    reader = open_checkpoint(make_checkpoint())
    rotated, Q = RotatedReader(reader, WIDTH), Rotation(WIDTH)(torch.eye(WIDTH)).double()
    for name in reader.names():
        stored, module = reader.tensor(name), name.split(".")[-2]
        value, layer = stored.double(), name.rsplit(".", 3)[0]
        if module in STREAM_READERS:
            norm = "input" if "self_attn" in name else "post_attention"
            value = value * reader.tensor(f"{layer}.{norm}_layernorm.weight").double() @ Q
        elif module in ("o_proj", "down_proj"):
            value = Q.T @ value
        elif module == "lm_head":
            value = value * reader.tensor("model.norm.weight").double() @ Q
        elif module == "embed_tokens":
            value = value @ Q
        else:
            value = torch.ones_like(value)
        found = rotated.tensor(name)
        assert found.dtype == stored.dtype and found.shape == rotated.shape(name)
        assert (found.double() - value).abs().max() <= 6e-4 * value.abs().max()  # of float16


def test_a_rotated_checkpoint_is_an_ordinary_one(
    make_checkpoint: Make, tmp_path: Path, windows: Tensor
) -> None:
    """Read back it predicts what the float model does, as well as one that was not rotated does."""
    made, config = make_checkpoint(), QuantConfig(8, 32)
    expected, errors = load_model(made, "cpu")(windows), []
    for rotate in (False, True):
        folder = tmp_path / str(rotate)
        quantize_checkpoint(made, folder, windows, config, GPTQOptions(rotate=rotate))
        errors.append((load_model(folder, "cpu")(windows) - expected).norm() / expected.norm())
    assert errors[1] < 1.5 * errors[0] < 0.05
    stored = load_file(folder / "model.safetensors")
    assert (stored["model.norm.weight"] == 1).all()
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == WIDTH


def test_a_head_that_repeats_the_embedding_stays(
    make_checkpoint: Make, tmp_path: Path, windows: Tensor
) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    for rotate in (False, True):
        solver = GPTQOptions(rotate=rotate)
        quantize_checkpoint(folder, tmp_path / str(rotate), windows, QuantConfig(4, 32), solver)
    files = [tmp_path / str(rotate) / "model.safetensors" for rotate in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("given", [[], ["--rotate"]])
def test_the_command_line_rotates_if_told(
    given: list[str], make_checkpoint: Make, tmp_path: Path
) -> None:
    folders = ["--model", make_checkpoint(), "--output", tmp_path / "out"]
    few = ["--group-size", 32, "--samples", 4, "--seq-len", 64, "--effort", "fast"]
    done = cli("quantize", *folders, *few, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "out" / "quantize_report.json").read_text())["settings"]
    assert (settings["rotate"], settings["equalize"]) == ((True, 0.25) if given else (False, 0.0))
