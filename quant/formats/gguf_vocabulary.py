"""The tokenizer of a checkpoint folder as the keys of a GGUF file.

`tokenizer.model`, or a `tokenizer.json` with byte fallback, becomes the vocabulary "llama": pieces
with scores, merged best score first. Any other `tokenizer.json` becomes "gpt2": tokens with merges,
and the name of the rule that splits text before merging, which llama.cpp knows a list of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant.checkpoint import read_json
from quant.formats.gguf_file import Value
from quant.llama.tokenizer import load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
Tokens = dict[int, tuple[str, float, int]]  # id -> text, score, type
_ADDED_SCORE, _MISSING_SCORE = -1000.0, -10000.0


def vocabulary(folder: Path, vocab_size: int) -> dict[str, Value]:
    """Keys of the tokenizer, for a model of `vocab_size` rows.

    Raises:
        ValueError: there is no tokenizer, it is damaged, it has more tokens than rows, or llama.cpp
            has no rule like its.
    """
    tokenizer = load_tokenizer(folder)
    settings = _read(folder / "tokenizer_config.json")
    described = _read(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        keys, tokens = _sentencepiece(folder / "tokenizer.model")
    elif described["model"].get("byte_fallback"):
        keys, tokens = _fallback_bpe(described)
    else:
        keys, tokens = _byte_level_bpe(described)
    _add_tokens(tokens, folder, settings, described)
    if len(tokens) and max(tokens) >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has an id {max(tokens)}, the model {vocab_size} rows"
        )
    missing = {i: (f"[PAD{i}]", _MISSING_SCORE, _UNUSED) for i in range(vocab_size)}
    rows = [tokens.get(i, missing[i]) for i in range(vocab_size)]
    keys["tokenizer.ggml.tokens"] = [token for token, _, _ in rows]
    if keys["tokenizer.ggml.model"] == "llama":
        keys["tokenizer.ggml.scores"] = [score for _, score, _ in rows]
    keys["tokenizer.ggml.token_type"] = [kind for _, _, kind in rows]
    ids = {token: i for i, (token, _, _) in tokens.items()}
    keys |= _special_ids(settings, ids, tokenizer.eos_ids)
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None
    keys["tokenizer.ggml.add_eos_token"] = False
    return keys | _chat_template(folder, settings)


def _sentencepiece(file: Path) -> tuple[dict[str, Value], Tokens]:
    """Pieces, scores and types of a sentencepiece model."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(file))
    tests = ((sp.is_unknown, _UNKNOWN), (sp.is_control, _CONTROL), (sp.is_unused, _UNUSED))
    tokens = {}
    for i in range(sp.vocab_size()):
        kind = next((kind for test, kind in (*tests, (sp.is_byte, _BYTE)) if test(i)), _NORMAL)
        tokens[i] = (sp.id_to_piece(i), sp.get_score(i), kind)
    keys: dict[str, Value] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    named = {"unknown": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id()}
    keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i >= 0}
    return keys, tokens


def _fallback_bpe(described: dict[str, Any]) -> tuple[dict[str, Value], Tokens]:
    """Sentencepiece in JSON: the earlier a merge, the better its result's score."""
    model = described["model"]
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        scores.setdefault("".join(_pair(merge)), -float(rank))
    lowest = -float(len(model["merges"]))
    unknown = model.get("unk_token")
    tokens = {}
    for token, i in model["vocab"].items():
        is_byte = len(token) == 6 and token.startswith("<0x")
        kind = _BYTE if is_byte else _UNKNOWN if token == unknown else _NORMAL
        tokens[i] = (token, scores.get(token, lowest), kind)
    keys: dict[str, Value] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    if unknown in model["vocab"]:
        keys["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
    prefix = "prepend" in json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    keys["tokenizer.ggml.add_space_prefix"] = prefix
    return keys, tokens


def _byte_level_bpe(described: dict[str, Any]) -> tuple[dict[str, Value], Tokens]:
    """Tokens and merges of a byte-level tokenizer."""
    model = described["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"tokenizer.json: model type {model.get('type')!r} cannot be written to GGUF; BPE can"
        )
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _splitting_rule(described.get("pre_tokenizer")),
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in model["merges"]],
    }
    return keys, {i: (token, 0.0, _NORMAL) for token, i in model["vocab"].items()}


def _splitting_rule(splitter: dict[str, Any] | None) -> str:
    """llama.cpp's name of the rule that splits text before merging."""
    steps = (splitter or {}).get("pretokenizers", [splitter])
    kinds = [(step or {}).get("type") for step in steps]
    patterns = [json.dumps(step.get("pattern")) for step in steps if step and "pattern" in step]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and "\\\\p{N}{1,3}" in patterns[0]:
        return "llama-bpe"
    raise ValueError(
        f"tokenizer.json: no rule of llama.cpp splits text as {kinds} does; export to float16 and "
        "use its own converter"
    )


def _add_tokens(
    tokens: Tokens, folder: Path, settings: dict[str, Any], described: dict[str, Any]
) -> None:
    """Put added tokens over the vocabulary; the special ones are control tokens."""
    added = {i: (text, False) for text, i in _read(folder / "added_tokens.json").items()}
    for entry in described.get("added_tokens") or []:
        added[entry["id"]] = (entry["content"], bool(entry.get("special")))
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        added[int(i)] = (entry["content"], bool(entry.get("special")))
    for i, (text, special) in added.items():
        if i not in tokens or tokens[i][0] != text:
            tokens[i] = (text, _ADDED_SCORE, _CONTROL if special else _USER_DEFINED)
        elif special and tokens[i][2] == _NORMAL:
            tokens[i] = (text, tokens[i][1], _CONTROL)
    named = {_content(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    for i, (text, score, kind) in tokens.items():
        if text in named and kind == _NORMAL:
            tokens[i] = (text, score, _CONTROL)


def _special_ids(
    settings: dict[str, Any], ids: dict[str, int], eos_ids: tuple[int, ...]
) -> dict[str, Value]:
    """Ids of the tokens that tokenizer_config.json names; the end of text is that of our own
    tokenizer.
    """
    keys: dict[str, Value] = {}
    for name, key in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        content = _content(settings.get(f"{name}_token"))
        if content in ids:
            keys[f"tokenizer.ggml.{key}_token_id"] = ids[content]
    if eos_ids:
        keys["tokenizer.ggml.eos_token_id"] = eos_ids[0]
    return keys


def _chat_template(folder: Path, settings: dict[str, Any]) -> dict[str, Value]:
    """The template of chats, from its own file or from tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _content(token: Any) -> str:
    """A special token's text, given as a string or as {"content": string}; "" if there is none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where the file is missing."""
    return read_json(file) if file.is_file() else {}
