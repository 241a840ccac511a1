"""pytest tests/test_llama2c.py: llama2.c files of every version, and their vocabulary."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llama2c_files import write, write_vocabulary
from meta_release import interleaved
from torch import Tensor

from quant.convert import convert
from quant.inspection import describe, will_it_load
from quant.llama.tokenizer import load_tokenizer
from quant.loader import load_model
from quant.pipeline import open_float
from quant.sources import open_checkpoint, open_tokenizer

Make = Callable[..., Path]
BUNDLED = Path(__file__).parents[1] / "quant" / "bundled"


def made(source: Path, version: int, file: Path) -> dict[str, Tensor]:
    return write(source, json.loads((source / "config.json").read_text()), version, file)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_tensors_are_those_of_the_file(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path, version: int, tied: bool
) -> None:
    source = make_checkpoint(tie_word_embeddings=tied)
    held = made(source, version, tmp_path / "m.bin")
    reader = open_checkpoint(tmp_path / "m.bin")
    assert ("lm_head.weight" in reader) != tied
    for i in (0, 1):
        for meta, ours in (
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
        ):
            found = reader.tensor(f"model.layers.{i}.{ours}.weight")
            assert torch.equal(found, held[f"layers.{i}.{meta}"])
        for meta, ours, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
            found = reader.tensor(f"model.layers.{i}.self_attn.{ours}.weight")
            assert torch.equal(interleaved(found, heads), held[f"layers.{i}.attention.{meta}"])
    assert torch.equal(reader.tensor("model.embed_tokens.weight"), held["tok_embeddings"])
    assert torch.equal(reader.tensor("model.norm.weight"), held["norm"])
    if version < 2:
        expected = load_model(source, device="cpu")(windows)
        assert torch.equal(load_model(tmp_path / "m.bin", device="cpu")(windows), expected)


def test_version_2_is_known_to_be_rounded(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    for version in (1, 2):
        made(source, version, tmp_path / f"{version}.bin")
    shutil.copyfile(BUNDLED / "tokenizer.model", tmp_path / "tokenizer.model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_float(tmp_path / "1.bin")
    with pytest.warns(UserWarning, match=r"2\.bin: its weights were rounded before \(int8\)"):
        open_float(tmp_path / "2.bin")
    assert describe(tmp_path / "2.bin")["tensor types"] == "16 int8 (8.5 bits), 5 float32 (32 bits)"
    found = {found.runtime: found for found in will_it_load(tmp_path / "2.bin")}
    assert [name for name in found if found[name].loads] == ["llama.cpp"]
    assert "python cli.py convert" in found["vllm"].why


def test_the_vocabulary_is_rebuilt(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(vocab_size=2048)
    made(source, 1, tmp_path / "m.bin")
    write_vocabulary(BUNDLED / "tokenizer.model", tmp_path / "tokenizer.bin")
    convert(tmp_path / "m.bin", tmp_path / "out")
    ours, theirs = open_tokenizer(tmp_path / "out"), load_tokenizer(BUNDLED)
    facts = (theirs.vocab_size, theirs.bos_id, theirs.eos_ids)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == facts
    for text in (
        "def f(x):\n    return x + 1",
        "  two  spaces ",
        "naïve 日本語 🙂",
        "<s> </s>",
        "",
    ):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert open_tokenizer(tmp_path / "m.bin").encode("a b") == theirs.encode("a b")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d[:20], "20 bytes are too few"),
        (lambda d: d[:-4], "bytes long, .* by its header"),
        (lambda d: d[:4] + struct.pack("<i", 3) + d[8:], "version 3 is unknown"),
        (lambda d: d[:8] + struct.pack("<i", 0) + d[12:], "dim is 0; it must be a positive"),
        (lambda d: d[:16] + struct.pack("<i", 1 << 30) + d[20:], "too few for n_layers 1073741824"),
        (lambda d: d[:20] + struct.pack("<i", 3) + d[24:], "dim 128, 3 and 2 heads do not fit"),
        (lambda d: d[:37] + struct.pack("<i", 0) + d[41:], "group_size is 0; it must be positive"),
        (lambda d: d[:37] + struct.pack("<i", 7) + d[41:], "group_size 7 does not divide"),
    ],
)
def test_headers_that_lie_are_refused(
    make_checkpoint: Make, tmp_path: Path, edit: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "m.bin"
    made(make_checkpoint(), 2, file)
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises(ValueError, match=f"m.bin: .*{message}"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d[:-1], "has length .*, beyond the file"),
        (lambda d: d + b"1234", "token 2048 is cut off"),
        (lambda d: d + bytes(8), "token 2048 is empty"),
        (lambda d: d[:4] + struct.pack("<f", float("nan")) + d[8:], "score nan is not finite"),
        (lambda d: d[:12] + b"\xff" + d[13:], "token 0 is not UTF-8"),
        (lambda d: d[:4], "holds 0 tokens, the model's vocabulary is 2048"),
    ],
)
def test_a_damaged_vocabulary_is_refused(
    make_checkpoint: Make, tmp_path: Path, edit: Callable[[bytes], bytes], message: str
) -> None:
    made(make_checkpoint(vocab_size=2048), 1, tmp_path / "m.bin")
    file = tmp_path / "tokenizer.bin"
    write_vocabulary(BUNDLED / "tokenizer.model", file)
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises(ValueError, match=f"tokenizer.bin: .*{message}"):
        open_tokenizer(tmp_path / "m.bin")
