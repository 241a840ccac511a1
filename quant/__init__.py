"""GPTQ quantization of Llama 2: the public API, nothing else.

    from quant import QuantConfig, load_quantized, quantize_checkpoint

Names are resolved on first use, so that `import quant` (and the command line's --help) does not
import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_PUBLIC = {
    "QuantConfig": "quant.config",
    "GPTQOptions": "quant.solvers.gptq_options",
    "EFFORTS": "quant.solvers.gptq_options",
    "RTNOptions": "quant.solvers.rtn",
    "RunOptions": "quant.run_options",
    "quantize_checkpoint": "quant.pipeline",
    "load_quantized": "quant.loader",
    "load_model": "quant.loader",
    "evaluate": "quant.evaluate",
    "generate_batch": "quant.llama.generate",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quant' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package, in which a submodule never takes the place of a public name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
