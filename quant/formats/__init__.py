"""On-disk formats, one file each: `matches(reader)`, `read(reader)`; a `Writer` where we write it.

Only these files know a layout's quirks. To add one: copy `awq.py`, add a line here.
"""

from __future__ import annotations

from types import ModuleType

from quant.checkpoint import CheckpointReader, coarse_linear
from quant.formats import autogptq, awq, compressed_tensors

FORMATS: dict[str, ModuleType] = {
    "autogptq": autogptq,
    "compressed-tensors": compressed_tensors,
    "awq": awq,
}


def refuse_quantized(reader: CheckpointReader, instead: str) -> None:
    """Refuse a checkpoint whose linears are stored in few bits.

    Raises:
        ValueError: it is quantized; the message ends with what to do instead.
    """
    coarse = coarse_linear(reader)
    if coarse or any(form.matches(reader) for form in FORMATS.values()):
        what = f" ({coarse} is {reader.stored_types()[coarse].name})" if coarse else ""
        raise ValueError(f"{reader.path}: is quantized already{what}; {instead}")
