"""The subcommands, one file each. To add one: copy `inspect.py`, add a line here.

A name of two words is a subcommand of a group.

Heavy modules are imported inside the functions, so that --help does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable

from quant.commands.bench import bench_decode, bench_kernels
from quant.commands.convert import convert
from quant.commands.evaluate import evaluate
from quant.commands.export import export
from quant.commands.generate import generate
from quant.commands.inspect import inspect
from quant.commands.quantize import quantize
from quant.commands.report import report

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "inspect": inspect,
    "report": report,
    "convert": convert,
    "bench kernels": bench_kernels,
    "bench decode": bench_decode,
}
