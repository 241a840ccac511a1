"""Proof that the finished checkpoint holds what the solver returned, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.sources import open_checkpoint


def digest(qt: QuantizedTensor) -> str:
    """A hash of codes, scales and zeros."""
    parts = (qt.codes, qt.grid.scales.to(torch.float16), qt.grid.zeros)
    total = hashlib.sha256()
    for part in parts:
        total.update(part.cpu().contiguous().numpy().data)
    return total.hexdigest()


def verify(folder: Path, digests: dict[str, str]) -> None:
    """Read the finished checkpoint and compare every code, scale and zero with the solver's."""
    seen = {}
    reader = open_checkpoint(folder)
    for name, value in FORMATS["autogptq"].read(reader):
        if isinstance(value, QuantizedTensor):
            seen[name] = digest(value)
            reader.release()  # or the whole checkpoint would stay mapped
    different = sorted(name for name in digests if seen.get(name) != digests[name])
    if different:
        raise OSError(
            f"{folder}: read back, {different[0]} differs from what was written; the disk is "
            "not reliable"
        )
