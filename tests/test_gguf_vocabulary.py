"""pytest tests/test_gguf_vocabulary.py: what of a tokenizer goes into a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.formats.gguf_vocabulary import vocabulary


def bpe_folder(folder: Path, splitter: dict[str, Any], byte_fallback: bool = False) -> Path:
    folder.mkdir()
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5, "aab": 6}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["a", "ab"]]}
    model |= {"byte_fallback": byte_fallback, "unk_token": "<unk>" if byte_fallback else None}
    special = {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False}
    special |= {"normalized": False, "special": True}
    content = {"version": "1.0", "added_tokens": [special], "pre_tokenizer": splitter}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    return folder


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    keys = vocabulary(bpe_folder(tmp_path / "a", LEVEL), 8)
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.merges"] == ["a b", "a ab"]
    assert keys["tokenizer.ggml.token_type"] == [1, 3, 1, 1, 1, 1, 1, 5]
    assert keys["tokenizer.ggml.bos_token_id"] == 1 and "tokenizer.ggml.scores" not in keys
    both = {"type": "Sequence", "pretokenizers": [DIGITS, LEVEL]}
    assert vocabulary(bpe_folder(tmp_path / "b", both), 8)["tokenizer.ggml.pre"] == "smollm"
    odd = bpe_folder(tmp_path / "c", {"type": "Whitespace"})
    with pytest.raises(ValueError, match="no rule of llama.cpp splits text as .'Whitespace'"):
        vocabulary(odd, 8)
    with pytest.raises(ValueError, match="has an id 6, the model 5 rows"):
        vocabulary(tmp_path / "a", 5)


def test_sentencepiece_in_json(tmp_path: Path) -> None:
    """Scores fall with the rank of the merge."""
    keys = vocabulary(bpe_folder(tmp_path / "a", None, byte_fallback=True), 7)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.token_type"] == [2, 3, 6, 1, 1, 1, 1]
    assert keys["tokenizer.ggml.scores"] == [-2, -2, -2, -2, -2, 0, -1]
    assert keys["tokenizer.ggml.add_space_prefix"] is False
