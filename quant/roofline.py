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
    for kernel in sorted({(row.backend, row.mode) for row in rows}):
        mine = [row for row in rows if row.cold and (row.backend, row.mode) == kernel]
        intensity = [row.gop_s / row.gb_s for row in mine]
        axes.plot(
            intensity, [row.gop_s for row in mine], "o", ms=4, alpha=0.7, label=" ".join(kernel)
        )
    ends = [min(r.gop_s / r.gb_s for r in rows), max(r.gop_s / r.gb_s for r in rows)]
    ridge = machine["sgemm_gflop_s"] / machine["read_gb_s"]
    xs = [ends[0], ridge, max(ends[1], ridge)]
    roof = [min(machine["sgemm_gflop_s"], x * machine["read_gb_s"]) for x in xs]
    axes.plot(xs, roof, "k-", label="read bandwidth, float32 rate")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("GOP/s")
    axes.legend(fontsize=8)
    figure.savefig(path)
