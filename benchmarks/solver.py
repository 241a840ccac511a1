"""Seconds of one solve by its parts, beside the machine's SGEMM rate and GPTQModel's solve.

    python benchmarks/solver.py [--shapes 4096x4096 4096x11008] [--gptqmodel PYTHON]

A weight is given as rows x inputs; the Hessian is of random activations with some strong channels.
`factor` is Cholesky, `scales` the search for grids, `columns` the loop; `report` is what the
pipeline adds to say how much was lost, and by round-to-nearest. PYTHON is the interpreter of an
environment with GPTQModel, which then quantizes the same weight with the same Hessian, with its
defaults. The rate of torch's own float32 product is measured before each shape. Medians of three.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"])
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(gptqmodel_seconds(*problem(arguments.peer)))
        return
    print("| weight | factor | scales | columns | solve | of SGEMM | report | GPTQModel |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        row = ours(*problem(shape))
        peer = "" if arguments.gptqmodel is None else run_peer(arguments.gptqmodel, shape)
        print(f"| {shape} | {row} | {peer} |", flush=True)


def problem(shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in), and x^T x of 4096 activations of which every 61st channel is strong."""
    rows, inputs = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, inputs, generator=generator) * inputs**-0.5
    hessian = torch.zeros(inputs, inputs)
    for _ in range(4):
        x = torch.randn(1024, inputs, generator=generator)
        x[:, ::61] *= 8
        hessian.addmm_(x.T, x)
    return weight, hessian


def ours(weight: torch.Tensor, hessian: torch.Tensor) -> str:
    """The parts of our solve as cells of the table."""
    from quant.config import QuantConfig
    from quant.group_solver import _losses
    from quant.solvers import gptq, rtn
    from quant.solvers.gptq_options import GPTQOptions

    config, options = QuantConfig(4, GROUP), GPTQOptions()
    order = hessian.diagonal().argsort(descending=True)

    def report() -> None:
        plain = rtn.solve(weight, hessian, config, rtn.RTNOptions()).tensor
        _losses(weight, (solution.tensor, plain), (solution.losses, None), hessian)

    with torch.inference_mode():
        rate = sgemm_rate()
        solve = seconds(lambda: gptq.solve(weight, hessian, config, options))
        factor = seconds(lambda: gptq.factor(hessian, order, options.damp))
        scales = seconds(lambda: gptq._fit(weight, hessian, config, options))
        solution = gptq.solve(weight, hessian, config, options)
        told = seconds(report)
    inputs = len(hessian)
    work = inputs**3 / 3 + weight.numel() * inputs
    times = (factor, scales, solve - factor - scales, solve)
    cells = [f"{value:.2f}" for value in times]
    cells += [f"{work / solve / rate:.0%} of {rate / 1e9:.0f} GFLOP/s", f"{told:.2f}"]
    return " | ".join(cells)


def sgemm_rate() -> float:
    """Operations per second of torch's float32 product of 2048 x 2048 matrices."""
    left, right = torch.rand(2048, 2048), torch.rand(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: left @ right)


def seconds(work: Callable[[], Any]) -> float:
    """The median of three, after one to warm up."""
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run_peer(python: str, shape: str) -> str:
    """GPTQModel's seconds, from a process of its own."""
    command = [python, __file__, "--peer", shape]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return f"{float(done.stdout.split()[-1]):.2f}"


def gptqmodel_seconds(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """One solve by GPTQModel, the second, with everything but the Hessian."""
    import os

    os.cpu_count = lambda: 8  # with two cores its pool of loaders does not start
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    times = []
    for _ in range(2):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        task = GPTQ(linear, QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=False))
        task.quantizer.configure(perchannel=True)
        task.H = hessian * (2 / 4096)
        task.nsamples = task._hessian_total_samples = 4096
        start = time.perf_counter()
        task.quantize()
        times.append(time.perf_counter() - start)
    return times[-1]


if __name__ == "__main__":
    sys.exit(main())
