"""pytest tests/test_gguf.py: GGUF files, against the gguf package."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meta_release import interleaved
from test_cli import cli
from torch import Tensor

from quant import QuantConfig, RTNOptions, load_quantized, quantize_checkpoint
from quant.convert import convert
from quant.export import export
from quant.inspection import describe, will_it_load
from quant.llama.tokenizer import load_tokenizer
from quant.loader import load_model
from quant.sources import gguf_blocks, open_checkpoint, open_tokenizer

gguf = pytest.importorskip("gguf")
from gguf_files import write  # noqa: E402

Make = Callable[..., Path]
Kind = gguf.GGMLQuantizationType
BUNDLED = Path(__file__).parents[1] / "quant" / "bundled"
OURS = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"}
SHARED = OURS | {"Q5_0", "Q5_1", "TQ1_0"}  # the last three through the package


@pytest.mark.parametrize("kind", sorted(SHARED))
def test_values_are_those_of_the_package(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path, kind: str
) -> None:
    source = make_checkpoint(hidden_size=256)
    held = write(source, tmp_path / "m.gguf", Kind[kind])
    reader = open_checkpoint(tmp_path / "m.gguf")
    for name, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ):
        assert torch.equal(reader.tensor(name).float(), torch.from_numpy(held[theirs])), name
    for name, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        found = reader.tensor(f"model.layers.1.self_attn.{name}.weight").float()
        expected = torch.from_numpy(held[f"blk.1.{theirs}.weight"])
        assert torch.equal(interleaved(found, heads), expected)
    if kind in ("F16", "F32"):
        logits = load_model(tmp_path / "m.gguf", device="cpu")(windows)
        assert torch.equal(logits, load_model(source, device="cpu")(windows))


def test_vocabulary_and_settings(make_checkpoint: Make, tmp_path: Path) -> None:
    write(make_checkpoint(), tmp_path / "m.gguf", Kind.F16)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ours, theirs = open_tokenizer(tmp_path / "out"), load_tokenizer(BUNDLED)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (2080, 1, (2,))
    for text in ("def f(x):\n    return x + 1", "  two  spaces ", "naïve 日本語 🙂", "<s>", ""):
        assert ours.encode(text) == theirs.encode(text)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert {key: config[key] for key in expected if key != "rms_norm_eps"} == {
        key: value for key, value in expected.items() if key != "rms_norm_eps"
    }
    assert config["rms_norm_eps"] == struct.unpack("<f", struct.pack("<f", 1e-5))[0]


def test_another_vocabulary_is_not_invented(make_checkpoint: Make, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(make_checkpoint(), file, Kind.F16)
    old = b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 5)
    file.write_bytes(file.read_bytes().replace(old + b"llama", old + b"other"))
    with pytest.warns(UserWarning, match="vocabulary of kind 'other' is not rebuilt"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_type_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="type Q4_K is read through the gguf package"):
        gguf_blocks.row_bytes(12, 256)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="type 999 is not supported"):
        gguf_blocks.row_bytes(999, 256)
    with pytest.raises(ValueError, match="rows of 40 values do not consist of blocks of 32"):
        gguf_blocks.row_bytes(2, 40)


def test_inspect_tells_the_types(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    write(source, tmp_path / "m.gguf", Kind.Q4_0, Kind.F16)
    told = describe(tmp_path / "m.gguf")
    assert told["format"] == "GGUF file"
    assert told["tensor types"] == "14 Q4_0 (4.5 bits), 5 F32 (32 bits), 2 F16 (16 bits)"
    assert told["to quantize"] == "no: it is quantized already" and "output size" not in told
    loads = {found.runtime: found.loads for found in will_it_load(tmp_path / "m.gguf")}
    assert [name for name in loads if not loads[name]] == ["exllamav2", "gptqmodel"]
    write(source, tmp_path / "m.gguf", Kind.Q8_0)
    told = describe(tmp_path / "m.gguf")
    assert told["tensor types"] == "16 Q8_0 (8.5 bits), 5 F32 (32 bits)" and "output size" in told


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0"])
def test_coarse_blocks_are_not_quantized_again(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "m.gguf"
    write(make_checkpoint(), file, Kind[kind], Kind.F16)
    message = f"m.gguf: is quantized already \\(model.layers.0.*_proj.weight is {kind}\\); give the"
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(file, tmp_path / "out", windows, QuantConfig(4, 32), RTNOptions())
    with pytest.raises(ValueError, match=r"m.gguf: codes are not moved from its blocks \(model"):
        export(file, tmp_path / "out", "gptq_v2")
    model, _ = load_quantized(file, device="cpu")
    assert torch.isfinite(model(windows)).all()


def test_eight_bits_are_quantized_with_a_warning(make_checkpoint: Make, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(make_checkpoint(vocab_size=2048), file, Kind.Q8_0)
    sizes = ["--samples", "4", "--seq-len", "64", "--solver", "rtn", "--output", "out"]
    run = cli("quantize", "--model", file, *sizes, cwd=tmp_path)
    assert run.returncode == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    told = [line for line in run.stderr.splitlines() if "rounded" in line]
    assert len(told) == 1
    assert told[0].startswith(f"warning: {file}: its weights were rounded before (Q8_0), and")


def replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return edit


def key(name: str, kind: int) -> bytes:
    return name.encode() + struct.pack("<I", kind)


SCORES = key("tokenizer.ggml.scores", 9)
LAYERS = key("llama.block_count", 4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: b"", "is empty"),
        (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "GGUF version 1 is not supported"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "keys .* too many"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "tensors .* too many"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 15) + d[24:], "beyond the end|type|long"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 15) + d[16:], "beyond the end|dimensions|long"),
        (lambda d: d[:24] + struct.pack("<Q", 1 << 60) + d[32:], "name of key 0 is .* bytes long"),
        (lambda d: d[:-4096], "ends at byte .*; it is truncated"),
        (replace(b"llama.block_count", b"llama.block_xxxxx"), "num_hidden_layers is None"),
        (replace(LAYERS + b"\2\0\0\0", LAYERS + b"\0\0\0\x80"), "the file has 2 layers"),
        (replace(b"blk.1.attn_q", b"blk.1.attn_x"), "tensor blk.1.attn_x.weight is not one of"),
        (replace(b"blk.1.attn_q", b"blk.0.attn_q"), "the file has 1 layers"),
        (
            replace(SCORES + b"\6\0\0\0", SCORES + b"\x09\0\0\0"),
            "array of .* type 9",
        ),
    ],
)
def test_headers_that_lie_are_refused(
    make_checkpoint: Make, tmp_path: Path, edit: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "m.gguf"
    write(make_checkpoint(), file, Kind.F16)
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises(ValueError, match=f"m.gguf: .*({message})"):
        open_checkpoint(file)


def test_a_count_that_the_weights_could_hold_makes_no_list(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    """As many scores as fit into the file would be a list of eight times its size."""
    file = tmp_path / "m.gguf"
    write(make_checkpoint(), file, Kind.F16)
    data = file.read_bytes()
    place = data.index(SCORES + b"\6\0\0\0") + len(SCORES) + 4
    file.write_bytes(data[:place] + struct.pack("<Q", 1 << 24) + data[place + 8 :])
    os.truncate(file, 1 << 27)  # sparse
    with pytest.raises(ValueError, match="scores is an array of 16777216 values; it is damaged"):
        open_checkpoint(file)
