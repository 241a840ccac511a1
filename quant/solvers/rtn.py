"""Round to nearest: the min-max grid of each group, and the nearest code. The baseline; looks at no
data.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant.config import QuantConfig
from quant.grid import QuantizedTensor, fit_minmax, nearest_codes
from quant.solvers.loss import Solution


@dataclass(frozen=True)
class RTNOptions:
    """Nothing to choose."""


def solve(weight: Tensor, hessian: Tensor, config: QuantConfig, options: RTNOptions) -> Solution:
    """Quantize weight (out, in) float32 by rounding; the Hessian is not used."""
    grid = fit_minmax(weight, config)
    return Solution(QuantizedTensor(nearest_codes(weight, grid), grid))
