"""The Hessian of a linear's input: H = sum of x x^T over tokens in float32, and their count.

The layer's squared output error for a weight error E is tr(E H E^T), so H is all a solver needs to
know of the data. A plain sum has no order: batches and processes merge by addition.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """Running sum of x x^T.

    Attributes:
        matrix: (in_features, in_features) float32.
        tokens: how many x it holds.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of x (..., in_features); rows where mask (...) is False (padding) are left
        out.
        """
        rows = x.reshape(-1, x.shape[-1]).float() if mask is None else x[mask.to(x.device)].float()
        self.matrix.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def merge(self, other: Hessian) -> None:
        """Add another sum over other tokens.

        Raises:
            ValueError: the sizes differ.
        """
        if self.matrix.shape != other.matrix.shape:
            raise ValueError(
                f"Hessians of {self.matrix.shape[0]} and {other.matrix.shape[0]} inputs cannot "
                "be merged"
            )
        self.matrix += other.matrix
        self.tokens += other.tokens
