"""The calibration windows of `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def windows_of(model: Path, sources: list[str], samples: int, length: int, seed: int) -> Any:
    """Calibration windows (samples, length) of the model's own tokens."""
    from calib.sampling import token_windows
    from calib.sources import documents
    from quant.machine import return_memory
    from quant.sources import open_tokenizer

    windows = token_windows(open_tokenizer(model).encode, documents(sources), samples, length, seed)
    return_memory()
    return windows


def advise(windows: Any, llama: Any, python_only: bool) -> None:
    """Print a line where the choice of calibration text is known to be poor."""
    from calib.sampling import advice
    from quant.geometry import linear_shapes

    widest = max(width for _, width in linear_shapes(llama).values())
    if line := advice(windows, widest, llama.max_position_embeddings, python_only):
        print(f"note: {line}", flush=True)
