"""What storing values in a narrower dtype changes, measured for the user."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 16  # values at a time


class Rounding:
    """The largest relative change of a value over all tensors rounded to a dtype."""

    def __init__(self) -> None:
        self.largest, self.where, self.dtype = 0.0, "", torch.float32

    def round(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`; a change is measured against the value, or against the smallest
        normal number where the value is smaller.

        Raises:
            ValueError: a value is not finite in the dtype.
        """
        if tensor.dtype == dtype:
            return tensor
        rounded = tensor.to(dtype)
        flat = zip(tensor.reshape(-1).split(_CHUNK), rounded.reshape(-1).split(_CHUNK), strict=True)
        changes = [_change(exact.float(), part) for exact, part in flat]
        if not all(map(math.isfinite, changes)):
            raise ValueError(
                f"{name}: holds values that are not finite in {_name(dtype)}; export to float32"
            )
        error = max(changes, default=0.0)
        if error > self.largest:
            self.largest, self.where, self.dtype = error, name, dtype
        return rounded

    def notes(self) -> list[str]:
        """A line if anything changed."""
        if not self.largest:
            return []
        return [
            f"values are rounded to {_name(self.dtype)}, by at most {self.largest:.2g} of their "
            f"size ({self.where})"
        ]


def _change(exact: Tensor, rounded: Tensor) -> float:
    """The largest change, as `Rounding.round` measures it; not finite where a value is not."""
    change = (rounded.float() - exact).abs_()
    return float(change.div_(exact.abs().clamp_(min=torch.finfo(rounded.dtype).tiny)).max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
