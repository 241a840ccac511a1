"""Where a token stands, and what it sees: rotary angles, and masks of batches that are padded.

In a batch whose shorter rows are padded on the left, positions begin behind the padding, and no
token sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.llama.config import LlamaConfig


def rotary(
    config: LlamaConfig, start: int, end: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D), float32, for the positions start..end-1."""
    base, dim = config.rope_theta, config.head_dim
    if config.rope_type == "dynamic" and end > config.max_position_embeddings:
        stretch = config.rope_factor * end / config.max_position_embeddings - (
            config.rope_factor - 1
        )
        base = base * stretch ** (dim / (dim - 2))
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if config.rope_type == "linear":
        inverse = inverse / config.rope_factor
    angles = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotary_of_rows(
    config: LlamaConfig, start: int, end: int, device: torch.device, padding: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """cos and sin that broadcast over (B, H, T, D); positions begin behind a row's padding."""
    if padding is None:
        return rotary(config, start, end, device)
    rows = [rotary(config, start - count, end - count, device) for count in padding]
    return torch.stack([cos for cos, _ in rows])[:, None], torch.stack([s for _, s in rows])[
        :, None
    ]


def visible(
    start: int, count: int, device: torch.device, padding: tuple[int, ...] | None
) -> Tensor:
    """Which of all tokens (S) each of `count` new ones sees, bool (T, S), or (B, 1, T, S) where
    rows are padded. Padding sees itself, because a softmax over nothing is not a number.
    """
    queries = torch.arange(start, start + count, device=device)[:, None]
    keys = torch.arange(start + count, device=device)
    if padding is None:
        return keys <= queries
    first = torch.tensor(padding, device=device)[:, None, None, None]
    return ((keys <= queries) & (keys >= first)) | (keys == queries)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by the angles of cos and sin (..., T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
