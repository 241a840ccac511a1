"""The text a model is judged on, and what must stand beside every number that comes from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.sources import text_files, wikitext2
from quant.evaluate import EvalResult
from quant.llama.tokenizer import Tokenizer


def evaluation_ids(tokenizer: Tokenizer, data: str) -> tuple[Tensor, dict[str, Any]]:
    """Token ids of the whole text behind one BOS, and the facts to print.

    Args:
        data: "wikitext2" (its test split) or the path of a text file.

    Raises:
        ValueError: the file is missing or empty, or wikitext2 cannot be downloaded.
    """
    if not data.strip():
        raise ValueError("evaluation text: its name is empty; give wikitext2 or a text file")
    if data == "wikitext2" and not Path(data).exists():
        text = "".join(wikitext2.documents("test"))
    else:
        text = "\n\n".join(text_files.documents([Path(data)]))
    ids = torch.tensor(tokenizer.encode(text))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return ids, {"data": data, "sha256": digest, "bos": tokenizer.bos_id is not None}


def protocol(facts: dict[str, Any], result: EvalResult) -> str:
    """The protocol in one line."""
    bos = "one BOS at the start" if facts["bos"] else "no BOS"
    return (
        f"protocol: {facts['data']} (sha256 {facts['sha256']}), {bos}, {result.windows} windows "
        f"of {result.window} "
        f"tokens without overlap, {result.scored_tokens} tokens scored, float32"
    )
