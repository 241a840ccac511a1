"""On-disk formats, one file each: `matches(reader)`, `read(reader)`; a `Writer` where we write it.

Only these files know a layout's quirks. To add one: copy `awq.py`, add a line here.
"""

from __future__ import annotations

from types import ModuleType

from quant.formats import autogptq, awq, compressed_tensors

FORMATS: dict[str, ModuleType] = {
    "autogptq": autogptq,
    "compressed-tensors": compressed_tensors,
    "awq": awq,
}
