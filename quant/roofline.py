"""A picture of `bench kernels`: operations per second against operations per byte of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.bench import Row


def plot(machine: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Write the roofline of the cold rows, one colour per kernel; the file's ending is its format.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install "llama-gptq[plot]"') from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for number, kernel in enumerate(sorted({(row.backend, row.mode) for row in rows})):
        mine = [row for row in rows if row.cold and (row.backend, row.mode) == kernel]
        label = " ".join(kernel)
        for shape in sorted({(row.k, row.n) for row in mine}):  # a line each, one row to many
            points = sorted((r.gop_s / r.gb_s, r.gop_s) for r in mine if (r.k, r.n) == shape)
            axes.plot(*zip(*points, strict=True), "o-", c=f"C{number}", ms=4, lw=0.8, label=label)
            label = "_"  # once in the legend
    first = min(row.gop_s / row.gb_s for row in rows)
    most = max(row.gop_s for row in rows)
    bandwidth, rate = machine["read_gb_s"], machine["sgemm_gflop_s"]
    axes.plot([first, most / bandwidth], [first * bandwidth, most], "k-", label="read bandwidth")
    axes.axhline(rate, c="k", ls=":", label="float32 products of torch")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("GOP/s")
    axes.legend(fontsize=8)
    figure.savefig(path)
