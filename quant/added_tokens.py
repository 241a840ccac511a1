"""New tokens for a checkpoint: tokenizer files, and rows of the embedding and the head.

A sentencepiece file cannot grow by itself; Hugging Face keeps the tokens that it lacks in
added_tokens.json (token -> id) and under `added_tokens_decoder` in tokenizer_config.json. A
tokenizer.json holds its own. All tokens added here are special: text never turns into them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import read_json

NEW_ROWS = ("mean", "zeros")


@dataclass(frozen=True)
class NewTokens:
    """What to add.

    Attributes:
        tokens: texts of the new tokens; one that is there already keeps its id.
        pad: the token that fills up batches, new or there already; None leaves it as it is.
        rows: what new rows of embedding and head are: the mean of all others, or zeros.

    Raises:
        ValueError: an empty token, or another word for `rows`.
    """

    tokens: tuple[str, ...] = ()
    pad: str | None = None
    rows: str = "mean"

    def __post_init__(self) -> None:
        if self.rows not in NEW_ROWS:
            raise ValueError(f"new rows {self.rows!r} are unknown; there are {', '.join(NEW_ROWS)}")
        if not all((*self.tokens, self.pad or "x")):
            raise ValueError("a token to add is empty; give it a text such as '<pad>'")


def grow(weight: Tensor, rows: int, kind: str) -> Tensor:
    """A matrix with new rows at its end, up to `rows`: the float32 mean of the others, or zeros."""
    extra = rows - len(weight)
    if extra <= 0:
        return weight
    row = weight.float().mean(0, keepdim=True) if kind == "mean" else weight.new_zeros(1, 1)
    return torch.cat((weight, row.to(weight.dtype).expand(extra, weight.shape[1])))


def add_to_tokenizer(folder: Path, new: NewTokens) -> tuple[dict[str, int], int | None]:
    """Add the tokens to the tokenizer files of a folder.

    Returns:
        The id of each token of `new.tokens`, and of the pad token (None without one).

    Raises:
        ValueError: there are no tokenizer files, they disagree, or the pad token is not among the
            tokens.
    """
    ids: dict[str, int] = {}
    for add, name in ((_to_sentencepiece, "tokenizer.model"), (_to_json, "tokenizer.json")):
        if (folder / name).is_file():
            found = add(folder, new)
            if ids and found != ids:
                raise ValueError(
                    f"{folder / name}: gives the new tokens the ids {found}, tokenizer.model {ids}"
                )
            ids = found
    if not ids:
        raise ValueError(f"{folder}: no tokenizer.model or tokenizer.json to add tokens to")
    _write_settings(folder, ids, new)
    pad_id = None if new.pad is None else ids[new.pad]
    return {token: ids[token] for token in new.tokens}, pad_id


def _wanted(file: Path, new: NewTokens, known: dict[str, int], size: int) -> dict[str, int]:
    """The id of every token; new ones follow the `size` ids that are there."""
    ids = {token: known[token] for token in new.tokens if token in known}
    for token in new.tokens:
        if token not in ids:
            ids[token] = size
            size += 1
    if new.pad is not None and new.pad not in ids:
        if new.pad not in known:
            raise ValueError(
                f"{file.name}: pad token {new.pad!r} is not in the vocabulary; "
                "add it with --add-token"
            )
        ids[new.pad] = known[new.pad]
    return ids


def _to_sentencepiece(folder: Path, new: NewTokens) -> dict[str, int]:
    """Put the tokens behind those of tokenizer.model, in added_tokens.json."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    file = folder / "added_tokens.json"
    added = read_json(file) if file.is_file() else {}
    known = {model.id_to_piece(i): i for i in range(model.vocab_size())} | added
    ids = _wanted(folder / "tokenizer.model", new, known, max(known.values()) + 1)
    added |= {token: index for token, index in ids.items() if index >= model.vocab_size()}
    if added:
        _write_json(file, added)
    return ids


def _to_json(folder: Path, new: NewTokens) -> dict[str, int]:
    """Add the tokens to tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer

    file = folder / "tokenizer.json"
    inner = Tokenizer.from_file(str(file))
    known = inner.get_vocab(with_added_tokens=True)
    _wanted(file, new, known, inner.get_vocab_size())
    inner.add_special_tokens([AddedToken(token, special=True) for token in new.tokens])
    inner.save(str(file))
    names = (*new.tokens, *([new.pad] if new.pad else []))
    found = inner.get_vocab(with_added_tokens=True)
    return {token: found[token] for token in names}


def _write_settings(folder: Path, ids: dict[str, int], new: NewTokens) -> None:
    """tokenizer_config.json and special_tokens_map.json, as Hugging Face keeps them."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = settings.setdefault("added_tokens_decoder", {})
    for token in new.tokens:
        decoder[str(ids[token])] = {"content": token, **flags, "special": True}
    if new.pad is not None:
        settings["pad_token"] = new.pad
        settings["padding_side"] = "left"
        names = folder / "special_tokens_map.json"
        _write_json(names, {**(read_json(names) if names.is_file() else {}), "pad_token": new.pad})
    _write_json(file, settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
