"""Solvers: a weight and the Hessian of its input -> integer codes. One file each.

`solve(weight, hessian, config, options) -> Solution`; the class of the options says which solver.
To add one: copy `rtn.py`, add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quant.config import QuantConfig
from quant.solvers import gptq, rtn
from quant.solvers.gptq_options import GPTQOptions
from quant.solvers.loss import Solution

SOLVERS: dict[str, tuple[Callable[..., Solution], Any]] = {
    "gptq": (gptq.solve, GPTQOptions),
    "rtn": (rtn.solve, rtn.RTNOptions),
}


def solver_name(options: Any) -> str:
    """The name in SOLVERS of the solver these options are for.

    Raises:
        ValueError: they are the options of none.
    """
    for name, (_, kind) in SOLVERS.items():
        if type(options) is kind:
            return name
    known = ", ".join(kind.__name__ for _, kind in SOLVERS.values())
    raise ValueError(f"solver {options!r} is unknown; give one of {known}")


def solve(
    weight: Tensor,
    hessian: Tensor,
    config: QuantConfig,
    options: Any,
    fisher: list[Tensor] | None = None,
) -> Solution:
    """Quantize weight (out, in) float32 for inputs with Hessian (in, in), as `options` say; with
    Fisher matrices of its outputs where the options ask for them.
    """
    more = () if fisher is None else (fisher,)
    return SOLVERS[solver_name(options)][0](weight, hessian, config, options, *more)
