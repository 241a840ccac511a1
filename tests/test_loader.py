"""pytest tests/test_loader.py: linears that share an input become one, with any backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import QuantConfig, RTNOptions, load_model, load_quantized, quantize_checkpoint
from quant.kernels import BACKENDS, PRECISIONS
from quant.linear import QuantLinear

Make = Callable[..., Path]


def quantized(source: Path, output: Path, windows: Tensor, group_size: int = 32) -> Path:
    quantize_checkpoint(source, output, windows, QuantConfig(4, group_size), RTNOptions())
    return output


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one shard."""
    (shard,) = folder.glob("*.safetensors")
    state = load_file(shard)
    change(state)
    save_file(state, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("name", BACKENDS)
def test_inputs_that_are_shared_are_multiplied_once(
    name: str, make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    if not BACKENDS[name].is_available(torch.device("cpu")):
        pytest.skip(f"{name} is not available here")
    folder = quantized(make_checkpoint(), tmp_path / "out", windows)
    model, _ = load_quantized(folder, device="cpu", backend=name, precision="fast")
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    names = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.down_proj", "mlp.gate_up_proj"]
    assert [n for n, _ in linears] == [f"model.layers.{i}.{n}" for i in (0, 1) for n in names]
    assert {m.backend for _, m in linears} == {name}
    assert {m.precision for _, m in linears} == {"fast"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_and_groups_of_their_own_order(
    backend: str, make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    """k's columns are grouped in another order than q's and v's: the three stay apart."""
    if not BACKENDS[backend].is_available(torch.device("cpu")):
        pytest.skip(f"{backend} is not available here")
    folder = quantized(make_checkpoint(), tmp_path / "out", windows)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"attention_bias": true,', 1))
    layer, index = "model.layers.1.self_attn.", torch.arange(128).flip(0).int() // 32

    def change(state: dict[str, Tensor]) -> None:
        for i in (0, 1):
            for name, size in (("q", 128), ("k", 64), ("v", 64), ("o", 128)):
                bias = torch.linspace(-1, 1 + i, size)
                state[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias
        state[layer + "k_proj.g_idx"] = index

    edit(folder, change)
    model, _ = load_quantized(folder, device="cpu", backend=backend, precision="exact")
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    assert first.qkv_proj.bias.shape == (256,) and first.q_proj is None
    assert second.qkv_proj is None and second.k_proj.bias[-1] == 2
    dense, _ = load_quantized(folder, device="cpu", backend="reference")
    expected = dense(windows)
    assert (model(windows) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_precisions_reach_the_kernel(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    folder = quantized(make_checkpoint(), tmp_path / "out", windows)
    exact, high, fast = (
        load_quantized(folder, "cpu", precision=p)[0](windows).double() for p in PRECISIONS
    )
    if "cpu" in BACKENDS and BACKENDS["cpu"].is_available(torch.device("cpu")):
        scale = exact.abs().mean()
        assert 0 < (high - exact).abs().mean() < 1e-4 * scale
        assert 1e-3 * scale < (fast - exact).abs().mean() < 1e-1 * scale
    with pytest.raises(ValueError, match="precision 'best' is unknown; there are exact, high"):
        load_quantized(folder, "cpu", precision="best")


@pytest.mark.parametrize("geometry", [{}, {"tie_word_embeddings": True}, {"hidden_size": 112}])
def test_float_linears_are_rounded(
    geometry: dict[str, Any], make_checkpoint: Make, windows: Tensor
) -> None:
    """Of 32 inputs the largest is a whole number of scales, and none is off by more than half of
    one: 1 / 254 of the largest; the head too, also where it is the embedding, which stays. Without
    groups where 32 does not divide the inputs, in q, k, v, gate, up and the head.
    """
    folder, size = make_checkpoint(**geometry), 32 if "hidden_size" not in geometry else -1
    model, plain = load_model(folder, "cpu", bits=8), load_model(folder, "cpu")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(linears) == 9 and isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    head = plain.lm_head.weight.float()
    model.lm_head.precision = "exact"
    rounded = model.lm_head(torch.eye(head.shape[1])).T
    largest = head.unflatten(1, (-1, 32 if size == 32 else head.shape[1])).abs().amax(-1, True)
    off = (rounded - head).abs().view(*largest.shape[:2], -1)
    assert (off <= largest * (1 / 254 + 1e-3)).all() and off.max() > 0
    expected = plain(windows)
    off = (model(windows) - expected).abs()  # by nine linears in a row
    assert off.mean() < 0.03 * expected.abs().mean()
