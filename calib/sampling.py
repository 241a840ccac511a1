"""Windows of tokens to calibrate on: texts are joined into one stream and cut, so that nothing is
ever padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_SHORT = 32  # tokens of a window
_FEW_IDS = 32  # different ones; a page of any text has more


def token_windows(
    tokenize: Callable[[str], list[int]],
    documents: Iterable[str],
    num_samples: int,
    seq_len: int,
    seed: int = 0,
) -> Tensor:
    """Choose windows at random, without overlap.

    Args:
        tokenize: text -> ids.
        documents: texts; read until there is a choice of four windows for each one wanted.
        num_samples: windows wanted; if the text holds fewer, all are taken, with a warning.
        seq_len: tokens per window.
        seed: of a generator of its own.

    Returns:
        (windows, seq_len) int64.

    Raises:
        ValueError: a number is not positive, or the text is shorter than one window.
    """
    if num_samples < 1 or seq_len < 2:
        raise ValueError(
            f"samples {num_samples} and seq-len {seq_len}: at least 1 and 2 are needed"
        )
    stream = _stream(tokenize, documents, 4 * num_samples * seq_len)
    available = len(stream) // seq_len
    if not available:
        raise ValueError(
            f"calibration text: {len(stream)} tokens are fewer than one window of {seq_len}"
        )
    if available < num_samples:
        warnings.warn(
            f"calibration text holds {available} windows of {seq_len} tokens, not "
            f"{num_samples}; using all",
            stacklevel=2,
        )
    taken = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return torch.tensor(stream[: available * seq_len]).view(available, seq_len)[taken.sort().values]


def _stream(
    tokenize: Callable[[str], list[int]], documents: Iterable[str], enough: int
) -> list[int]:
    """The tokens of as many documents as give `enough` of them."""
    stream: list[int] = []
    for text in documents:
        stream += tokenize(text)
        if len(stream) >= enough:
            break
    return stream


def advice(windows: Tensor, widest: int, positions: int, python_only: bool) -> str:
    """One line on a choice of windows (windows, tokens) that is known to be poor, or "".

    Args:
        windows: what was chosen.
        widest: the most inputs of a linear.
        positions: for how many tokens the model was made, max_position_embeddings.
        python_only: the text is Python code; docs/accuracy.md has what that costs on prose.
    """
    length, tokens, different = windows.shape[1], windows.numel(), len(windows.unique())
    if different < _FEW_IDS:
        return (
            f"the calibration text is {tokens} tokens of {different} different ids, which show few "
            "of the inputs that a linear gets; pass --calib with text like that the model is for"
        )
    if length < _SHORT:
        return f"windows of {length} tokens hold little context; use a --seq-len of 512 or more"
    if length > positions:
        return (
            f"windows of {length} tokens are longer than the {positions} the model was made for; "
            f"use a --seq-len of {positions} at most"
        )
    if tokens < widest:
        return f"{tokens} calibration tokens for {widest} inputs of a linear; use more --samples"
    if python_only:
        return (
            "calibrating on Python code, which costs accuracy on prose; pass --calib wikitext2, "
            "c4, or text like that the model is for"
        )
    return ""


def check_windows(windows: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor | None:
    """Check windows (windows, tokens) of ids and their mask; padding must be on the right.

    Returns:
        The mask as bool, or None.

    Raises:
        ValueError: a shape or dtype is wrong, an id is outside the vocabulary, the mask has other
            values than 0 and 1 or no token, or padding is elsewhere.
    """
    if not isinstance(windows, Tensor) or windows.is_floating_point():
        raise ValueError("calibration windows: expected a tensor (windows, tokens) of integer ids")
    if windows.dim() != 2 or not windows.numel():
        raise ValueError(
            f"calibration windows: shape {tuple(windows.shape)}, expected (windows, tokens), "
            "not empty"
        )
    if int(windows.max()) >= vocab_size or int(windows.min()) < 0:
        raise ValueError(
            f"calibration windows: token id {int(windows.max())} is outside the model's "
            f"vocabulary of {vocab_size}; the tokenizer belongs to another model"
        )
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if not torch.equal(mask.to(attention_mask.dtype), attention_mask) or not mask.any():
        raise ValueError("attention_mask: expected 1 for tokens and 0 for padding, not 0 only")
    if mask.shape != windows.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}, but windows have {tuple(windows.shape)}"
        )
    if not torch.equal(mask, mask.long().cummin(dim=1).values.bool()):
        raise ValueError("attention_mask: padding must be on the right of each window")
    return mask
