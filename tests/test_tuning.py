"""pytest tests/test_tuning.py: scales and norms move towards the float model, or stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quant.tuning
from calib.hidden import HiddenStates
from quant import QuantConfig, RunOptions, load_model, load_quantized, quantize_checkpoint
from quant.checkpoint_writer import Part
from quant.distill import FINAL_NORM, Lesson, Student, retell
from quant.finished_layers import FinishedLayers, scale_gradient
from quant.grid import Grid, QuantizedTensor
from quant.llama.config import LlamaConfig
from quant.llama.model import RMSNorm
from quant.resume import Journal
from quant.solvers.gptq import EFFORTS, GPTQOptions
from quant.sources import open_checkpoint
from quant.tuning import Tuning, split

Make = Callable[..., Path]
CONFIG = QuantConfig(3, 32)
TUNED = GPTQOptions(tuning=2)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}


def divergence(model: Any, other: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean KL(other || model) over all tokens, in float64."""
    q, p = (torch.log_softmax(m(windows).double(), -1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_to_a_scale(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (6, 64), generator=generator).to(torch.uint8)
    zeros = torch.full((6, 2), 8) if symmetric else torch.randint(1, 16, (6, 2))
    scales = torch.rand(6, 2, generator=generator, dtype=torch.float64) + 0.5
    x = torch.randn(64, 9, generator=generator, dtype=torch.float64)

    def weight(scales: torch.Tensor) -> torch.Tensor:  # written out, column by column
        columns = [scales[:, k // 32] * (codes[:, k] - zeros[:, k // 32]) for k in range(64)]
        return torch.stack(columns, 1)

    def loss(scales: torch.Tensor) -> torch.Tensor:
        return torch.sin(weight(scales) @ x).sum()

    slope = torch.cos(weight(scales) @ x) @ x.T
    grid = Grid(scales.float(), zeros.to(torch.uint8), 4)
    gradient = scale_gradient(slope, QuantizedTensor(codes, grid))
    for row in range(6):
        for group in range(2):
            step = torch.zeros_like(scales)
            step[row, group] = 1e-6
            measured = (loss(scales + step) - loss(scales - step)) / 2e-6
            assert gradient[row, group].item() == pytest.approx(measured.item(), rel=1e-5, abs=1e-5)


def student_of(folder: Path, source: Path, windows: torch.Tensor) -> tuple[Student, Lesson]:
    """A finished checkpoint as a Student, taught by the float model's own last hidden states."""
    dense = load_model(source, device="cpu").float()
    llama = LlamaConfig.from_dict(open_checkpoint(source).config)
    part = Part("model.safetensors", 0, "")
    norm = RMSNorm(llama.hidden_size, llama.rms_norm_eps)
    norm.load_state_dict(dense.model.norm.state_dict())
    norm.requires_grad_(False)
    layers = FinishedLayers(folder, [[part]] * llama.num_hidden_layers, CONFIG)
    embedding, head = dense.model.embed_tokens.weight.data, dense.lm_head.weight.data
    x = dense.model.embed_tokens(windows)
    for layer in dense.model.layers:
        x = layer(x)
    states = HiddenStates(*windows.shape, llama.hidden_size)
    states.set_windows(x)
    return Student(llama, layers, embedding, head, norm), Lesson(windows, None, states, norm)


def test_the_gradient_of_the_whole_model(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, output = make_checkpoint(attention_bias=False), tmp_path / "out"
    quantize_checkpoint(source, output, windows, CONFIG)
    student, lesson = student_of(output, source, windows)
    batch = torch.arange(4)
    loss, gradients = student.gradients(lesson, batch)
    assert gradients.keys() == student.values.keys()
    quantized, dense = load_quantized(output, "cpu", precision="exact")[0], load_model(source)
    expected = divergence(quantized, dense, windows[:4]).item()
    assert loss == pytest.approx(expected, rel=1e-3)
    four = replace(lesson, windows=windows[:4])
    assert student.divergence(four) == pytest.approx(loss, rel=1e-5)
    start = dict(student.values)
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", FINAL_NORM]
    for name in [*names, "model.layers.0.input_layernorm.weight"]:  # along the gradient
        step = gradients[name] / gradients[name].norm() * start[name].norm() * 1e-2
        losses = []
        for sign in (1, -1):
            student.values = {**start, name: start[name] + sign * step}
            losses.append(student.divergence(four))
        measured = (losses[0] - losses[1]) / 2
        assert measured == pytest.approx((gradients[name] * step).sum().item(), rel=0.03)


def test_padding_teaches_nothing(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, output = make_checkpoint(), tmp_path / "out"
    quantize_checkpoint(source, output, windows, CONFIG)
    student, lesson = student_of(output, source, windows)
    padded = torch.cat([windows, torch.full((8, 9), 7)], dim=1)
    mask = torch.cat([torch.ones(8, 64), torch.zeros(8, 9)], dim=1).bool()
    _, longer = student_of(output, source, padded)
    one, other = (
        student.gradients(taught, torch.tensor([1, 2]))
        for taught in (lesson, replace(longer, mask=mask))
    )
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() < 1e-3 * gradient.norm()


def test_tuned_files_are_of_the_same_kind_and_better(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, plain, tuned = make_checkpoint(), tmp_path / "plain", tmp_path / "tuned"
    passes: list[Any] = []
    quantize_checkpoint(source, plain, windows[split(8)[1]], CONFIG)
    report = quantize_checkpoint(
        source, tuned, windows, CONFIG, TUNED, RunOptions(on_pass=passes.append)
    )
    facts = report.tuning
    assert facts is not None and facts["kept"] and len(passes) == 2
    assert (facts["windows"], facts["held_out"]) == (7, 1)
    assert f"-> {facts['after'][-1]:.5f}" in Tuning(**facts).summary()
    before, after = tensors(plain), tensors(tuned)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.endswith((".scales", "norm.weight")) for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert FINAL_NORM in changed and len(changed) == 14 + 5
    # An independent judge: the loaded models' own predictions on the held-out window.
    held_out, dense = windows[split(8)[0]], load_model(source)
    kl = [
        divergence(load_quantized(folder, "cpu", precision="exact")[0], dense, held_out).item()
        for folder in (plain, tuned)
    ]
    assert kl == pytest.approx([facts["before"], facts["after"][-1]], rel=1e-3)
    assert kl[1] < kl[0]


def test_the_same_seed_gives_the_same_bytes(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, folders = make_checkpoint(dtype=torch.bfloat16), [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        quantize_checkpoint(source, folder, windows, CONFIG, TUNED)
    one, two = map(tensors, folders)
    assert all(torch.equal(one[k].view(torch.uint8), two[k].view(torch.uint8)) for k in one)
    assert one[FINAL_NORM].dtype == torch.bfloat16


def test_what_does_not_help_is_not_kept(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain, tuned = make_checkpoint(), tmp_path / "plain", tmp_path / "tuned"
    monkeypatch.setattr(quant.tuning, "_RATE", 1.0)
    monkeypatch.setattr(quant.tuning, "_STOP", 0.5)
    quantize_checkpoint(source, plain, windows[split(8)[1]], CONFIG)
    report = quantize_checkpoint(source, tuned, windows, CONFIG, TUNED)
    assert report.tuning is not None and not report.tuning["kept"]
    assert report.tuning["after"] == (report.tuning["before"],)  # one pass, and no more
    assert "values stay as they were" in Tuning(**report.tuning).summary()
    before, after = tensors(plain), tensors(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("place", ["before", "while writing", "after"])
def test_a_run_that_stops_while_tuning_goes_on(
    make_checkpoint: Make,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    source, quiet, output = make_checkpoint(), tmp_path / "quiet", tmp_path / "out"
    quantize_checkpoint(source, quiet, windows, CONFIG, TUNED)
    targets: dict[str, tuple[Any, str]] = {
        "before": (quant.tuning, "tune"),
        "while writing": (quant.tuning, "copy_plain"),
        "after": (Journal, "forget_hidden"),
    }

    def stop(*args: Any, **options: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(*targets[place], stop)
        with pytest.raises(OSError, match="the disk is full"):
            quantize_checkpoint(source, output, windows, CONFIG, TUNED)
    assert not output.exists()
    if place == "after":
        monkeypatch.setattr(quant.tuning, "tune", stop)  # it is not done again
    report = quantize_checkpoint(source, output, windows, CONFIG, TUNED, RunOptions(resume=True))
    one, two = tensors(quiet), tensors(output)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {p.name for p in quiet.iterdir()} == {p.name for p in output.iterdir()}
    stored = json.loads((quiet / "quantize_report.json").read_text())
    assert report.tuning is not None and report.tuning["kept"] == stored["tuning"]["kept"]


def test_retold_windows_are_what_the_float_model_says(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, output = make_checkpoint(), tmp_path / "out"
    quantize_checkpoint(source, output, windows, CONFIG)
    student, lesson = student_of(output, source, windows)
    sharp = student.head * 1e6  # its likeliest token is then the only one
    told = retell(lesson, sharp, 0.4, torch.Generator().manual_seed(0))
    expected = load_model(source)(windows).argmax(-1)
    changed = told != windows
    assert 0.3 < changed.float().mean() < 0.5 and not changed[:, 0].any()
    assert torch.equal(told[:, 1:][changed[:, 1:]], expected[:, :-1][changed[:, 1:]])
    again = retell(lesson, sharp, 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(told, again)
    assert torch.equal(retell(lesson, sharp, 0.0, torch.Generator()), windows)


def test_one_window_is_too_few(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="tuning: 1 window; at least 2 are needed"):
        quantize_checkpoint(make_checkpoint(), tmp_path / "out", windows[:1], CONFIG, TUNED)
    with pytest.raises(ValueError, match="tuning -1 is out of range"):
        GPTQOptions(tuning=-1)


def test_split_and_effort() -> None:
    for count, judges in ((2, [1]), (7, [6]), (8, [7]), (32, [7, 15, 23, 31])):
        held_out, taught = split(count)
        assert held_out.tolist() == judges
        assert sorted(held_out.tolist() + taught.tolist()) == list(range(count))
    assert EFFORTS["max"].tuning > 0 == EFFORTS["balanced"].tuning
