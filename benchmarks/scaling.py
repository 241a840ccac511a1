"""Time and memory of a quantization as the number of tokens and of layers grows.

    python benchmarks/scaling.py             measure, write docs/scaling.json, draw docs/scaling.svg
    python benchmarks/scaling.py --draw      draw again from docs/scaling.json

A random Llama of small geometry is quantized at five numbers of tokens and five numbers of layers,
each in a process of its own. Counted are the seconds of all its threads together, which other work
on the machine disturbs less than the clock on the wall. Drawing needs `.[plot]`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_model import write_model

DOCS = Path(__file__).parents[1] / "docs"
SEQ_LEN = 256
GEOMETRY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
WINDOWS, LAYERS = (16, 32, 48, 64, 80), (2, 4, 6, 8, 10)
FIXED_WINDOWS, FIXED_LAYERS = 16, 4
RUN = """
import json, sys, time, torch
from quant import QuantConfig, quantize_checkpoint
from quant.solvers.gptq_options import EFFORTS
model, output, count, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
generator = torch.Generator().manual_seed(0)
windows = torch.randint(0, 2048, (count, length), generator=generator)
start = time.process_time()
config, options = QuantConfig(group_size=32), EFFORTS["fast"]
report = quantize_checkpoint(model, output, windows, config, options)
print(json.dumps([time.process_time() - start, report.peak_memory_bytes]))
"""


def main() -> None:
    file = DOCS / "scaling.json"
    if "--draw" not in sys.argv:
        file.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    points = json.loads(file.read_text(encoding="utf-8"))
    for name, series in points.items():
        slope, start, worst = fit(series)
        print(f"{name}: {slope:.4g} s each + {start:.2f} s, off the line by {worst:.1%} at most")
    draw(points, DOCS / "scaling.svg")


def measure() -> dict[str, Any]:
    """{"tokens" or "layers": [[count, thread seconds, peak bytes], ...]}"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layers in {*LAYERS, FIXED_LAYERS}:
            write_model(folder / f"{layers}", {**GEOMETRY, "num_hidden_layers": layers})
        tokens = [[n * SEQ_LEN, *run(folder, FIXED_LAYERS, n)] for n in WINDOWS]
        return {"tokens": tokens, "layers": [[n, *run(folder, n, FIXED_WINDOWS)] for n in LAYERS]}


def run(folder: Path, layers: int, windows: int) -> tuple[float, int]:
    """(seconds of all threads, peak bytes)"""
    output = folder / f"{layers}-{windows}-out-{len(list(folder.iterdir()))}"
    command = [sys.executable, "-c", RUN, folder / f"{layers}", output, windows, SEQ_LEN]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    seconds, peak_bytes = json.loads(done.stdout)
    print(f"{layers} layers, {windows * SEQ_LEN} tokens: {seconds:.2f} s", file=sys.stderr)
    return seconds, peak_bytes


def fit(series: list[list[float]]) -> tuple[float, float, float]:
    """(slope, start, largest relative distance) of the least-squares line through the seconds."""
    x = torch.tensor([[point[0], 1.0] for point in series], dtype=torch.float64)
    y = torch.tensor([point[1] for point in series], dtype=torch.float64)
    slope, start = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()
    return slope, start, ((x[:, 0] * slope + start - y).abs() / y).max().item()


def draw(points: dict[str, Any], target: Path) -> None:
    """Two panels: seconds over tokens and over layers, with the line through them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    fixed = {
        "tokens": f"{FIXED_LAYERS} layers",
        "layers": f"{FIXED_WINDOWS * SEQ_LEN} tokens",
    }
    for panel, (name, series) in zip(panels, points.items(), strict=True):
        slope, start, _ = fit(series)
        xs = [point[0] for point in series]
        panel.plot([0, xs[-1]], [start, start + slope * xs[-1]], color="0.7")
        panel.plot(xs, [point[1] for point in series], "o", color="#1f5fa8")
        panel.set(
            xlabel=f"{name} ({fixed[name]})",
            ylabel="seconds of all threads",
            xlim=(0, None),
            ylim=(0, None),
        )
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
