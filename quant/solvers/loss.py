"""What a solver returns, and how its result is judged: tr(E H E^T), the squared error of the
layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant.grid import QuantizedTensor


@dataclass(frozen=True)
class Solution:
    """A solver's result.

    Attributes:
        tensor: the codes on their grid.
        damp: what was added to the Hessian's diagonal, as a fraction of its mean.
        notes: every departure from the plain method, for the user.
    """

    tensor: QuantizedTensor
    damp: float = 0.0
    notes: tuple[str, ...] = ()


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q: the share of the output's energy that is lost.

    Args:
        weight, quantized: (out, in) float32.
        hessian: (in, in) float32. Products in float32, the final sums in float64.
    """
    error = weight - quantized
    lost = ((error @ hessian) * error).double().sum().item()
    energy = ((weight @ hessian) * weight).double().sum().item()
    return lost / energy if energy > 0 else 0.0
