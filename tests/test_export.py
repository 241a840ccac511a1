"""pytest tests/test_export.py: codes, scales and zeros move exactly between all formats; what
cannot move is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant.config import QuantConfig
from quant.export import Source, export
from quant.formats import autogptq
from quant.grid import Grid, QuantizedTensor
from quant.loader import load_model
from quant.sources import open_checkpoint

Make = Callable[..., Path]
MOVING = ("autogptq", "gptq_v2", "compressed-tensors")


def entries(folder: Path) -> dict[str, Any]:
    return dict(Source.open(folder).entries())


def assert_same(left: Path, right: Path) -> None:
    """Every code, scale, zero, group and plain tensor is the same."""
    mine, theirs = entries(left), entries(right)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        other = theirs[name]
        if isinstance(value, QuantizedTensor):
            assert torch.equal(value.codes, other.codes), name
            assert torch.equal(value.grid.scales, other.grid.scales), name
            assert torch.equal(value.grid.zeros, other.grid.zeros), name
            assert (value.group_index is None) == (other.group_index is None), name
        else:
            assert torch.equal(value, other) and value.dtype == other.dtype, name


GRIDS = [(bits, 64, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize("grid", [*GRIDS, (4, -1, True), (4, -1, False)])
def test_every_pair_of_formats_is_exact(
    quantized: Callable[..., Path], tmp_path: Path, grid: tuple[int, int, bool]
) -> None:
    config = QuantConfig(*grid)
    source = quantized(config)
    for first in MOVING:
        export(source, tmp_path / first, first)
        assert_same(source, tmp_path / first)
        for second in MOVING:
            export(tmp_path / first, tmp_path / f"{first}-{second}", second)
            assert_same(source, tmp_path / f"{first}-{second}")
            opened = Source.open(tmp_path / f"{first}-{second}")
            assert opened.config == config


def test_bytes_return(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """autogptq -> compressed-tensors -> autogptq gives the tensors that quantize wrote."""
    source = quantized(QuantConfig(4, 64))
    export(source, tmp_path / "ct", "compressed-tensors")
    export(tmp_path / "ct", tmp_path / "back", "autogptq")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back" / "tokenizer.model").is_file()


def test_the_layout_of_compressed_tensors(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """The packed words are the transposed GPTQ words, zeros those of version 2."""
    source = quantized(QuantConfig(4, 64, symmetric=False))
    export(source, tmp_path / "ct", "compressed-tensors")
    gptq, packed = (load_file(path / "model.safetensors") for path in (source, tmp_path / "ct"))
    name = "model.layers.1.mlp.down_proj."
    assert torch.equal(packed[name + "weight_packed"], gptq[name + "qweight"].T)
    assert torch.equal(packed[name + "weight_scale"], gptq[name + "scales"].T)
    assert torch.equal(packed[name + "weight_zero_point"], gptq[name + "qzeros"].T)
    assert packed[name + "weight_shape"].tolist() == [128, 256]
    stored = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert stored["ignore"] == ["lm_head"] and stored["format"] == "pack-quantized"


def one_linear(folder: Path, zeros: int, version: int, index: torch.Tensor | None = None) -> Path:
    """A GPTQ checkpoint of a tiny model in which one linear has such zeros or groups."""
    name = "model.layers.0.self_attn.q_proj"
    value = entries(folder)[name]
    grid = Grid(value.grid.scales, torch.full_like(value.grid.zeros, zeros), 4)
    odd = folder.with_name("odd")
    odd.mkdir()
    writer = autogptq.Writer(odd, QuantConfig(4, 64, False), {}, version=version)
    for other, tensor in entries(folder).items():
        if isinstance(tensor, QuantizedTensor):
            swap = QuantizedTensor(tensor.codes, grid, index) if other == name else tensor
            writer.add_quantized(other, swap)
        else:
            writer.add_plain(other, tensor)
    writer.close(open_checkpoint(folder).config)
    return odd


@pytest.mark.parametrize(
    ("zeros", "version", "to", "message"),
    [
        (0, 2, "autogptq", "has a zero of 0, but version 1 of the GPTQ format holds 1 to 16"),
        (16, 1, "gptq_v2", "has a zero of 16, but version 2 of the GPTQ format holds 0 to 15"),
        (16, 1, "compressed-tensors", "has a zero of 16, but compressed-tensors holds 0 to 15"),
    ],
)
def test_zeros_that_would_wrap_are_refused(
    quantized: Callable[..., Path],
    tmp_path: Path,
    zeros: int,
    version: int,
    to: str,
    message: str,
) -> None:
    odd = one_linear(quantized(QuantConfig(4, 64, False)), zeros, version)
    with pytest.raises(ValueError, match=message):
        export(odd, tmp_path / "target", to)
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


def test_shuffled_groups(quantized: Callable[..., Path], tmp_path: Path) -> None:
    index = torch.arange(128).flip(0) % 2
    odd = one_linear(quantized(QuantConfig(4, 64, False)), 3, 2, index)
    with pytest.raises(ValueError, match="not consecutive inputs"):
        export(odd, tmp_path / "ct", "compressed-tensors")
    export(odd, tmp_path / "v1", "autogptq")
    assert_same(odd, tmp_path / "v1")
    assert json.loads((tmp_path / "v1" / "quantize_config.json").read_text())["desc_act"] is True


def test_refusals(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(ValueError, match="is not quantized, so there are no codes to move"):
        export(source, tmp_path / "x", "compressed-tensors")
    with pytest.raises(ValueError, match="cannot export to 'x'; there are autogptq"):
        export(source, tmp_path / "x", "x")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        export(source, tmp_path / "there", "float32")


def test_a_tied_head_is_written_once(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(tie_word_embeddings=True)
    export(source, tmp_path / "float", "float32")
    names = open_checkpoint(tmp_path / "float").names()
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


@pytest.mark.parametrize("grid", [*GRIDS, (4, -1, True), (4, -1, False)])
def test_the_package_of_the_format_decompresses_our_weights(
    quantized: Callable[..., Path], tmp_path: Path, grid: tuple[int, int, bool]
) -> None:
    config = QuantConfig(*grid)
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = quantized(config)
    export(source, tmp_path / "ct", "compressed-tensors")
    reader = open_checkpoint(tmp_path / "ct")
    stored = QuantizationConfig.model_validate(reader.config["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    module = "model.layers.0.mlp.up_proj"
    names = [name for name in reader.names() if name.startswith(module)]
    state = {name.removeprefix(f"{module}."): reader.tensor(name) for name in names}
    state["weight_scale"] = state["weight_scale"].float()  # it multiplies in the dtype of scales
    plain = compressor.decompress(state, stored.config_groups["group_0"])
    assert torch.equal(plain["weight"], entries(source)[module].dequantize())


@pytest.mark.parametrize("grid", [(4, 64, True), (8, -1, True)])
def test_transformers_reads_compressed_tensors(
    quantized: Callable[..., Path], tmp_path: Path, grid: tuple[int, int, bool]
) -> None:
    """Its logits are ours. Symmetric only: transformers 5.24 with compressed-tensors 0.20 expects
    zeros of asymmetric grids unpacked, unlike the package itself.
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    source = quantized(QuantConfig(*grid))
    export(source, tmp_path / "ct", "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        logits = theirs(ids).logits
    ours = load_model(tmp_path / "ct", "cpu", "float32", "reference", "exact")(ids)
    assert (logits - ours).abs().max() < 1e-5 * ours.abs().max()
    weight = theirs.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, entries(source)["model.layers.0.mlp.up_proj"].dequantize())
