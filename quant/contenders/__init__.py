"""What `bench kernels` times: our kernel, and other ones where they are installed.

A contender is a file with `MODES` and `build(mode, w, copies)`, which returns one callable per copy
of the weight, x (M, K) float32 -> result, with the bytes of one copy; it raises ImportError or
AttributeError where it is not installed. To add one: copy `torch_linear.py`, add a line here.
"""

from __future__ import annotations

from types import ModuleType

from quant.contenders import onnxruntime, ours, torch_int4pack, torch_linear

CONTENDERS: dict[str, ModuleType] = {
    "cpu": ours,
    "onnxruntime": onnxruntime,
    "torch_int4pack": torch_int4pack,
    "torch_linear": torch_linear,
}
