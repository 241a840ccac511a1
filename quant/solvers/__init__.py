"""Solvers: a weight and the Hessian of its input -> integer codes. One file each.

`solve(weight, hessian, config, options) -> Solution`. To add one: copy `rtn.py`, add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quant.solvers import gptq, rtn
from quant.solvers.loss import Solution

SOLVERS: dict[str, tuple[Callable[..., Solution], Any]] = {
    "gptq": (gptq.solve, gptq.GPTQOptions),
    "rtn": (rtn.solve, rtn.RTNOptions),
}
