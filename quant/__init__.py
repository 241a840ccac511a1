"""GPTQ quantization of Llama 2: the public API, nothing else.

    from quant import QuantConfig, load_quantized, quantize_checkpoint

Names are resolved on first use, so that `import quant` (and the command line's --help) does not
import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "QuantConfig": "quant.config",
    "GPTQOptions": "quant.solvers.gptq",
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
    globals()[name] = value  # a submodule of the same name must not shadow the function
    return value
