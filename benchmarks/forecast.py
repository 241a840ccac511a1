"""Forecast and measured time and memory of one quantization, with random token ids.

    python benchmarks/forecast.py MODEL [--samples 8] [--seq-len 2048] [--group-size 128]
                                  [--effort fast] [--spill DIR] [--max-memory 16GB]

MODEL is a checkpoint folder; it needs no tokenizer. Rates are measured just before, as `quantize`
does. Prints one row of a table. The peak is that of this process; the embedding is shown beside it
because all of it is read once, for the checks before the run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from calib.hidden import Storage
from quant import QuantConfig, RunOptions, quantize_checkpoint
from quant.llama.config import LlamaConfig
from quant.machine import measure, peak_memory_bytes
from quant.plan import job_of, make_plan
from quant.room import fit_memory
from quant.solvers.gptq_options import EFFORTS
from quant.sources import open_checkpoint
from quant.units import parse_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--effort", choices=EFFORTS, default="fast")
    parser.add_argument("--spill", type=Path)
    parser.add_argument("--max-memory")
    asked = parser.parse_args()
    reader = open_checkpoint(asked.model)
    llama, config = LlamaConfig.from_dict(reader.config), QuantConfig(group_size=asked.group_size)
    windows, solver = (asked.samples, asked.seq_len), EFFORTS[asked.effort]
    job = job_of(reader, llama, config, windows, solver, Storage(spill=asked.spill))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.max_memory:
            job = fit_memory(job, parse_size(asked.max_memory), folder)
        plan, rates = make_plan(job), measure(folder)
        ids = torch.randint(0, llama.vocab_size, windows)
        options = RunOptions(storage=job.storage, budget=job.budget)
        report = quantize_checkpoint(asked.model, folder / "out", ids, config, solver, options)
    seconds, peak = plan.seconds(rates), peak_memory_bytes()
    assert peak is not None
    embedding = llama.vocab_size * llama.hidden_size * job.weight_bytes
    print(
        f"| {asked.model.name} | {llama.num_hidden_layers} | {asked.samples} x {asked.seq_len} | "
        f"{seconds:.0f} / {report.seconds:.0f} ({report.seconds / seconds:.2f}) | "
        f"{plan.memory / 1e9:.2f} / {peak / 1e9:.2f} ({peak / plan.memory:.2f}) | "
        f"{embedding / 1e9:.2f} |"
    )


if __name__ == "__main__":
    main()
