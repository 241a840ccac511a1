"""What decides the numbers of a run, by field: a run is continued only where all are equal."""

from __future__ import annotations

import hashlib
import json
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import native
from quant.checkpoint import CheckpointReader

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


def fingerprint(
    reader: CheckpointReader, windows: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The fields, ready for JSON: model, weights, windows, every setting, and the code."""
    ids = hashlib.sha256(windows.numpy().tobytes())
    if mask is not None:
        ids.update(mask.numpy().tobytes())
    shape = " x ".join(map(str, windows.shape))
    return {
        "model config": _short(json.dumps(reader.config, sort_keys=True).encode()),
        "weights": _short(b"".join(_sampled(file) for file in reader.files())),
        "calibration windows": f"{shape}, {ids.hexdigest()[:16]}",
        **settings,
        "code": f"{own_version()}, {_source_hash()}",
        "torch": torch.__version__,
    }


def machine() -> dict[str, Any]:
    """What decides in which order sums are made, and so the last bits of numbers."""
    kern = native.library()
    instructions = kern.kern_selected().decode() if kern else "none"
    return {"threads": torch.get_num_threads(), "kernels": instructions}


def warn_of_another_machine(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Tell where the run in `folder` began on a machine() by which numbers come out otherwise."""
    if changed := difference(before, now):
        warnings.warn(
            f"{folder}: {changed}, by which sums are rounded otherwise; layers to come may differ "
            "in a few codes from those of a run that was not stopped",
            stacklevel=1,
        )


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field that differs, with both values, and of a field with fields of its own the
    first of these; None if all are equal.
    """
    for field in [*new, *old]:
        was, now = old.get(field), new.get(field)
        if was == now:
            continue
        if isinstance(was, dict) or isinstance(now, dict):
            return f"{field} {difference(was or {}, now or {})}"
        whose = " (those of --model)" if field == "weights" else ""
        return f"{field} was {was}, now {now}{whose}"
    return None


def other_words(old: dict[str, str], new: dict[str, str]) -> str:
    """Up to three options of the command line that differ, each with both values; "" if none."""
    names = [name for name in new if name in old and old[name] != new[name]]
    return "; ".join(f"{o} was {_end(old[o])}, now {_end(new[o])}" for o in names[:3])


def own_version() -> str:
    """The installed version of this package."""
    try:
        return version("llama-gptq")
    except PackageNotFoundError:
        return "source"


def _sampled(file: Path) -> bytes:
    """A hash of a weight file's size, its start (which names the tensors) and evenly spread samples
    of the rest: enough to tell models apart without reading them.
    """
    size = file.stat().st_size
    total = hashlib.sha256(f"{file.name} {size}".encode())
    with file.open("rb") as opened:
        total.update(opened.read(1 << 20))
        for sample in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * sample // max(1, _SAMPLES - 1))
            total.update(opened.read(_SAMPLE_BYTES))
    return total.digest()


def _source_hash() -> str:
    """A hash of this package's own sources and native library."""
    root = Path(__file__).parents[1]
    files = [*root.glob("quant/**/*.py"), *root.glob("calib/**/*.py")]
    files += [file for folder in native.__path__ for file in Path(folder).glob("libkern.*")]
    return _short(b"".join(file.read_bytes() for file in sorted(files)))


def _end(text: str) -> str:
    """A text, or as much of its end as a line of several has room for."""
    return text if len(text) <= 40 else f"...{text[-37:]}"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
