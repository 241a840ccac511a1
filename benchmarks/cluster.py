"""What a 70B run takes on many machines, from parts measured on this one.

    python benchmarks/cluster.py             measure, write docs/cluster.json, print the table
    python benchmarks/cluster.py --table     print the table from docs/cluster.json

Measured are the rates of the parts of a run in operations per second of one core, each on as little
as shows it. docs/scaling.md has the formula and what it assumes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from calib.hessian import Hessian
from quant.config import QuantConfig
from quant.group_solver import solve_group
from quant.llama.config import LlamaConfig
from quant.llama.model import DecoderLayer
from quant.solvers.gptq import EFFORTS, factor

FILE = Path(__file__).parents[1] / "docs" / "cluster.json"
HIDDEN, KV, FFN, LAYERS = 8192, 1024, 28672, 80  # Llama 2 70B
TOKENS, SEQ_LEN = 128 * 2048, 2048
GROUPS = ((HIDDEN + 2 * KV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN))
PARAMETERS = sum(rows * inputs for rows, inputs in GROUPS)  # of a layer
ROWS = 8  # times r n^2: columns, two energies, a refit and a sweep, as quant.workload counts them
CORES = 64 * 0.7  # of a node, at the share of their speed that they have together


@dataclass(frozen=True)
class Machine:
    """One of P equal machines.

    Attributes:
        rates: operations per second of each part.
        network: bytes per second, in and out at once.
        disk: bytes per second of reading weights.
    """

    rates: dict[str, float]
    network: float
    disk: float


GPU = Machine(
    {"forward": 40e12, "Hessians": 40e12, "rows": 10e12, "factors": 15e12}, 200e9, 3e9
)  # assumed: float32 without TF32 on one of today's large GPUs


def main() -> None:
    if "--table" not in sys.argv:
        FILE.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    measured = json.loads(FILE.read_text(encoding="utf-8"))
    for name, rate in measured.items():
        print(f"{name}: {rate / 1e9:.1f} GFLOP/s of one core")
    node = Machine({name: rate * CORES for name, rate in measured.items()}, 1.25e9, 1e9)
    for count in (1, 8, 64):
        print(f"{count} CPU nodes: {show(hours(node, count))}")
    print(f"8 GPUs: {show(hours(GPU, 8))}")


def hours(machine: Machine, count: int) -> dict[str, float]:
    """Hours of each part of the whole run on `count` machines."""
    squares = sum(inputs**2 for _, inputs in GROUPS)
    forward = TOKENS * (2 * PARAMETERS + 2 * SEQ_LEN * HIDDEN + 4 * HIDDEN * FFN)
    rates = machine.rates
    layer = {
        "forward": forward / rates["forward"] / count,
        "Hessians": TOKENS * squares * 9 / 8 / rates["Hessians"] / count,
        "rows": sum(ROWS * rows * inputs**2 for rows, inputs in GROUPS) / rates["rows"] / count,
        "factors": sum(inputs**3 / 3 for _, inputs in GROUPS) / rates["factors"],
        "network": (count - 1) / count * (8 * squares + PARAMETERS) / machine.network,
        "reading": 2 * PARAMETERS / machine.disk,
    }
    return {name: seconds * LAYERS / 3600 for name, seconds in layer.items()}


def show(parts: dict[str, float]) -> str:
    """The sum and its parts in one line."""
    listed = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    return f"{sum(parts.values()):.1f} h ({listed})"


def measure(hidden: int = 4096, ffn: int = 11008, tokens: int = 512, rows: int = 2048) -> dict:
    """Operations per second of one core, of each part, at the sizes of a 7B layer."""
    x = torch.randn(tokens, hidden)
    hessian = Hessian(hidden)
    layer = DecoderLayer(_llama(hidden, ffn))
    linears = 4 * hidden**2 + 3 * hidden * ffn
    rates = {"forward": 2 * linears * tokens / _core_seconds(lambda: _forward(layer, x[None]))}
    made = tokens * hidden**2 * 9 / 8
    rates["Hessians"] = made / _core_seconds(lambda: hessian.add(x))
    hessian.matrix.diagonal().add_(1)
    order = torch.arange(hidden)
    rates["factors"] = hidden**3 / 3 / _core_seconds(lambda: factor(hessian.matrix, order, 0.01))
    weight = torch.randn(rows, hidden)
    few, many = weight[: rows // 8], weight
    _solve(few, hessian)  # the first call also starts threads
    seconds = _core_seconds(lambda: _solve(many, hessian))
    seconds -= _core_seconds(lambda: _solve(few, hessian))  # the factorization, once
    rates["rows"] = ROWS * (len(many) - len(few)) * hidden**2 / seconds
    return rates


def _forward(layer: DecoderLayer, x: torch.Tensor) -> None:
    """The linears of one layer."""
    y = layer.self_attn.o_proj(layer.self_attn.mix(x))
    layer.mlp.down_proj(layer.mlp.mix(y))


def _solve(weight: torch.Tensor, hessian: Hessian) -> None:
    solve_group([weight], hessian, QuantConfig(), EFFORTS["fast"])


def _llama(hidden: int, ffn: int) -> LlamaConfig:
    """One layer of this size."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "vocab_size": 32000}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128}
    rest = {"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
    return LlamaConfig.from_dict({**sizes, **heads, **rest, "max_position_embeddings": 4096})


def _core_seconds(work: Callable[[], object]) -> float:
    """Seconds of all threads together, so that other work on the machine disturbs little."""
    start = time.process_time()
    with torch.inference_mode():
        work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
