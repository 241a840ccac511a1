"""Backends that multiply by a packed quantized matrix: one file each, one signature.

`is_available(device)`, `pack(qt) -> dict of tensors`, `matmul(x, packed, precision) -> y`. The
first that is available is taken. To add one: copy `reference.py`, add a line here.

Precisions say what a backend may do to the activations x: `exact` nothing, `high` as much as cannot
be seen in the result, `fast` 8 bits. A backend may always be more exact than it was asked to be.
"""

from __future__ import annotations

from types import ModuleType

import torch

from quant.kernels import cpu, reference
from quant.native import PRECISIONS as PRECISIONS

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}


def choose(device: torch.device | str, name: str | None = None) -> str:
    """The backend for a device: the named one, or the first of BACKENDS that is available.

    Raises:
        ValueError: the name is unknown, or that backend cannot run on this device.
    """
    device = torch.device(device)
    if name is None:
        return next(key for key, backend in BACKENDS.items() if backend.is_available(device))
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; there are {', '.join(BACKENDS)}")
    if not BACKENDS[name].is_available(device):
        raise ValueError(f"backend {name!r} is not available on device {device}")
    return name
