"""pytest tests/test_foreign_formats.py: quantized checkpoints as other tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import awq, compressed, foreign, random_tensor, settings
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import CheckpointReader
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.loader import load_model, load_quantized
from quant.sources import open_checkpoint

Make = Callable[..., Path]
CASES = [
    ("compressed-tensors", 4, True),
    ("compressed-tensors", 4, False),
    ("compressed-tensors", 3, False),
    ("compressed-tensors", 2, False),
    ("compressed-tensors", 8, True),
    ("awq", 4, False),
]


@pytest.mark.parametrize(("form", "bits", "symmetric"), CASES)
def test_codes_scales_and_zeros_are_those_of_the_file(
    make_checkpoint: Make, tmp_path: Path, form: str, bits: int, symmetric: bool
) -> None:
    held = foreign(make_checkpoint(), tmp_path / "q", form, bits, symmetric)
    reader = open_checkpoint(tmp_path / "q")
    assert [name for name, f in FORMATS.items() if f.matches(reader)] == [form]
    read = {n: v for n, v in FORMATS[form].read(reader) if isinstance(v, QuantizedTensor)}
    assert sorted(read) == sorted(held)
    for name, qt in read.items():
        assert torch.equal(qt.codes, held[name].codes), name
        assert torch.equal(qt.grid.scales, held[name].grid.scales)
        assert torch.equal(qt.grid.zeros, held[name].grid.zeros)
        assert qt.group_index is None
    config = FORMATS[form].quant_config(reader)
    assert (config.bits, config.group_size, config.symmetric) == (bits, 32, symmetric)


@pytest.mark.parametrize(("form", "bits", "symmetric"), CASES)
def test_logits_are_those_of_the_dequantized_weights(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path, form: str, bits: int, symmetric: bool
) -> None:
    source = make_checkpoint()
    held = foreign(source, tmp_path / "q", form, bits, symmetric)
    model, _ = load_quantized(tmp_path / "q", device="cpu", precision="exact")
    dense = load_model(source, device="cpu")
    for name, qt in held.items():
        dense.get_submodule(name).weight.data = qt.dequantize()
    expected = dense(windows)
    assert (model(windows) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ten_3_bit_codes_a_word_as_older_versions_wrote(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 8, (8, 64), dtype=np.uint32)
    words = np.zeros((8, 7), np.uint32)
    for k in range(64):
        words[:, k // 10] |= codes[:, k] << np.uint32(3 * (k % 10))
    state = {
        "m.weight_packed": torch.from_numpy(words.view(np.int32)),
        "m.weight_scale": torch.ones(8, 2),
        "m.weight_shape": torch.tensor([8, 64]),
    }
    save_file(state, tmp_path / "model.safetensors")
    config = {"quantization_config": settings("compressed-tensors", 3, True, 32)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ((_, qt),) = FORMATS["compressed-tensors"].read(open_checkpoint(tmp_path))
    assert np.array_equal(qt.codes.numpy(), codes)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("config_groups", None, "has no config_groups"),
        ("format", "float-quantized", "format 'float-quantized' is not supported"),
        ("config_groups.group_0.weights.type", "float", "not integers"),
        ("config_groups.group_0.weights.strategy", "tensor", "strategy 'tensor' is not supported"),
        ("config_groups.group_0.weights.num_bits", 8, "do not hold 64 codes of any num_bits"),
        ("config_groups.group_0.weights.num_bits", "4", "bits 4 is not supported"),
        ("config_groups.group_0.weights.group_size", "32", "group_size 32 is not supported"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, "quantized activations"),
    ],
)
def test_other_compressed_tensors_are_refused(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    state = {
        "m.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "m.weight_scale": torch.ones(8, 2),
        "m.weight_shape": torch.tensor([8, 64]),
    }
    save_file(state, tmp_path / "model.safetensors")
    config = {"quantization_config": settings("compressed-tensors", 4, True, 32)}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def edit(stored: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            stored = stored[key]
        stored[last] = value

    list(FORMATS["compressed-tensors"].read(open_checkpoint(tmp_path)))
    change(tmp_path, edit)
    form, reader = FORMATS["compressed-tensors"], open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        form.quant_config(reader)
        list(form.read(reader))


def damaged(folder: Path, form: str, **tensors: Tensor) -> CheckpointReader:
    """A folder with one linear `m`, some of whose tensors do not fit."""
    qt = random_tensor((64, 64), 4, False, 32)
    state = (awq if form == "awq" else compressed)("m", qt, False)
    state |= {f"m.{name}": tensor for name, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors")
    config = {"quantization_config": settings(form, 4, False, 32)}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("form", "tensors", "message"),
    [
        ("awq", {"scales": torch.ones(2, 72)}, "do not hold rows of 72 4-bit codes"),
        ("awq", {"scales": torch.ones(3, 64)}, "do not fit together"),
        ("awq", {"scales": torch.full((2, 64), 1e6)}, "not a finite float16"),
        ("compressed-tensors", {"weight_shape": torch.tensor([64])}, "weight_shape .* disagree"),
        ("compressed-tensors", {"weight_shape": torch.tensor([64, 640])}, "do not hold 640 codes"),
        ("compressed-tensors", {"weight_scale": torch.ones(64, 3)}, "do not fit together"),
        ("compressed-tensors", {"weight_g_idx": torch.full((64,), 2)}, "does not name a group"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, form: str, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=f"m: .*{message}|{message}"):
        list(FORMATS[form].read(damaged(tmp_path, form, **tensors)))


def test_groups_of_their_own_order_are_kept(tmp_path: Path) -> None:
    index = torch.arange(64).flip(0) // 32
    reader = damaged(tmp_path, "compressed-tensors", weight_g_idx=index)
    ((_, qt),) = FORMATS["compressed-tensors"].read(reader)
    assert qt.group_index is not None and torch.equal(qt.group_index.long(), index)


def test_scales_that_are_no_float16_are_rounded_and_said_so(tmp_path: Path) -> None:
    scales = torch.full((64, 2), 0.1, dtype=torch.float32)
    reader = damaged(tmp_path, "compressed-tensors", weight_scale=scales)
    with pytest.warns(UserWarning, match="m: scales of torch.float32 are rounded to float16"):
        ((_, qt),) = FORMATS["compressed-tensors"].read(reader)
    assert torch.equal(qt.grid.scales, scales.half().float())


def test_another_awq_is_refused(tmp_path: Path) -> None:
    reader = damaged(tmp_path, "awq")
    change(tmp_path, lambda stored: stored.update(version="gemv"))
    reader = open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="AWQ version 'gemv' with 4 bits is not supported"):
        list(FORMATS["awq"].read(reader))
