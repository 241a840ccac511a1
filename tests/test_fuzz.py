"""pytest tests/test_fuzz.py: every reader ends damaged files in success or in one clear line.

FUZZ_MUTATIONS=2000 pytest tests/test_fuzz.py damages each kind of file 2000 times instead of 100.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLED, GEOMETRY, random_state
from meta_release import write_meta
from mutations import damaged_bytes, damaged_objects, ends_well, little_memory
from safetensors.torch import save_file

from quant import QuantConfig, RTNOptions, quantize_checkpoint
from quant.loader import load_model
from quant.sources import open_tokenizer

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "100"))
SMALL = {
    **GEOMETRY,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def attack(file: Path, variants: Iterator[bytes], read: Callable[[], Any]) -> None:
    """Put each variant in the place of the file and read; some must be refused."""
    original = file.read_bytes()
    assert ends_well(read)
    refused = 0
    with little_memory():
        for number, variant in enumerate(variants):
            # A new file each time: the one before may still be mapped.
            file.unlink()
            file.write_bytes(variant)
            try:
                refused += not ends_well(read)
            except BaseException as error:
                raise AssertionError(f"{file.name}, mutation {number}: {error!r}") from error
    file.unlink()
    file.write_bytes(original)
    assert refused > MUTATIONS // 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the smallest model, in one file."""
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(random_state(SMALL), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL))
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / file, folder / file)
    return folder


def test_safetensors_header(model: Path) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    reach = 8 + int.from_bytes(data[:8], "little")
    attack(file, damaged_bytes(data, reach, 1, MUTATIONS), lambda: load_model(model, "cpu"))


def test_safetensors_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(random_state(SMALL), "a.safetensors")}
    file = model / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    attack(file, damaged_objects(index, 2, MUTATIONS), lambda: load_model(model, "cpu"))


@pytest.mark.parametrize("version", ["4", "5"])
def test_config(model: Path, version: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    more: dict[str, Any] = {"rope_theta": 1e4, "rope_scaling": rope}
    if version == "5":
        more = {"rope_parameters": {**rope, "rope_theta": 1e4}, "head_dim": 16}
    config, file = {**SMALL, **more}, model / "config.json"
    file.write_text(json.dumps(config))
    attack(file, damaged_objects(config, 3, MUTATIONS), lambda: load_model(model, "cpu"))


def test_pytorch_bin(model: Path) -> None:
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save(random_state(SMALL), file)
    data = file.read_bytes()
    attack(file, damaged_bytes(data, 6000, 4, MUTATIONS), lambda: load_model(model, "cpu"))


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json"])
def test_meta(model: Path, tmp_path: Path, name: str) -> None:
    folder = write_meta(model, tmp_path / "meta" / "7b", 1)
    data = (folder / name).read_bytes()
    variants = damaged_bytes(data, 6000, 5, MUTATIONS)
    if name.endswith(".json"):
        variants = damaged_objects(json.loads(data), 5, MUTATIONS)
    attack(folder / name, variants, lambda: load_model(folder, "cpu"))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c(model: Path, tmp_path: Path, version: int) -> None:
    from llama2c_files import write

    file = tmp_path / "m.bin"
    write(model, SMALL, version, file, group=32)
    variants = damaged_bytes(file.read_bytes(), 45, 6, MUTATIONS)
    attack(file, variants, lambda: load_model(file, "cpu"))


def test_llama2c_vocabulary(model: Path, tmp_path: Path) -> None:
    from llama2c_files import write, write_vocabulary

    write(model, {**SMALL, "vocab_size": 2048}, 1, tmp_path / "m.bin")
    config = {**SMALL, "vocab_size": 2048}
    save_file(random_state(config), model / "model.safetensors")
    write(model, config, 1, tmp_path / "m.bin")
    file = tmp_path / "tokenizer.bin"
    write_vocabulary(BUNDLED / "tokenizer.model", file)
    variants = damaged_bytes(file.read_bytes(), 200, 7, MUTATIONS)
    attack(file, variants, lambda: open_tokenizer(tmp_path / "m.bin").encode("a text"))


def test_gguf(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_files import write

    file = tmp_path / "m.gguf"
    with_vocabulary = {**SMALL, "vocab_size": 2048}
    save_file(random_state(with_vocabulary), model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(with_vocabulary))
    write(model, file, gguf.GGMLQuantizationType.Q8_0)
    data = file.read_bytes()
    table = data.index(struct.pack("<Q", 17) + b"token_embd.weight")

    def read() -> None:
        load_model(file, "cpu")
        open_tokenizer(file).encode("a text")

    half = MUTATIONS // 2
    attack(file, damaged_bytes(data, 600, 8, half), read)
    behind = damaged_bytes(data[table:], 1200, 9, MUTATIONS - half)
    attack(file, (data[:table] + tail for tail in behind), read)


def test_sentencepiece_model(model: Path) -> None:
    file = model / "tokenizer.model"
    data = file.read_bytes()

    def read() -> None:
        tokenizer = open_tokenizer(model)
        tokenizer.decode(tokenizer.encode("naïve 日本語 text"))

    half = MUTATIONS // 2
    attack(file, damaged_bytes(data, len(data), 10, half), read)
    tails = damaged_bytes(data[-200:], 200, 11, MUTATIONS - half)
    attack(file, (data[:-200] + tail for tail in tails), read)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_json(model: Path, name: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>"])
    (model / "tokenizer.model").unlink()
    inner.save(str(model / "tokenizer.json"))
    value = json.loads((model / name).read_text())
    attack(
        model / name,
        damaged_objects(value, 12, MUTATIONS),
        lambda: open_tokenizer(model).encode("ab b"),
    )


@pytest.mark.parametrize("where", ["quantize_config.json", "config.json", "model.safetensors"])
def test_quantized(model: Path, tmp_path: Path, where: str) -> None:
    windows = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(model, tmp_path / "q", windows, QuantConfig(4, 32), RTNOptions())
    folder = tmp_path / "q"
    if where == "quantize_config.json":
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    data = (folder / where).read_bytes()
    if where.endswith(".json"):
        variants = damaged_objects(json.loads(data), 13, MUTATIONS)
    else:
        variants = damaged_bytes(data, 8 + int.from_bytes(data[:8], "little"), 14, MUTATIONS)
    attack(folder / where, variants, lambda: load_model(folder, "cpu", backend="reference"))


@pytest.mark.parametrize("where", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("form", ["compressed-tensors", "awq"])
def test_quantized_by_others(model: Path, tmp_path: Path, form: str, where: str) -> None:
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    from foreign_files import foreign

    folder = tmp_path / "q"
    foreign(model, folder, form, 4, form != "awq")
    data = (folder / where).read_bytes()
    if where == "config.json":  # half of the damage to the settings of the format
        config = json.loads(data)
        settings = damaged_objects(config["quantization_config"], 15, MUTATIONS // 2)
        quarter = b'"quantization_config": '
        start = json.dumps({**config, "quantization_config": 0}).encode()[: -len("0}")]
        assert start.endswith(quarter)
        damaged = [start + value + b"}" for value in settings]
        variants = iter([*damaged, *damaged_objects(config, 16, MUTATIONS // 2)])
    else:
        variants = damaged_bytes(data, 8 + int.from_bytes(data[:8], "little"), 17, MUTATIONS)
    attack(folder / where, variants, lambda: load_model(folder, "cpu", backend="reference"))
