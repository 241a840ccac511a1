"""pytest tests/test_tokenizer.py: the facts of Llama 2's tokenizer, and streaming."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quant.llama.tokenizer import Tokenizer, load_tokenizer

BUNDLED = Path(__file__).parents[1] / "quant" / "bundled"
LLAMA2 = Path(
    os.environ.get(
        "LLAMA2_TOKENIZER", Path(__file__).parents[2] / "shared" / "data" / "llama2-tokenizer.model"
    )
)


@pytest.fixture(params=["bundled", "llama2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bundled":
        return load_tokenizer(BUNDLED)
    return llama2(tmp_path)


def llama2(folder: Path) -> Tokenizer:
    if not LLAMA2.is_file():
        pytest.skip("the Llama 2 tokenizer is not here; set LLAMA2_TOKENIZER to its path")
    (folder / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    return load_tokenizer(folder)


def test_facts_of_llama2(tmp_path: Path) -> None:
    tokenizer = llama2(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32000, 1, (2,))
    facts = {"Hello": [15043], " Hello": [29871, 15043], "\n": [29871, 13], "": []}
    assert {text: tokenizer.encode(text, bos=False) for text in facts} == facts
    assert tokenizer.encode("Hello") == [1, 15043]
    assert 1 not in tokenizer.encode("<s>", bos=False)  # control strings in text are text


TEXTS = [
    "def f(x):\n    return x + 1",
    "  two  spaces ",
    "naïve café — 日本語 🙂🙂 done",
    "",
    "\t\ttabs\n\n\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, "a long text of words 日本 " * 40])
def test_a_stream_loses_nothing_and_splits_nothing(tokenizer: Tokenizer, text: str) -> None:
    prompt = tokenizer.encode("start")
    stream = tokenizer.stream(prompt)
    ids = tokenizer.encode(" " + text, bos=False)[1:] if text else []
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(prompt + ids)[len("start") :]
    assert not any("\ufffd" in piece for piece in pieces)


def test_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    inner = Fast(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b") == [2, 3]
    settings = (
        '{"tokenizer_class": "LlamaTokenizerFast", "bos_token": {"content": "<s>"}, '
        '"eos_token": "</s>"}'
    )
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.encode("a b"), tokenizer.eos_ids, tokenizer.vocab_size) == (
        [0, 2, 3],
        (1,),
        4,
    )


def test_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no tokenizer; expected tokenizer.model or tokenizer.json"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)
