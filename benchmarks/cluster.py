"""What a 70B run takes on many machines, from parts measured on this one.

    python benchmarks/cluster.py                   measure, write docs/cluster.json, print the table
    python benchmarks/cluster.py --device cuda     the same on a GPU
    python benchmarks/cluster.py --table           print the table from docs/cluster.json

Measured are the rates of the parts of a run in operations per second of one core, or of a GPU, each
on as little as shows it; weights per second that the first process packs and hashes; and, of a GPU,
columns per second of a solve of so few rows that its steps take as long as they take to start.
docs/scaling.md has the formula and what it assumes.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calib.hessian import Hessian
from quant.code_counts import CodeCounts
from quant.config import QuantConfig
from quant.grid import QuantizedTensor
from quant.group_solver import Solved, solve_group
from quant.llama.config import LlamaConfig
from quant.llama.model import DecoderLayer
from quant.packing import pack
from quant.solvers.factor import factor
from quant.solvers.gptq_options import EFFORTS
from quant.verification import digest

FILE = Path(__file__).parents[1] / "docs" / "cluster.json"
HIDDEN, KV, FFN, LAYERS = 8192, 1024, 28672, 80  # Llama 2 70B
TOKENS, SEQ_LEN = 128 * 2048, 2048
SIZES = {"cpu": (4096, 11008, 512, 2048), "cuda": (HIDDEN, FFN, 2048, HIDDEN)}  # measured
GROUPS = ((HIDDEN + 2 * KV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN))
PARAMETERS = sum(rows * inputs for rows, inputs in GROUPS)  # of a layer
CORES = 64 * 0.7  # of a node, at the share of their speed that they have together


@dataclass(frozen=True)
class Machine:
    """One of P equal machines.

    Attributes:
        rates: per second: operations of each part, but of rows r n^2 for r rows of n inputs, with
            all that is made of them; packed weights; columns where steps are slow to start.
        network: bytes per second, in and out at once.
        disk: bytes per second of reading weights.
    """

    rates: dict[str, float]
    network: float
    disk: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    measured = json.loads(FILE.read_text(encoding="utf-8"))
    if not asked.table:
        with torch.inference_mode():
            measured[asked.device] = measure(torch.device(asked.device))
        FILE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    for device, facts in measured.items():
        print(f"{device}: {facts['machine']}")
        for name, rate in facts["rates"].items():
            print(f"  {name}: {rate / 1e9:.3g} G/s")
    rates = measured["cpu"]["rates"]
    node = Machine({name: rate * CORES for name, rate in rates.items()}, 1.25e9, 1e9)
    node.rates["packing"] = rates["packing"]  # by one core
    for count in (1, 8, 64):
        print(f"{count} CPU nodes: {show(hours(node, count))}")
    for count in (1, 8):
        print(f"{count} GPUs: {show(hours(Machine(measured['cuda']['rates'], 200e9, 1e9), count))}")


def hours(machine: Machine, count: int) -> dict[str, float]:
    """Hours of each part of the whole run on `count` machines."""
    squares = sum(inputs**2 for _, inputs in GROUPS)
    forward = TOKENS * (2 * PARAMETERS + 2 * SEQ_LEN * HIDDEN + 4 * HIDDEN * FFN)
    rates = machine.rates
    layer = {
        "forward": forward / rates["forward"] / count,
        "Hessians": TOKENS * squares * 9 / 8 / rates["Hessians"] / count,
        "rows": sum(rows * inputs**2 for rows, inputs in GROUPS) / rates["rows"] / count,
        "factors": sum(inputs**3 / 3 for _, inputs in GROUPS) / rates["factors"],
        "columns": sum(inputs for _, inputs in GROUPS) / rates.get("columns", math.inf),
        "packing": PARAMETERS / rates["packing"],
        "network": (count - 1) / count * (8 * squares + PARAMETERS) / machine.network,
        "reading": 2 * PARAMETERS / machine.disk,
    }
    return {name: seconds * LAYERS / 3600 for name, seconds in layer.items()}


def show(parts: dict[str, float]) -> str:
    """The sum and its parts in one line."""
    listed = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    return f"{sum(parts.values()):.1f} h ({listed})"


def measure(device: torch.device) -> dict[str, Any]:
    """The rates of each part on a device, with its name."""
    hidden, ffn, tokens, rows = SIZES[device.type]
    gpu, timed, rates = device.type == "cuda", functools.partial(_seconds, device), {}
    with device:
        x, layer = torch.randn(tokens, hidden), DecoderLayer(_llama(hidden, ffn))
        few, many = torch.randn(rows // 8, hidden), torch.randn(rows, hidden)
        wide = torch.randn(tokens, ffn if gpu else hidden)
        order = torch.arange(wide.shape[1])
    linears = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    rates["forward"] = 2 * linears * tokens / timed(functools.partial(_forward, layer, x[None]))
    del layer
    hessian, widest = Hessian(hidden, device), Hessian(wide.shape[1], device)
    rates["Hessians"] = tokens * hidden**2 * 9 / 8 / timed(lambda: hessian.add(x))
    widest.add(wide)
    made = len(order) ** 3 / 3
    rates["factors"] = made / timed(lambda: factor(widest.matrix, order, 0.01))
    seconds = [timed(functools.partial(_solve, weight, hessian)) for weight in (few, many)]
    codes = _solve(many, hessian)[0].tensor
    rates["packing"] = codes.codes.numel() / timed(functools.partial(_pack, codes))
    more = len(many) - len(few)
    rates["rows"] = more * hidden**2 / (seconds[1] - seconds[0])
    if gpu:
        other = timed(lambda: factor(hessian.matrix, order[:hidden], 0.01))
        other += len(few) * hidden**2 / rates["rows"]
        rates["columns"] = hidden / (seconds[0] - other)
    return {"machine": torch.cuda.get_device_name() if gpu else "one core", "rates": rates}


def _forward(layer: DecoderLayer, x: torch.Tensor) -> None:
    """The linears of one layer."""
    y = layer.self_attn.o_proj(layer.self_attn.mix(x))
    layer.mlp.down_proj(layer.mlp.mix(y))


def _solve(weight: torch.Tensor, hessian: Hessian) -> list[Solved]:
    return solve_group([weight], hessian, QuantConfig(), EFFORTS["fast"])


def _pack(codes: QuantizedTensor) -> None:
    """What the first process makes of a linear's codes, but for writing them."""
    pack(codes.codes.T, codes.bits).cpu()
    digest(codes)
    CodeCounts.of(codes)


def _llama(hidden: int, ffn: int) -> LlamaConfig:
    """One layer of this size."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "vocab_size": 32000}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128}
    rest = {"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
    return LlamaConfig.from_dict({**sizes, **heads, **rest, "max_position_embeddings": 4096})


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of the second of two calls; on the CPU those of all threads together, so that other work on
    the machine disturbs little.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = 0.0
    for _ in range(2):
        _wait(device)
        start = clock()
        work()
        _wait(device)
        seconds = clock() - start
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
