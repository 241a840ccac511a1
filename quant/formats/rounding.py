"""What storing values in a narrower dtype changes, told to the user."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grid import QuantizedTensor

_CHUNK = 1 << 16  # values at a time


class Rounding:
    """Rounds tensors to a dtype, and remembers the first that this changed."""

    def __init__(self) -> None:
        self.where, self.dtype = "", torch.float32

    def round(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`.

        Raises:
            ValueError: a value is not finite in the dtype.
        """
        if tensor.dtype == dtype:
            return tensor
        rounded = tensor.to(dtype)
        extremes = torch.stack(torch.aminmax(tensor))  # NaN where any value is
        if not extremes.to(dtype).isfinite().all():
            raise ValueError(_not_finite(name, dtype))
        if not self.where and _differ(tensor, rounded):
            self.where, self.dtype = name, dtype
        return rounded

    def round_grid(self, name: str, qt: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """The values of a quantized tensor in `dtype`; raises as `round` does."""
        rounded = qt.dequantize(dtype)
        most = qt.grid.scales.abs().max() * (qt.grid.max_code + 1)  # no value is larger
        if not most.to(dtype).isfinite() and not rounded.isfinite().all():
            raise ValueError(_not_finite(name, dtype))
        if not self.where and _differ(qt.dequantize(), rounded):
            self.where, self.dtype = name, dtype
        return rounded

    def notes(self) -> list[str]:
        """A line if anything changed: half a unit in the last place, of a value or, below the
        normal numbers, of the smallest of these.
        """
        if not self.where:
            return []
        kind = torch.finfo(self.dtype)
        return [
            f"values are rounded to {_name(self.dtype)}, by at most {kind.eps / 2:.2g} of their "
            f"size, or {kind.tiny * kind.eps / 2:.1g} ({self.where} is the first)"
        ]


def _differ(exact: Tensor, rounded: Tensor) -> bool:
    """Whether a value changed; looks no further than the first that did."""
    parts = zip(exact.reshape(-1).split(_CHUNK), rounded.reshape(-1).split(_CHUNK), strict=True)
    return any(not torch.equal(part.float(), new.float()) for part, new in parts)


def _not_finite(name: str, dtype: torch.dtype) -> str:
    return f"{name}: holds values that are not finite in {_name(dtype)}; export to float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
