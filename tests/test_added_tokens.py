"""pytest tests/test_added_tokens.py: new tokens, and batches that are padded on the left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLED
from meta_release import hugging_face_state
from torch import Tensor

from quant import QuantConfig, RTNOptions, generate_batch, load_quantized, quantize_checkpoint
from quant.added_tokens import NewTokens
from quant.convert import convert
from quant.llama.config import LlamaConfig
from quant.llama.generate import Sampling, generate
from quant.llama.model import Llama
from quant.llama.tokenizer import load_tokenizer
from quant.loader import load_model

Make = Callable[..., Path]
PAD = NewTokens(("<pad>", "<tool>"), "<pad>")


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("rows", ["mean", "zeros"])
def test_files_and_matrices_grow(make_checkpoint: Make, tmp_path: Path, rows: str) -> None:
    source, out = make_checkpoint(vocab_size=2048), tmp_path / "out"
    convert(source, out, new=NewTokens(PAD.tokens, PAD.pad, rows))
    old, new = hugging_face_state(source), hugging_face_state(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(new[name][:2048], old[name]) and new[name].shape == (2050, 128)
        expected = old[name].double().mean(0) if rows == "mean" else torch.zeros(128)
        assert (new[name][2048:] - expected).abs().max() <= 2**-11 * expected.abs().max()
    assert read(out, "config.json")["vocab_size"] == 2050
    assert read(out, "config.json")["pad_token_id"] == 2048
    assert read(out, "generation_config.json")["pad_token_id"] == 2048
    assert read(out, "added_tokens.json") == {"<pad>": 2048, "<tool>": 2049}
    settings = read(out, "tokenizer_config.json")
    assert settings["pad_token"] == "<pad>" and settings["added_tokens_decoder"]["2049"]["special"]
    assert read(out, "special_tokens_map.json") == {"pad_token": "<pad>"}
    text = "<pad> stays text"
    assert load_tokenizer(out).encode(text) == load_tokenizer(source).encode(text)


def test_transformers_sees_the_tokens(make_checkpoint: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(make_checkpoint(vocab_size=2048), tmp_path / "out", new=PAD)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", 2048, 2050)
    assert tokenizer.convert_tokens_to_ids("<tool>") == 2049
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape == (2050, 128)


def test_rows_that_are_there_already_are_used(make_checkpoint: Make, tmp_path: Path) -> None:
    convert(make_checkpoint(vocab_size=2080), tmp_path / "out", new=PAD)
    assert read(tmp_path / "out", "config.json")["vocab_size"] == 2080
    assert read(tmp_path / "out", "config.json")["pad_token_id"] == 2048
    convert(tmp_path / "out", tmp_path / "more", new=NewTokens(("<x>", "<pad>"), "</s>"))
    assert read(tmp_path / "more", "added_tokens.json")["<x>"] == 2050
    assert read(tmp_path / "more", "config.json")["pad_token_id"] == 2


def test_tokenizer_json_gets_the_same(make_checkpoint: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    source = make_checkpoint()
    (source / "tokenizer.model").unlink()
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(source / "tokenizer.json"))
    convert(source, tmp_path / "out", new=PAD)
    inner = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (inner.token_to_id("<pad>"), inner.token_to_id("<tool>")) == (2, 3)
    assert read(tmp_path / "out", "config.json")["pad_token_id"] == 2
    shutil.copyfile(BUNDLED / "tokenizer.model", source / "tokenizer.model")
    with pytest.raises(ValueError, match="gives the new tokens the ids .* tokenizer.model"):
        convert(source, tmp_path / "two", new=PAD)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NewTokens(("",)), "a token to add is empty"),
        (lambda: NewTokens(("x",), None, "ones"), "new rows 'ones' are unknown; there are mean"),
    ],
)
def test_wrong_tokens_are_refused(make: Callable[[], NewTokens], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_pad_token_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(ValueError, match="pad token '<p>' is not in the vocabulary; add it with"):
        convert(source, tmp_path / "out", new=NewTokens((), "<p>"))
    (source / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no tokenizer.model or tokenizer.json to add tokens to"):
        convert(source, tmp_path / "out", new=PAD)


def test_quantizing_a_model_with_new_tokens(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    convert(make_checkpoint(vocab_size=2048), tmp_path / "big", new=PAD)
    quantize_checkpoint(tmp_path / "big", tmp_path / "q", windows, QuantConfig(4, 32), RTNOptions())
    model, tokenizer = load_quantized(tmp_path / "q", device="cpu")
    assert model(windows).shape[-1] == 2050 and tokenizer.decode([2048]) == ""
    assert read(tmp_path / "q", "generation_config.json")["pad_token_id"] == 2048


PROMPTS = ["def ", "import os\nimport sys\n\n", "    return self.x + 1\n\n\ndef f("]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, 3)])
def test_each_row_of_a_batch_is_as_alone(sampling: Sampling) -> None:
    model, tokenizer = load_model(BUNDLED, device="cpu"), load_tokenizer(BUNDLED)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len({len(ids) for ids in prompts}) > 1
    alone = [list(generate(model, ids, 12, sampling)) for ids in prompts]
    assert generate_batch(model, prompts, 12, sampling) == alone
    stop = {alone[0][6], alone[1][3]}
    ended = [list(generate(model, ids, 12, sampling, stop)) for ids in prompts]
    assert generate_batch(model, prompts, 12, sampling, stop) == ended


@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 2.0}])
def test_logits_of_a_padded_row_are_those_without(
    make_checkpoint: Make, windows: Tensor, rope: dict[str, Any] | None
) -> None:
    """Also beyond the positions of the model, where the rotation depends on the length."""
    from quant.llama.cache import KVCache

    sizes = {"max_position_embeddings": 16, **({"rope_scaling": rope} if rope else {})}
    model = load_model(make_checkpoint(dtype=torch.float32, **sizes), device="cpu")
    ids = windows[:2, :40]
    cache = KVCache(model.config, 2, 40)
    cache.padding = (0, 21)
    padded = model(ids, cache)
    alone = model(ids[1:, 21:])
    assert (padded[:1] - model(ids[:1])).abs().max() <= 1e-5 * alone.abs().max()
    assert (padded[1:, 21:] - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert torch.isfinite(padded).all()


def test_prompts_without_tokens_are_refused() -> None:
    geometry = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    raw = {"model_type": "llama", "num_attention_heads": 1, **geometry}
    model = Llama(LlamaConfig.from_dict(raw))
    assert generate_batch(model, []) == []
    with pytest.raises(ValueError, match="the prompt holds no tokens"):
        generate_batch(model, [[1], []])
    with pytest.raises(ValueError, match="token id 8 is outside the model's vocabulary of 8"):
        generate_batch(model, [[1], [8]])


@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_each_row_of_a_batch_of_a_quantized_model_is_as_alone(
    tmp_path: Path, windows: Tensor, precision: str
) -> None:
    """Its text does not depend on the rows beside it."""
    quantize_checkpoint(BUNDLED, tmp_path / "q", windows, QuantConfig(4, 64), RTNOptions())
    model, tokenizer = load_quantized(tmp_path / "q", device="cpu", precision=precision)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    alone = [list(generate(model, ids, 12)) for ids in prompts]
    assert generate_batch(model, prompts, 12) == alone
