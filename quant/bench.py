"""Time kernels beside each other, and a whole model.

Contenders take turns in one process: a pause in which the threads of the one before stop spinning,
a call that is not timed, then a few that are. Medians over all turns. "Cold" calls rotate over
copies of the weight that no cache holds; "hot" ones repeat one copy.
"""

from __future__ import annotations

import platform
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.contenders import CONTENDERS, ours
from quant.grid import QuantizedTensor, fit_minmax, nearest_codes
from quant.kernels import cpu
from quant.kernels.cpu import in_large_pages
from quant.linear import QuantLinear
from quant.llama.cache import KVCache
from quant.llama.model import Llama

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672), (576, 1536))  # (K, N)
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
PAUSE_S = 0.03

Call = Callable[[Tensor], object]


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds per call, weight bytes and operations (2 M K N) per second,
    and the share of the roof of float32 arithmetic (integer arithmetic can exceed it).
    """

    backend: str
    mode: str
    k: int
    n: int
    m: int
    group_size: int
    cold: bool
    ms: float
    gb_s: float
    gop_s: float
    roof_share: float


def measure_machine() -> dict[str, Any]:
    """Read bandwidth (GB/s) and float32 matrix product rate (GFLOP/s) of torch's threads."""
    data = in_large_pages(torch.zeros(3 * cold_bytes(), dtype=torch.uint8)).view(torch.float32)
    matrix = torch.ones(2048, 2048)
    read = _median(lambda: data.sum(), 7)
    product = _median(lambda: matrix @ matrix, 7)
    return {
        "read_gb_s": round(data.numel() * 4 / read / 1e9, 1),
        "sgemm_gflop_s": round(2 * 2048**3 / product / 1e9, 1),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "torch": torch.__version__,
    }


def measure_calls(repeats: int = 15) -> dict[str, float]:
    """Microseconds that a call from Python takes more than the compiled function, of which 1 row
    times 576 x 1536 in `fast` needs few: of the backend's `matmul`, and of a `QuantLinear`.
    """
    qt, x = _weight(576, 1536, 64), torch.randn(1, 576)
    packed, linear = cpu.pack(qt), QuantLinear(qt, backend="cpu", precision="fast")
    calls = (
        ours.bare_call("fast", packed, x),
        ours.bare_call("fast", packed, x[:0]),  # what ctypes takes for calling it
        lambda: cpu.matmul(x, packed, "fast"),
        lambda: linear(x),
    )
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for _ in range(repeats):
            for call, mine in zip(calls, times, strict=True):
                mine.append(timeit.timeit(call, number=1000) * 1e3)
    bare, empty, matmul, whole = (min(t) for t in times)  # the rest is what disturbed them
    return {
        "matmul_call_us": round(matmul - (bare - empty), 2),
        "linear_call_us": round(whole - (bare - empty), 2),
    }


def bench_kernels(
    machine: dict[str, Any],
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
    budget_s: float = 0.3,
    rotated_bytes: int | None = None,
) -> Iterator[Row]:
    """Time every contender that is installed.

    Args:
        machine: of `measure_machine`.
        shapes: (K, N) of the weights.
        rows: values of M.
        budget_s: seconds of timed calls for each measurement; at least 5 calls are made.
        rotated_bytes: of the copies that cold calls rotate over; `cold_bytes()` if None.
    """
    for k, n in shapes:
        group_size = next(g for g in (128, 64, 32) if k % g == 0)
        contenders = _build(_weight(k, n, group_size), rotated_bytes or cold_bytes())
        for m in rows:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
            for cold in (True, False):
                calls = [c[2] if cold else c[2][:1] for c in contenders]
                times = _take_turns(calls, x, budget_s)
                for (backend, mode, _, size), seconds in zip(contenders, times, strict=True):
                    roof = max(
                        size / machine["read_gb_s"], 2 * m * k * n / machine["sgemm_gflop_s"]
                    )
                    ms, gb_s, gop_s = seconds * 1e3, size / seconds / 1e9, 2 * m * k * n / seconds
                    figures = (round(f, 4) for f in (ms, gb_s, gop_s / 1e9, roof / 1e9 / seconds))
                    yield Row(backend, mode, k, n, m, group_size, cold, *figures)


def _weight(k: int, n: int, group_size: int) -> QuantizedTensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    grid = fit_minmax(weight, QuantConfig(4, group_size))
    return QuantizedTensor(nearest_codes(weight, grid), grid)


def _build(qt: QuantizedTensor, rotated_bytes: int) -> list[tuple[str, str, list[Call], int]]:
    """(backend, mode, a callable per copy, bytes of a copy) of what is installed."""
    built = []
    for backend, contender in CONTENDERS.items():
        for mode in contender.MODES:
            try:
                _, size = contender.build(mode, qt, 1)
                copies = 1 + rotated_bytes // size
                built.append((backend, mode, contender.build(mode, qt, copies)[0], size))
            except (ImportError, AttributeError):
                continue
    return built


def _take_turns(contenders: list[list[Call]], x: Tensor, budget_s: float) -> list[float]:
    """Median seconds of each contender, whose calls rotate over its copies."""
    times: list[list[float]] = [[] for _ in contenders]
    while any(len(t) < 5 or sum(t) < budget_s for t in times):
        for calls, mine in zip(contenders, times, strict=True):
            if len(mine) >= 5 and sum(mine) >= budget_s:
                continue
            time.sleep(PAUSE_S)
            calls[len(mine) % len(calls)](x)
            until = time.perf_counter() + budget_s / 5
            while not mine or time.perf_counter() < until:
                call = calls[(len(mine) + 1) % len(calls)]
                start = time.perf_counter()
                call(x)
                mine.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def bench_decode(
    model: Llama, prompt_tokens: int = 512, new_tokens: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """Median tokens per second of a whole model on the CPU: reading a prompt, and writing one token
    after another behind it.
    """
    limit = model.config.max_position_embeddings
    prompt_tokens = min(prompt_tokens, limit // 2)
    new_tokens = min(new_tokens, limit // 4)
    prompt = torch.arange(prompt_tokens)[None] % model.config.vocab_size
    prefill, decode = [], []
    for _ in range(repeats):
        with torch.inference_mode():
            cache = KVCache(model.config, 1, prompt_tokens + new_tokens, torch.device("cpu"))
            start = time.perf_counter()
            model(prompt, cache)
            middle = time.perf_counter()
            for token in range(new_tokens):
                model(torch.tensor([[token]]), cache)
            prefill.append(middle - start)
            decode.append(time.perf_counter() - middle)
    return {
        "tokens_per_s": round(new_tokens / statistics.median(decode), 2),
        "prefill_tokens_per_s": round(prompt_tokens / statistics.median(prefill), 1),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
    }


def cold_bytes() -> int:
    """More than any cache holds: 128 MB, or the last cache where Linux says it is larger."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        return max(128 << 20, int(file.read_text().strip().removesuffix("K")) << 10)
    except (OSError, ValueError):
        return 128 << 20


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _median(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
