"""Calibration windows that the float model writes itself, beside those of a text.

A text is of one kind, and shows which inputs that kind makes. What the model writes shows those of
all that it knows (LLM-QAT, arXiv 2305.17888). Each piece continues some tokens of the text, token
by token, drawn from the model's own predictions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quant.checkpoint_writer import Part
from quant.durable import write_file
from quant.kernels import choose
from quant.llama.cache import KVCache
from quant.llama.config import LlamaConfig
from quant.llama.generate import drawn
from quant.llama.model import Llama, compute_dtype
from quant.partial import OWN_WINDOWS

PIECE = 256  # tokens at most; windows are made of several, so that keys and values stay small
PROMPT = 32  # tokens of the text that each piece continues
# Pieces written at a time: a GPU takes as long for few; fewer than the most where their keys and
# values would take more than _KEPT_BYTES
_MOST_ROWS, _FEWEST_ROWS = {"cpu": 32, "cuda": 256}, 16
_KEPT_BYTES = 2 << 30
_SEED = 0


@torch.inference_mode()
def own_windows(
    model: Llama,
    windows: Tensor,
    count: int,
    part: slice = slice(None),
    wrote: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Windows of the model's own.

    Args:
        windows: (windows, tokens) int64 ids of the text; they are continued in turn, from further
            in at each round.
        count: how many to write.
        part: those of them that are wanted; what is drawn does not depend on it.
        wrote: called with the tokens written so far, and those to write.

    Returns:
        (count, tokens) int64 ids, or `part` of these; each piece begins with PROMPT tokens of the
        text, or half of them if it is shorter.

    Raises:
        ValueError: the model's logits are not finite.
    """
    length = windows.shape[1]
    pieces = -(-length // PIECE)  # of a window
    size = -(-length // pieces)
    prompts = _prompts(windows, count * pieces, min(PROMPT, size // 2))
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.rand(len(prompts), size - prompts.shape[1], generator=generator)
    rows = torch.arange(len(prompts)).view(count, pieces)[part].flatten()
    prompts, draws, done = prompts[rows], draws[rows], 0
    written = torch.empty(len(rows), size, dtype=torch.int64)
    step = rows_at_a_time(model.config, model.model.embed_tokens.weight.device.type)
    for some in (slice(at, at + step) for at in range(0, len(rows), step)):
        for ids in _continued(model, prompts[some], draws[some]):
            done += len(ids)
            wrote(done, draws.numel())
        written[some] = ids
    return written.view(-1, pieces * size)[:, :length]


def piece_bytes(llama: LlamaConfig) -> int:
    """Keys and values of a piece, at most."""
    return 2 * 4 * llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim * PIECE


def rows_at_a_time(llama: LlamaConfig, device: str) -> int:
    """Pieces that are written together on a device, "cpu" or "cuda"."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS[device], _KEPT_BYTES // piece_bytes(llama)))


def bits_in_memory(device: str) -> int | None:
    """Bits of the linears while they write: with our kernel 8 take less time and memory than what
    is stored, and predict the same; None leaves them as they are stored.
    """
    return 8 if choose(device) == "cpu" else None


def _prompts(windows: Tensor, count: int, length: int) -> Tensor:
    """(count, length) ids that pieces begin with."""
    rounds = -(-count // len(windows))
    starts = [(windows.shape[1] - length) * index // (rounds + 1) for index in range(1, rounds + 1)]
    return torch.cat([windows[:, start : start + length] for start in starts])[:count]


def _continued(model: Llama, ids: Tensor, draws: Tensor) -> Iterator[Tensor]:
    """Rows (pieces, tokens) of ids, longer by a token each time.

    Args:
        draws: (pieces, tokens to come) numbers in [0, 1), which `drawn` takes.
    """
    embedding = model.model.embed_tokens.weight
    size = ids.shape[1] + draws.shape[1]
    cache = KVCache(model.config, len(ids), size, embedding.device, compute_dtype(embedding))
    new = ids.to(embedding.device)
    for draw in draws.split(1, dim=1):
        logits = model(new, cache)[:, -1].float()
        if not torch.isfinite(logits).all():
            raise ValueError(
                "own windows: the model's logits are not finite; its checkpoint is damaged, or it "
                "overflows"
            )
        new = drawn(torch.softmax(logits, -1), draw)
        ids = torch.cat([ids, new.cpu()], 1)
        yield ids


def in_turn(some: Tensor, others: Tensor) -> Tensor:
    """Rows of one and of the other in turn, so that the first of them are of both kinds; what is
    left of the longer one comes last.
    """
    places = torch.cat([torch.arange(len(some)) + 0.0, torch.arange(len(others)) + 0.5])
    return torch.cat([some, others])[places.argsort()]


def keep_windows(folder: Path, windows: Tensor, before: Part | None) -> Part:
    """Write windows (windows, tokens) of ids into a run's folder; the file.

    Args:
        before: of the run that is continued, if it had written some.

    Raises:
        ValueError: these are others, so nothing is written.
    """
    raw = windows.numpy().tobytes()
    file = Part(OWN_WINDOWS, len(raw), hashlib.sha256(raw).hexdigest())
    if before not in (None, file):
        raise ValueError(
            f"{folder / OWN_WINDOWS}: is damaged, and this machine rounds so that the model writes "
            "other windows; continue on the one where the run began, or pass --overwrite to start "
            "again"
        )

    def write(path: Path) -> None:
        path.write_bytes(raw)

    write_file(folder / OWN_WINDOWS, write)
    return file


def kept_windows(folder: Path, file: Part | None, tokens: int) -> Tensor | None:
    """What an earlier run wrote there, (windows, tokens) of ids, if all of it is there."""
    if file is None or not file.is_whole(folder):
        return None
    raw = bytearray((folder / file.name).read_bytes())
    return torch.frombuffer(raw, dtype=torch.int64).view(-1, tokens)
