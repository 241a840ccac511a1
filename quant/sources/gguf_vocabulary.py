"""tokenizer.model from the sentencepiece vocabulary in the keys of a GGUF file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quant.sources import sentencepiece_model as sp


def rebuild(path: Path, keys: dict[str, Any], config: dict[str, Any]) -> bytes:
    """The bytes of tokenizer.model.

    Args:
        path: the GGUF file, for messages.
        keys: its keys.
        config: config.json; names the ids that begin and end a text.

    Raises:
        ValueError: the lists of tokens, scores and types are missing or damaged.
    """
    texts: Any = keys.get("tokenizer.ggml.tokens")
    scores: Any = keys.get("tokenizer.ggml.scores")
    kinds: Any = keys.get("tokenizer.ggml.token_type")
    lists = isinstance(texts, list) and isinstance(scores, list) and isinstance(kinds, list)
    if not lists or not len(texts) == len(scores) == len(kinds):
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens, scores and token_type are not lists of one length"
        )
    pieces = []
    for index, (text, score, kind) in enumerate(zip(texts, scores, kinds, strict=True)):
        well = isinstance(text, str) and isinstance(score, int | float) and kind in range(1, 7)
        if not well or not text or not math.isfinite(score):
            raise ValueError(f"{path}: tokenizer.ggml token {index} is damaged")
        pieces.append(sp.Piece(text, score, kind))
    space = keys.get("tokenizer.ggml.add_space_prefix", True)
    try:
        return sp.build(
            pieces, config["bos_token_id"], config["eos_token_id"], add_dummy_prefix=bool(space)
        )
    except ValueError as error:
        raise ValueError(f"{path}: tokenizer.ggml: {error}") from None
