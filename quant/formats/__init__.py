"""On-disk formats, one file each: `Writer`, `matches(reader)`, `read(reader)`.

Only these files know a layout's quirks. To add one: copy `autogptq.py`, add a line here.
"""

from __future__ import annotations

from types import ModuleType

from quant.formats import autogptq

FORMATS: dict[str, ModuleType] = {"autogptq": autogptq}
