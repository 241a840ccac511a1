"""What the readers of this folder share: words to codes, and the checks of what a file claims."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader, read_json
from quant.grid import Grid, QuantizedTensor


def stored_settings(reader: CheckpointReader) -> dict[str, Any]:
    """The quantization settings in config.json, else in quantize_config.json; {} without any.

    Raises:
        ValueError: they are no JSON object.
    """
    stored = reader.config.get("quantization_config")
    file = reader.path / "quantize_config.json"
    if not stored and file.is_file():
        stored = read_json(file)
    if stored is None:
        return {}
    if not isinstance(stored, dict):
        raise ValueError(f"{reader.path}: quantization_config is {stored!r:.60}, not an object")
    return stored


def method(reader: CheckpointReader) -> str:
    """The quantization method a checkpoint names; older GPTQ files name none."""
    stored = stored_settings(reader)
    return str(stored.get("quant_method") or stored.get("method") or "gptq").lower()


def unpack_rows(words: Tensor, bits: int, count: int, order: Sequence[int] = ()) -> Tensor:
    """(rows, W) int32 words -> (rows, count) uint8 codes; a word holds 32 // bits whole codes.

    Args:
        order: the place of each code of a word, lowest bits first; in turn by default.

    Raises:
        ValueError: the words are no int32 matrix, or too few or too many for `count` codes.
    """
    in_word = 32 // bits
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != -(-count // in_word):
        raise ValueError(
            f"{words.dtype} words of shape {tuple(words.shape)} do not hold rows of {count} "
            f"{bits}-bit codes"
        )
    codes = torch.empty(len(words), words.shape[1] * in_word, dtype=torch.uint8)
    for i in range(in_word):
        place = order[i] if order else i
        codes[:, place::in_word] = (words >> (bits * i)) & (2**bits - 1)
    return codes[:, :count].contiguous()


def assemble(
    module: str, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, index: Tensor | None
) -> QuantizedTensor:
    """A QuantizedTensor of what a file holds for one linear, after checking that it fits together.

    Scales are rounded to float16, and a warning says so where that changes one.

    Args:
        module: its name, for messages.
        codes: (out, in) uint8.
        scales: (out, groups), any float dtype.
        zeros: (out, groups) uint8, true zeros.
        index: (in,) group of each input, or None for consecutive groups of one size.

    Raises:
        ValueError: shapes disagree, a group does not exist, or a scale is no finite float16.
    """
    (out_features, in_features), groups = codes.shape, scales.shape[-1]
    if scales.shape != zeros.shape or scales.shape != (out_features, groups) or not groups:
        raise ValueError(
            f"{module}: codes {tuple(codes.shape)}, scales {tuple(scales.shape)} and zeros "
            f"{tuple(zeros.shape)} do not fit together; the file is damaged"
        )
    grid = Grid(_half_scales(module, scales), zeros.contiguous(), bits)
    width = -(-in_features // groups)
    consecutive = torch.arange(in_features) // width
    if index is None and in_features % groups:
        raise ValueError(f"{module}: {groups} groups do not divide {in_features} inputs")
    if index is None:
        return QuantizedTensor(codes, grid)
    if index.shape != (in_features,) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise ValueError(
            f"{module}: g_idx of shape {tuple(index.shape)} does not name a group below {groups} "
            f"for each of {in_features} inputs"
        )
    if in_features % groups == 0 and torch.equal(index.long(), consecutive):
        return QuantizedTensor(codes, grid)
    return QuantizedTensor(codes, grid, index.to(torch.int32))


def _half_scales(module: str, scales: Tensor) -> Tensor:
    """float32 scales with float16 values."""
    wide = scales.float()
    halves = wide.half().float()
    if not torch.isfinite(halves).all():
        raise ValueError(f"{module}: a scale is not a finite float16 number; the file is damaged")
    error = float(((halves - wide).abs() / wide.abs().clamp(min=1e-30)).max())
    if error:
        warnings.warn(
            f"{module}: scales of {scales.dtype} are rounded to float16, by at most {error:.2g} of "
            "their size",
            stacklevel=2,
        )
    return halves.contiguous()
