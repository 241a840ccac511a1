"""How often each code and each size of scale occurs in a quantized linear, for the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from quant.grid import QuantizedTensor

BINS_PER_OCTAVE = 4
_LOWEST = -24 * BINS_PER_OCTAVE  # the bin of the smallest float16 scale, 2^-24
_BINS = 40 * BINS_PER_OCTAVE  # up to 2^16
_MOST_BITS = 4  # codes of more bits are counted by their upper bits


@dataclass(frozen=True)
class CodeCounts:
    """Histograms of one linear, or of several together.

    Attributes:
        codes: how often each code occurs; of 8 bits, each run of 16 codes.
        scales: how many scales have a size in [2^(b/4), 2^((b+1)/4)), for b = first, first + 1, ...
        first: the first bin that is not empty.
        negative_scales: how many scales are below zero.
    """

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    first: int
    negative_scales: int

    @classmethod
    def of(cls, qt: QuantizedTensor) -> CodeCounts:
        """Count a tensor's codes and scales."""
        bits = min(qt.bits, _MOST_BITS)
        codes = qt.codes if qt.bits == bits else qt.codes >> (qt.bits - bits)
        scales = qt.grid.scales.flatten()
        bins = (scales.abs().log2() * BINS_PER_OCTAVE).floor().clamp(_LOWEST, _LOWEST + _BINS - 1)
        counts = torch.bincount(bins.long() - _LOWEST, minlength=_BINS).tolist()
        return cls(
            tuple(torch.bincount(codes.flatten(), minlength=2**bits).tolist()),
            *_trimmed(counts, _LOWEST),
            int((scales < 0).sum()),
        )

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> CodeCounts:
        """What `asdict` and JSON made of one."""
        lists = {"codes": tuple(stored["codes"]), "scales": tuple(stored["scales"])}
        return cls(**{**stored, **lists})

    @staticmethod
    def total(parts: Iterable[CodeCounts]) -> CodeCounts:
        """The sum of several; codes are summed where they have the same number of bits."""
        wide, parts = [0] * _BINS, list(parts)
        most = max(len(part.codes) for part in parts)
        codes = [0] * most
        for part in parts:
            for bin_, count in enumerate(part.scales, part.first - _LOWEST):
                wide[bin_] += count
            if len(part.codes) == most:
                codes = [a + b for a, b in zip(codes, part.codes, strict=True)]
        negative = sum(part.negative_scales for part in parts)
        return CodeCounts(tuple(codes), *_trimmed(wide, _LOWEST), negative)


def _trimmed(counts: list[int], first: int) -> tuple[tuple[int, ...], int]:
    """Counts without the zeros at both ends, and the bin of the first that is left."""
    used = [i for i, count in enumerate(counts) if count]
    return tuple(counts[used[0] : used[-1] + 1]), first + used[0]
