"""Where the seconds of a quantization go, beside the time its arithmetic would take alone.

    python benchmarks/parts.py --model PATH [--text FILE|random] [--samples 32] [--seq-len 512]
                               [--group-size 64] [--effort fast] [--device cpu]

Functions of the run are timed, each without those it calls. The floor counts what cannot be left
out: 2 operations a weight and token of a forward, causal attention, n^2 a token for each Hessian,
n^3 / 3 for its factor, n^2 a row for the columns, at the rate of torch's own float32 product, which
is measured before and after the run. On a GPU each part waits for what it started, and a run over
one short window comes before, so that nothing is set up while parts are timed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calib import hessian
from calib.hidden import Storage
from calib.sampling import token_windows
from calib.sources import documents
from quant import QuantConfig, RunOptions, group_solver, layer_loop, pipeline
from quant.geometry import linear_shapes
from quant.llama import model as llama_model
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS
from quant.resume import Journal
from quant.solvers import gptq, rtn
from quant.solvers.gptq_options import EFFORTS
from quant.sources import open_checkpoint, open_tokenizer

PARTS: dict[str, list[tuple[Any, str]]] = {
    "forward: linears": [(llama_model.Linear, "forward")],
    "forward: attention": [(llama_model.Attention, "mix")],
    "forward: norms, MLP": [(llama_model.RMSNorm, "forward"), (llama_model.MLP, "mix")],
    "Hessian": [
        *((hessian.Hessian, name) for name in ("add", "add_lag")),
        (layer_loop, "_complete_"),
    ],
    "aim": [(group_solver, "_aim")],
    "factor": [(gptq, "factor")],
    "scales": [(gptq, "_fit")],
    "columns": [(gptq, "_round_columns")],
    "refit": [(gptq, "refit")],
    "sweep": [(gptq, "sweep")],
    "error report": [(group_solver, "_losses"), (rtn, "fit_minmax"), (rtn, "nearest_codes")],
    "rest of a solve": [(layer_loop, "solve_group")],
    "packing, digests, counts": [(layer_loop, "_quantize_linears")],
    "reading": [(layer_loop, "build_layer"), (pipeline, "check_plain"), (pipeline, "fingerprint")],
    "waiting for the disk": [(Journal, "commit_later"), (Journal, "wait")],
    "reading back": [(pipeline, "verify")],
}


class Clock:
    """Seconds of each part, without those of the parts it calls."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}
        self.inside: list[float] = []  # seconds of called parts, for each part at work

    def time(self, owner: Any, name: str, part: str) -> None:
        """Replace a function by one that is timed."""
        work = getattr(owner, name)

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0)
            self.wait()
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.wait()
                seconds = time.perf_counter() - start
                own = seconds - self.inside.pop()
                self.seconds[part] = self.seconds.get(part, 0) + own
                if self.inside:
                    self.inside[-1] += seconds

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    llama = LlamaConfig.from_dict(open_checkpoint(asked.model).config)
    if asked.text == "random":
        windows = torch.randint(0, llama.vocab_size, (asked.samples, asked.seq_len))
    else:
        encode, texts = open_tokenizer(asked.model).encode, documents([asked.text])
        windows = token_windows(encode, texts, asked.samples, asked.seq_len, 0)
    clock, rates = Clock(asked.device), [sgemm_rate(asked.device)]
    with tempfile.TemporaryDirectory() as folder:
        output, config = Path(folder) / "out", QuantConfig(group_size=asked.group_size)
        storage = Storage(device=asked.device)
        run_options = RunOptions(device=asked.device, storage=storage)
        solver = EFFORTS[asked.effort]
        if asked.device != "cpu":
            first = windows[:1, :64]
            pipeline.quantize_checkpoint(asked.model, output, first, config, solver, run_options)
            run_options = replace(run_options, overwrite=True)
        for part, functions in PARTS.items():
            for owner, name in functions:
                clock.time(owner, name, part)
        report = pipeline.quantize_checkpoint(
            asked.model, output, windows, config, solver, run_options
        )
    rates.append(sgemm_rate(asked.device))
    show(clock.seconds, report, floor(llama, windows), statistics.mean(rates))


def show(parts: dict[str, float], report: Any, work: float, rate: float) -> None:
    """The table and what it adds up to."""
    total = report.seconds
    parts["everything else"] = total - sum(parts.values())
    print("| part | seconds | share |\n|---|---|---|")
    for part in [*PARTS, "everything else"]:
        seconds = parts.get(part, 0)
        print(f"| {part} | {seconds:.2f} | {seconds / total:.0%} |")
    print(f"total {total:.1f} s; {report.summary()}")
    print(", ".join(f"layer {o['name']} {o['seconds']} s" for o in report.layers))
    least = work / rate
    print(f"floor {least:.1f} s: {work / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s; ", end="")
    print(f"the run took {total / least:.2f} times that")


def floor(llama: LlamaConfig, windows: torch.Tensor) -> float:
    """Operations of the run that no method of this kind avoids."""
    shapes, (count, length) = linear_shapes(llama), windows.shape
    tokens, total = count * length, 0.0
    for names in LINEAR_GROUPS:
        rows, inputs = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        total += 2 * rows * inputs * tokens + inputs**2 * tokens + inputs**3 / 3 + rows * inputs**2
    total += 2 * tokens * length * llama.num_attention_heads * llama.head_dim
    return total * llama.num_hidden_layers


def sgemm_rate(device: str) -> float:
    """Operations per second of torch's float32 product, the best of ten."""
    left, right = (torch.rand(2048, 2048, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


if __name__ == "__main__":
    main()
