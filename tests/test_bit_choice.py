"""pytest tests/test_bit_choice.py: finer grids for a target of bits, against literal formulas and
exhaustive search.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from quant import sensitivity
from quant.bit_choice import allocate, candidates, choose
from quant.checkpoint import llama_config
from quant.config import QuantConfig
from quant.grid import QuantizedTensor, nearest_codes
from quant.llama.model import LINEAR_GROUPS
from quant.loader import load_model
from quant.sensitivity import Sensitivity, sensitivities
from quant.solvers.gptq import solve
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.scale_search import fit_weighted
from quant.sources import open_checkpoint, open_tokenizer
from tests.test_cli import cli

Make = Callable[..., Path]
GRIDS = [QuantConfig(4, 128), QuantConfig(4, 64), QuantConfig(4, 32), QuantConfig(8, 128)]
CPU = torch.device("cpu")
BUNDLED = Path(__file__).parents[1] / "quant/bundled"


def conditional_variances(x: Tensor, counts: Tensor) -> Tensor:
    """What of each input, most active first, the later ones do not explain: h_jj - h_jL H_LL^-1
    h_Lj of their weighted products, with a quarter of shrinkage and the usual damping.
    """
    H = sum(c * torch.outer(row, row) for c, row in zip(counts, x, strict=True)) / counts.sum()
    order = x.square().mean(0).argsort(descending=True)
    H = H + H.diagonal().diag() / 3
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    left = torch.empty_like(H[0])
    for at, j in enumerate(order):
        later = order[at + 1 :]
        explained = H[j, later] @ torch.linalg.solve(H[later][:, later], H[later, j])
        left[j] = H[j, j] - explained
    return left


def literal(folder: Path, windows: Tensor, grid: QuantConfig) -> dict[str, float]:
    """The formula for every linear, through transformers in float64."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        return hook

    linears = {n: m for n, m in model.model.named_modules() if n.endswith("_proj")}
    for name, module in linears.items():
        module.register_forward_hook(keep(f"model.{name}"))
    log_p = model(windows).logits.log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(*log_p.shape[:2], 1, generator=generator)
    drawn = (log_p.detach().exp().cumsum(-1) <= numbers).sum(-1, keepdim=True)
    log_p.gather(2, drawn).sum().backward()
    losses = {}
    for name, (x, output) in seen.items():
        weight = linears[name.removeprefix("model.")].weight.detach()
        square = x.square().mean((0, 1))
        group = next(group for group in LINEAR_GROUPS if name.split(".", 3)[3] in group)
        outputs = [seen[f"{name.rsplit('.', 2)[0]}.{other}"][1] for other in group]
        counts = sum(output.grad.square().sum(2).flatten() for output in outputs)
        left = conditional_variances(x.flatten(0, 1), counts)
        fitted = fit_weighted(weight.float(), square.float(), grid, signed=grid.symmetric)
        codes = nearest_codes(weight.float(), fitted)
        error = weight - QuantizedTensor(codes, fitted).dequantize(torch.float64)
        slope = output.grad.square().mean((0, 1))
        losses[name] = 0.5 * float((slope[:, None] * error.square() * left).sum())
    return losses


@pytest.mark.parametrize("geometry", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("grid", [QuantConfig(4, 64), QuantConfig(3, 32, False)])
def test_the_forecast_is_that_of_the_formula(
    make_checkpoint: Make, windows: Tensor, grid: QuantConfig, geometry: dict[str, bool]
) -> None:
    folder = make_checkpoint(**geometry)
    reader = open_checkpoint(folder)
    llama = llama_config(reader)
    found = sensitivities(reader, llama, windows, [grid], CPU)
    names = [
        tuple(f"model.layers.{layer}.{name}" for name in group)
        for layer in reversed(range(llama.num_hidden_layers))
        for group in LINEAR_GROUPS
    ]
    assert [unit.names for unit in found] == names
    expected = literal(folder, windows, grid)
    for unit in found:
        assert unit.losses[0] == pytest.approx(sum(expected[n] for n in unit.names), rel=1e-3)


def test_a_few_windows_are_looked_at(
    make_checkpoint: Make, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_checkpoint(make_checkpoint())
    llama, grid = llama_config(reader), [QuantConfig(4, 64)]
    monkeypatch.setattr(sensitivity, "TOKENS", 2 * windows.shape[1] + 1)
    short = sensitivities(reader, llama, windows, grid, CPU)
    assert short == sensitivities(reader, llama, windows[:2], grid, CPU)
    monkeypatch.setattr(sensitivity, "TOKENS", 1)
    assert sensitivities(reader, llama, windows, grid, CPU) == sensitivities(
        reader, llama, windows[:1], grid, CPU
    )


def random_units(count: int, seed: int) -> list[Sensitivity]:
    """Units with losses that mostly fall with bits."""
    generator = torch.Generator().manual_seed(seed)
    units = []
    for at in range(count):
        size = float(torch.rand(1, generator=generator).exp2().square())
        noise = torch.rand(len(GRIDS), generator=generator).tolist()
        losses = [size * (0.3 + n) * 4**-i for i, n in enumerate(noise)]
        units.append(Sensitivity((f"u{at}",), ((128 * (1 + at % 3), 256),), tuple(losses)))
    return units


def total(units: list[Sensitivity], chosen: tuple[int, ...]) -> tuple[float, float]:
    """Stored bits, counted from the parts of a file, and loss."""
    bits = sum(
        rows * (width * g.bits + width // g.group_size * (16 + g.bits))
        for unit, at in zip(units, chosen, strict=True)
        for rows, width in unit.shapes
        for g in (GRIDS[at],)
    )
    return bits, sum(unit.losses[at] for unit, at in zip(units, chosen, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_nothing_of_so_many_bits_loses_less(seed: int) -> None:
    units = random_units(5, seed)
    weights = sum(rows * width for unit in units for rows, width in unit.shapes)
    every = [total(units, c) for c in itertools.product(range(len(GRIDS)), repeat=len(units))]
    optimal = 0
    for target in torch.linspace(4.16, 8.2, 40).tolist():
        bits, loss = total(units, tuple(allocate(units, GRIDS, target)))
        assert bits <= target * weights * (1 + 1e-9)
        best = min(other for size, other in every if size <= bits * (1 + 1e-9))
        optimal += loss <= best * (1 + 1e-9)
        assert loss <= 2 * best  # where the last step does not fit
    assert optimal >= 30


def test_candidates_are_finer_and_fit_every_linear(make_checkpoint: Make) -> None:
    llama = llama_config(open_checkpoint(make_checkpoint()))  # widths 128 and 192
    found = candidates(llama, QuantConfig(4, 64, False))
    assert found == [
        QuantConfig(4, 64, False),
        QuantConfig(4, 32, False),
        QuantConfig(8, 64, False),
    ]
    rows = candidates(llama, QuantConfig(3, -1))
    assert rows == [QuantConfig(3, -1), QuantConfig(3, 64), QuantConfig(3, 32), QuantConfig(4, -1)]
    assert candidates(llama, QuantConfig(8, 32)) == [QuantConfig(8, 32)]


def test_a_choice_keeps_the_head_and_tells_what_it_takes(
    make_checkpoint: Make, windows: Tensor
) -> None:
    reader = open_checkpoint(make_checkpoint())
    llama, head = llama_config(reader), ("lm_head", QuantConfig(8, 64))
    config = QuantConfig(4, 64, modules=(head,))
    choice = choose(reader, llama, windows, config, 4.7, CPU)
    assert choice.config.modules[0] == head and 4.5 < choice.bits <= 4.7
    assert choice.config.common == QuantConfig(4, 64) and choice.loss < choice.before
    assert "bits per weight: " in choice.summary() and "linears to " in choice.summary()
    same = choose(reader, llama, windows, QuantConfig(4, 64), 4 + 20 / 64, CPU)
    assert same.config.modules == () and "no linear is finer" in same.summary()
    with pytest.raises(ValueError, match=r"--target-bpw 4.3: 4 bits .* take 4.312 per weight"):
        choose(reader, llama, windows, config, 4.3, CPU)
    for target in (99, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="--target-bpw .*more than .* takes, 8.375 per weight"):
            choose(reader, llama, windows, config, target, CPU)


def test_the_command_writes_a_plain_mixed_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    run = cli(
        "quantize",
        "--output",
        out,
        "--samples",
        2,
        "--seq-len",
        64,
        "--target-bpw",
        4.6,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if "bits per weight: " in line)
    told, rules = float(line.split()[0]), json.loads((out / "config.json").read_text())
    assert 4.5 < told <= 4.6 and rules["quantization_config"]["dynamic"]
    tensors = load_file(out / "model.safetensors")
    stored, weights, grids = 0, 0, {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith("qweight")]:
        packed, scales, zeros = (tensors[f"{name}.{n}"] for n in ("qweight", "scales", "qzeros"))
        inputs = len(tensors[f"{name}.g_idx"])
        stored += 32 * packed.numel() + 16 * scales.numel() + 32 * zeros.numel()
        weights += inputs * scales.shape[1]
        grids[name] = 32 * len(packed) // inputs, inputs // len(scales)
    assert stored / weights == pytest.approx(told, abs=6e-4)
    for layer, group in itertools.product(range(4), LINEAR_GROUPS):
        assert len({grids[f"model.layers.{layer}.{name}"] for name in group}) == 1
    assert len(set(grids.values())) > 1
    assert load_model(out)(torch.ones(1, 4, dtype=torch.long)).isfinite().all()
    refused = cli("quantize", "--output", tmp_path / "no", "--target-bpw", 4, cwd=tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "take 4.156 per weight" in refused.stderr and not (tmp_path / "no").exists()


@torch.no_grad()
def test_the_forecast_is_what_gptq_costs() -> None:
    """One group of the bundled model after another is quantized, and its KL measured on text of
    which the forecast knows nothing.
    """
    reader, grid = open_checkpoint(BUNDLED), QuantConfig(4, 128)
    text = (BUNDLED / "heldout.txt").read_text(encoding="utf-8")
    windows = torch.tensor(open_tokenizer(BUNDLED).encode(text)[: 12 * 256]).view(12, 256)
    found = sensitivities(reader, llama_config(reader), windows[:6], [grid], CPU)
    model, inputs = load_model(BUNDLED), {}
    for unit in found:
        module = model.get_submodule(unit.names[0])
        module.register_forward_hook(lambda _, x, y, unit=unit: inputs.update({unit: x[0]}))
    model(windows[:6])
    seen = {unit: x.flatten(0, 1) for unit, x in inputs.items()}
    exact = model(windows[6:]).float().log_softmax(-1)
    for unit in found:
        weights = {name: model.get_submodule(name).weight for name in unit.names}
        kept = {name: weight.clone() for name, weight in weights.items()}
        for weight in weights.values():
            hessian = seen[unit].T @ seen[unit]
            options = GPTQOptions(scales="signed", shrink=0.25)
            weight.copy_(solve(weight.float(), hessian, grid, options).tensor.dequantize())
        rounded = model(windows[6:]).float().log_softmax(-1)
        divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
        assert 0.5 < unit.losses[0] / divergence < 2, unit.names
        for name, weight in weights.items():
            weight.copy_(kept[name])
