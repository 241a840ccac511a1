"""pytest tests/test_export_gguf.py: files with our weights, as the `gguf` package sees them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quant.config import QuantConfig
from quant.export import Source, export
from quant.formats import autogptq
from quant.formats.gguf_blocks import of_grid, q8_0
from quant.grid import Grid, QuantizedTensor, fit_minmax, nearest_codes
from quant.sources import open_checkpoint

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize, quantize  # noqa: E402

Make = Callable[..., Path]
GEOMETRY = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}


def quantized_folder(source: Path, folder: Path, config: QuantConfig) -> Path:
    """A float checkpoint rounded to that grid, in the GPTQ format."""
    folder.mkdir()
    writer = autogptq.Writer(folder, config, {})
    for name, tensor in Source.open(source).entries():
        assert isinstance(tensor, torch.Tensor)
        if name.endswith("_proj.weight"):
            grid = fit_minmax(tensor.float(), config)
            codes = nearest_codes(tensor.float(), grid)
            if config.symmetric:  # scales of either sign, as solvers that search them return
                sign = torch.where(torch.arange(len(grid.scales)) % 2 == 0, 1.0, -1.0)
                grid = Grid(grid.scales * sign[:, None], grid.zeros, grid.bits)
            writer.add_quantized(name.removesuffix(".weight"), QuantizedTensor(codes, grid))
        else:
            writer.add_plain(name, tensor)
    reader = open_checkpoint(source)
    writer.close(reader.config)
    reader.copy_companions(folder)
    return folder


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Keys, float32 tensors and type names, as the package reads them."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))
        for t in reader.tensors
    }
    return keys, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from halves of a head to neighbours, written out row by row."""
    head_dim = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return weight[rows]


@pytest.mark.parametrize(
    ("config", "kind", "file_type"),
    [
        (QuantConfig(4, 32), "Q4_0", 2),
        (QuantConfig(4, 128), "Q4_0", 2),
        (QuantConfig(4, -1), "Q4_0", 2),
        (QuantConfig(4, 64, False), "Q4_1", 3),
        (QuantConfig(8, 64), "Q8_0", 7),
        (None, "F16", 1),
    ],
)
def test_the_package_dequantizes_our_weights(
    make_checkpoint: Make, tmp_path: Path, config: QuantConfig | None, kind: str, file_type: int
) -> None:
    source = make_checkpoint()
    folder = quantized_folder(source, tmp_path / "out", config) if config else source
    done = export(folder, tmp_path / "m.gguf", "gguf")
    keys, tensors, kinds = read(tmp_path / "m.gguf")
    assert keys["general.file_type"] == file_type and keys["general.architecture"] == "llama"
    assert keys["llama.attention.head_count_kv"] == 2 and keys["llama.rope.dimension_count"] == 32
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    wanted = dict(Source.open(folder).entries())
    for theirs, mine in {
        f"blk.1.{b}.weight": f"model.layers.1.{a}" for a, b in names.items()
    }.items():
        assert kinds[theirs] == kind
        value = wanted.get(mine, wanted.get(f"{mine}.weight"))
        weight = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
        for part, heads in (("attn_q", 4), ("attn_k", 2)):
            weight = interleaved(weight, heads) if part in theirs else weight
        if kind == "Q4_1":
            scales = value.grid.scales.repeat_interleave(64, 1)
            assert ((tensors[theirs] - weight).abs() / scales.max()).max() <= 0.0074
            assert not torch.equal(tensors[theirs], weight)
        else:
            assert torch.equal(tensors[theirs], weight)
    assert torch.equal(tensors["token_embd.weight"], wanted["model.embed_tokens.weight"].float())
    assert torch.equal(tensors["output.weight"], wanted["lm_head.weight"].float())
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(tensors["blk.0.ffn_norm.weight"], wanted[norm].float())
    assert kinds["blk.0.ffn_norm.weight"] == "F32" and kinds["output.weight"] == "F16"
    assert len(tensors) == 3 + 2 * 9
    assert bool(done.notes) == (kind == "Q4_1")


@pytest.mark.parametrize("zero", range(16))
def test_q4_1_is_exact_where_scale_times_zero_is_float16(zero: int) -> None:
    """Exact for zeros with one set bit; the measured error is the true one, below 0.0074 scales."""
    generator = torch.Generator().manual_seed(zero)
    codes = torch.randint(0, 16, (256, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand(256, 2, generator=generator).half().float() + 0.01
    qt = QuantizedTensor(codes, Grid(scales.half().float(), torch.full((256, 2), zero).byte(), 4))
    blocks = of_grid("a", qt)
    if zero == 8:
        assert blocks.kind == gguf.GGMLQuantizationType.Q4_0
        return
    data = blocks.data.reshape(256, -1).numpy()
    theirs = torch.from_numpy(dequantize(data, gguf.GGMLQuantizationType.Q4_1))
    error = ((theirs - qt.dequantize()).abs() / qt.grid.scales.repeat_interleave(32, 1)).max()
    assert torch.equal(theirs, qt.dequantize()) == (zero in (0, 1, 2, 4)) == (blocks.error == 0)
    assert abs(float(error) - blocks.error) < 1e-5 and blocks.error < 0.0074


def test_q8_0_is_the_packages(make_checkpoint: Make, tmp_path: Path) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    theirs = quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(q8_0(weight).data.reshape(64, -1).numpy(), theirs)
    source = make_checkpoint()
    done = export(source, tmp_path / "m.gguf", "gguf", head="q8_0")
    _, _, kinds = read(tmp_path / "m.gguf")
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "F16" and "rounded to Q8_0" in done.notes[0]


def test_a_sentencepiece_vocabulary(make_checkpoint: Make, tmp_path: Path) -> None:
    """Every piece, score and type; the rows beyond the tokenizer are unused."""
    from sentencepiece import SentencePieceProcessor

    source = make_checkpoint()
    settings = {"chat_template": "{{ x }}", "add_bos_token": True, "pad_token": "<pad>"}
    settings["added_tokens_decoder"] = {"2070": {"content": "<pad>", "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export(source, tmp_path / "m.gguf", "gguf")
    keys, _, _ = read(tmp_path / "m.gguf")
    sp = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    size = sp.vocab_size()
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[:size] == [sp.id_to_piece(i) for i in range(size)] and len(tokens) == 2080
    scores = keys["tokenizer.ggml.scores"]
    assert scores[:size] == [sp.get_score(i) for i in range(size)]
    assert kinds[:4] == [2, 3, 3, 6] and tokens[3] == "<0x00>" and kinds[300] == 1
    assert tokens[2060] == "[PAD2060]" and kinds[2060] == 5 and scores[2060] == -10000
    assert tokens[2070] == "<pad>" and kinds[2070] == 3
    assert keys["tokenizer.ggml.padding_token_id"] == 2070
    assert keys["tokenizer.ggml.bos_token_id"] == 1 and keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(3, 32), "GGUF has no block for a grid of 3 bits, symmetric"),
        (QuantConfig(8, 32, False), "GGUF has no block for a grid of 8 bits, asymmetric"),
    ],
)
def test_grids_without_a_block_are_refused(
    make_checkpoint: Make, tmp_path: Path, config: QuantConfig, message: str
) -> None:
    folder = quantized_folder(make_checkpoint(), tmp_path / "out", config)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "m.gguf", "gguf")
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_refusals(make_checkpoint: Make, tmp_path: Path) -> None:
    codes, ones = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 4)
    narrow = QuantizedTensor(codes, Grid(ones, ones.byte(), 4))
    with pytest.raises(ValueError, match="groups of 16 inputs are not whole blocks of 32"):
        of_grid("a", narrow)
    shuffled = QuantizedTensor(codes, Grid(ones, ones.byte(), 4), torch.zeros(64))
    with pytest.raises(ValueError, match="its groups are not consecutive inputs"):
        of_grid("a", shuffled)
    source = make_checkpoint()
    with pytest.raises(ValueError, match="head 'x' is unknown"):
        export(source, tmp_path / "m.gguf", "gguf", head="x")
    with pytest.raises(ValueError, match="--head q8_0 is for gguf"):
        export(source, tmp_path / "m", "float32", head="q8_0")
    with pytest.raises(ValueError, match="x-gguf: no reader .*; give a name that ends in .gguf"):
        export(source, tmp_path / "x-gguf", "gguf")
    shutil.rmtree(source / "none", ignore_errors=True)
    (source / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        export(source, tmp_path / "m.gguf", "gguf")


def test_rotary_scaling_biases_and_tied_heads(make_checkpoint: Make, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0}
    source = make_checkpoint(tie_word_embeddings=True, rope_scaling=rope)
    export(source, tmp_path / "m.gguf", "gguf")
    keys, tensors, _ = read(tmp_path / "m.gguf")
    assert keys["llama.rope.scaling.type"] == "linear"
    assert keys["llama.rope.scaling.factor"] == 4 and "output.weight" not in tensors
    dynamic = make_checkpoint("dynamic", rope_scaling={**rope, "rope_type": "dynamic"})
    done = export(dynamic, tmp_path / "d.gguf", "gguf")
    assert "no dynamic rotary scaling" in done.notes[0]
    biased = make_checkpoint("biased", attention_bias=True)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.bias is missing from the ch"):
        export(biased, tmp_path / "b.gguf", "gguf")


def test_our_own_reader_has_the_same_weights(make_checkpoint: Make, tmp_path: Path) -> None:
    """GGUF as a source gives the Hugging Face order and the values back, and the tokenizer."""
    source = make_checkpoint()
    folder = quantized_folder(source, tmp_path / "out", QuantConfig(4, 64))
    export(folder, tmp_path / "m.gguf", "gguf")
    back = open_checkpoint(tmp_path / "m.gguf")
    for name, value in Source.open(folder).entries():
        if isinstance(value, QuantizedTensor):
            assert torch.equal(back.tensor(f"{name}.weight").float(), value.dequantize()), name
        else:
            assert torch.equal(back.tensor(name).float(), value.float()), name
    export(tmp_path / "m.gguf", tmp_path / "again.gguf", "gguf", head="q8_0")
    assert read(tmp_path / "again.gguf")[0]["tokenizer.ggml.tokens"][5] == "<0x02>"
