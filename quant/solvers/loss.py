"""What a solver returns, and how its result is judged: tr(E H E^T), the squared error of the
layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.grid import QuantizedTensor
from quant.native.products import half_product


@dataclass(frozen=True)
class Solution:
    """A solver's result.

    Attributes:
        tensor: the codes on their grid.
        damp: what was added to the Hessian's diagonal, as a fraction of its mean.
        notes: every departure from the plain method, for the user.
        losses: (out,) float64, the `output_energy` of the error of each row of the weight that
            was solved; None from a solver that does not know it.
        energies: (out,) float64, the `output_energy` of these rows themselves; None likewise.
    """

    tensor: QuantizedTensor
    damp: float = 0.0
    notes: tuple[str, ...] = ()
    losses: Tensor | None = None
    energies: Tensor | None = None


_ROWS = 1024  # at a time: their products with H are in memory


def output_energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """tr(A H A^T) row by row: the energy of what the rows make of the data.

    Args:
        rows: (out, in) float32.
        hessian: (in, in) float32, symmetric.

    Returns:
        (out,) float64; products in float32, their sum in float64.
    """
    parts = (
        half_product(part, hessian).mul_(part).sum(1, dtype=torch.float64)
        for part in rows.split(_ROWS)
    )
    return 2 * torch.cat(list(parts))


def lost_share(lost: float, energy: float) -> float:
    """What is lost of an energy, both sums of `output_energy`; the loss itself where there is no
    energy. Nothing lost may come out below zero, as a difference of float32 sums; it counts as 0.
    """
    return max(lost, 0.0) / (energy if energy > 0 else 1.0)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q: the share of the output's energy that is lost.

    Args:
        weight, quantized: (out, in) float32.
        hessian: (in, in) float32.
    """
    lost, energy = (
        output_energy(rows, hessian).sum().item() for rows in (weight - quantized, weight)
    )
    return lost_share(lost, energy)
