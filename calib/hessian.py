"""The Hessian of a linear's input: H = sum of x x^T over tokens in float32, and their count.

The layer's squared output error for a weight error E is tr(E H E^T), so H is all a solver needs to
know of the data. A plain sum has no order: batches and processes merge by addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.native import products

_PANEL = 512  # columns that still multiply at full speed


class Hessian:
    """Running sum of x x^T, of which only the upper triangle is computed.

    Attributes:
        tokens: how many x it holds.
        drift: (in_features, in_features) float32, the sum of (x~ - x) x^T with x~ the input in the
            float model; None where x~ is not known.
        lag: (hidden, in_features) float32, the sum of (h~ - h) x^T with h the residual stream to
            which the linear's output is added; None where there is none, or h~ is not known.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._upper = torch.zeros(in_features, in_features, device=device)
        self._mirrored = True
        self.tokens = 0
        self.drift: Tensor | None = None
        self.lag: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """(in_features, in_features) float32, symmetric; the sum itself, not a copy."""
        if not self._mirrored:
            for start in range(0, len(self._upper), _PANEL):
                end = start + _PANEL
                square = self._upper[start:end, start:end].triu()
                self._upper[start:end, start:end] = square + square.triu(1).T
                self._upper[end:, start:end] = self._upper[start:end, end:].T
            self._mirrored = True
        return self._upper

    def add(self, x: Tensor, mask: Tensor | None = None, original: Tensor | None = None) -> None:
        """Add the rows of x (..., in_features); rows where mask (...) is False (padding) are left
        out. `original` has the same rows in the float model.
        """
        rows = _rows(x, mask)
        products.add_gram_(self._upper, rows)
        self._mirrored = False
        self.tokens += len(rows)
        if original is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self._upper)
            products.add_product_(self.drift, (_rows(original, mask) - rows).T, rows)

    def add_lag(self, x: Tensor, behind: Tensor, mask: Tensor | None = None) -> None:
        """Add to `lag` the rows of x (..., in_features) and of h~ - h (..., hidden)."""
        rows, missing = _rows(x, mask), _rows(behind, mask)
        if self.lag is None:
            self.lag = torch.zeros(missing.shape[1], rows.shape[1], device=rows.device)
        products.add_product_(self.lag, missing.T, rows)

    def merge(self, other: Hessian) -> None:
        """Add another sum over other tokens.

        Raises:
            ValueError: the sizes differ.
        """
        if self._upper.shape != other._upper.shape:
            raise ValueError(
                f"Hessians of {len(self._upper)} and {len(other._upper)} inputs cannot be merged"
            )
        self._upper += other.matrix
        self._mirrored = False
        self.tokens += other.tokens
        if other.drift is not None:
            self.drift = other.drift if self.drift is None else self.drift + other.drift
        if other.lag is not None:
            self.lag = other.lag if self.lag is None else self.lag + other.lag


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, in_features) float32, without padding."""
    return x.reshape(-1, x.shape[-1]).float() if mask is None else x[mask.to(x.device)].float()
