"""What a run will take, counted from the geometry before it starts: work, time, memory, disk.

Per layer with T tokens, P weights, input widths n (one for each group of linears that share an
input) and r rows on each:

    forward    2 P T + 2 T seq_len width (causal attention); gate and up twice where not kept
    Hessian    (1 + 1/8) n^2 T, a triangle in panels of n / 8 and at least 128
    Cholesky   n^3 / 3
    solve      r n^2, and 4 r n^2 for the errors of the result and of round-to-nearest

Rates are measured on this machine in about two seconds: a float32 matrix product, and the disk.
Memory is counted at the widest moment, when down_proj is solved.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from calib.capture import Budget
from calib.hidden import Storage
from quant.checkpoint import CheckpointReader
from quant.config import QuantConfig
from quant.geometry import linear_shapes
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS
from quant.machine import Rates, available_memory, nearest_folder
from quant.partial import partial_path

_SHARD_BYTES = 4 << 30  # joined beside its parts
_BASE_BYTES = 450_000_000  # torch, the tokenizer, the calibration text
_SQUARES = 5  # matrices of down_proj's width: the Hessian, and what factoring it takes
_STACKS = 6  # matrices of the shape that is solved: weights, errors, codes, their values


@dataclass(frozen=True)
class Job:
    """What is planned: a model of `weight_bytes` per weight, windows, how they are held,
    whether the float model runs beside the quantized one, the passes of tuning at the end, and the
    products of a weight with its Hessian beyond those of plain GPTQ.
    """

    llama: LlamaConfig
    config: QuantConfig
    windows: int
    seq_len: int
    weight_bytes: float
    storage: Storage = Storage()  # noqa: RUF009 - frozen
    budget: Budget = Budget()  # noqa: RUF009 - frozen
    beside: bool = False
    tuning: int = 0
    extra_products: int = 0

    @property
    def tokens(self) -> int:
        return self.windows * self.seq_len


@dataclass(frozen=True)
class Plan:
    """The forecast; sizes in bytes, work in float32 operations of the whole model."""

    layers: int
    tokens: int
    flops: dict[str, float]
    memory: int
    states: int  # hidden states of two layer boundaries
    spilled: int
    output: int
    tuned: bool

    @property
    def disk(self) -> int:
        """Bytes beside the output at most: its parts, the shard they become or the parts that
        tuning replaces, the hidden states.
        """
        again = self.output if self.tuned else min(_SHARD_BYTES, self.output)
        return self.output + again + self.states

    def seconds(self, rates: Rates) -> float:
        """Time at the measured rates; the disk works while a layer is computed."""
        return max(sum(self.flops.values()) / rates.flops, self.written / rates.disk)

    @property
    def written(self) -> float:
        """Bytes written over the run: the output twice, and the hidden states of every layer."""
        return 2 * self.output + self.layers * self.states / 2

    def lines(self, rates: Rates) -> list[str]:
        """The plan for the user."""
        work = ", ".join(f"{part} {count / 1e12:.3g}" for part, count in self.flops.items())
        return [
            f"plan: {self.layers} layers, {self.tokens} tokens",
            f"work: {work} TFLOP; about {_duration(self.seconds(rates))} at the "
            f"{rates.flops / 1e9:.0f} GFLOP/s and {rates.disk / 1e9:.2f} GB/s measured here",
            f"peak memory: about {_size(self.memory)}; disk: {_size(self.disk)} while it runs"
            + (f" and {_size(self.spilled)} spilled" if self.spilled else "")
            + f", {_size(self.output)} of output",
        ]


def make_plan(job: Job) -> Plan:
    """Count a run."""
    llama, tokens = job.llama, job.tokens
    shapes = linear_shapes(llama)
    weights = sum(out * width for out, width in shapes.values())
    groups = [(sum(shapes[n][0] for n in names), shapes[names[0]][1]) for names in LINEAR_GROUPS]
    wide = llama.num_attention_heads * llama.head_dim
    states = 2 * tokens * max(llama.hidden_size, wide) * job.storage.dtype.itemsize
    down = tokens * llama.intermediate_size * 4
    kept = min(down, job.budget.keep_bytes)
    again = 4 * llama.hidden_size * llama.intermediate_size * tokens * (1 - kept / down)
    products = 5 + job.extra_products + (2 if job.beside else 0)  # beside: judged twice
    per_layer = {
        "forward": 2 * weights * tokens + 2 * tokens * job.seq_len * wide + again,
        "Hessian": sum(width * (width + max(128, -(-width // 8))) * tokens for _, width in groups),
        "Cholesky": sum(width**3 / 3 for _, width in groups),
        "solve": sum(products * rows * width**2 for rows, width in groups),
    }
    heads = 1 if llama.tie_word_embeddings else 2
    plain = heads * llama.vocab_size * llama.hidden_size * job.weight_bytes
    group = job.config.group_size if job.config.group_size > 0 else llama.hidden_size
    packed = weights * (job.config.bits / 8 + (2 + job.config.bits / 8) / group)
    output = int(llama.num_hidden_layers * packed + plain)
    batch = max(job.budget.batch_tokens, job.seq_len) * llama.intermediate_size * 4 * 3
    solving = max(_SQUARES * width**2 + _STACKS * rows * width for rows, width in groups) * 4
    memory = _BASE_BYTES + max(solving, batch) + kept + packed
    memory += weights * (4 + job.weight_bytes) + (0 if job.storage.spill else states)
    streams = 2 if job.beside else 1
    if job.beside:
        per_layer["forward"] *= 2
        per_layer["Hessian"] += sum(2 * width**2 * tokens for _, width in groups[:-1])
        per_layer["Hessian"] += sum(2 * rows * width * tokens for rows, width in groups[1::2])
        memory += 4 * weights + kept + (0 if job.storage.spill else states)
    flops = {part: count * llama.num_hidden_layers for part, count in per_layer.items()}
    if job.tuning:
        flops["tuning"], tuning_memory = _tuning(job, weights, states, group)
        memory = max(memory, tuning_memory)
    return Plan(
        layers=llama.num_hidden_layers,
        tokens=tokens,
        flops=flops,
        memory=int(memory),
        states=states,
        spilled=streams * states if job.storage.spill else 0,
        output=output,
        tuned=job.tuning > 0,
    )


def _tuning(job: Job, weights: int, states: int, group: int) -> tuple[float, float]:
    """Work and memory of tuning, for layers of `weights` weights.

    A pass is a forward, a second one with gradients and the backward, 8 operations a weight and
    token, and 6 for a weight of the head. In memory are seven values for each scale, the head and
    the embedding, one layer's weights and gradients with the codes as they are read, and of one
    window the input of every layer and what a layer makes of it.
    """
    llama, layers = job.llama, job.llama.num_hidden_layers
    head = llama.vocab_size * llama.hidden_size
    work = job.tokens * (job.tuning * (8 * weights * layers + 6 * head) + 2 * weights * layers)
    window = 4 * job.seq_len * (layers * llama.hidden_size + 6 * llama.intermediate_size)
    memory = _BASE_BYTES + 7 * 4 * layers * weights / group + head * (4 + job.weight_bytes)
    memory += 16 * weights + window + (0 if job.storage.spill else states)
    return work, memory


def fit_memory(job: Job, limit: int, folder: Path) -> Job:
    """The job with as little saving as brings its forecast under `limit` bytes: first nothing of
    down_proj's input is kept, then activations go to `folder`, then batches are smaller.

    Raises:
        ValueError: nothing of this suffices.
    """
    spilled = replace(job, storage=replace(job.storage, spill=job.storage.spill or folder))
    ways = [
        job,
        replace(job, budget=replace(job.budget, keep_bytes=0)),
        spilled,
        replace(spilled, budget=replace(job.budget, keep_bytes=0)),
        replace(spilled, budget=Budget(batch_tokens=256, keep_bytes=0)),
    ]
    for way in ways:
        if make_plan(way).memory <= limit:
            return way
    raise ValueError(
        f"max-memory {_size(limit)}: the least this model takes is about "
        f"{_size(make_plan(ways[-1]).memory)}"
    )


def check_room(plan: Plan, output: Path, spill: Path | None) -> None:
    """Refuse, before any work, what memory or disk cannot hold.

    Raises:
        ValueError: says what is needed, what there is, and the option that helps.
    """
    free_memory = available_memory()
    if free_memory is not None and plan.memory > free_memory:
        advice = "pass --max-memory" if spill else "pass --spill DIR or --max-memory"
        raise ValueError(
            f"memory: about {_size(plan.memory)} are needed and {_size(free_memory)} are free; "
            f"{advice}, or fewer --samples"
        )
    written = sum(file.stat().st_size for file in partial_path(output).glob("*"))
    needs = {nearest_folder(output): plan.disk - written}
    if spill is not None:
        same = os.stat(nearest_folder(output)).st_dev == os.stat(nearest_folder(spill)).st_dev
        place = nearest_folder(output) if same else nearest_folder(spill)
        needs[place] = needs.get(place, 0) + plan.spilled
    for folder, need in needs.items():
        if need > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"{folder}: {_size(need)} of disk are needed and {_size(free)} are free; choose "
                "another --output, or fewer --samples"
            )


def weight_bytes(reader: CheckpointReader) -> float:
    """Bytes of a weight in the file, by its first matrix."""
    size = reader.tensor("model.layers.0.mlp.down_proj.weight").element_size()
    reader.release()
    return size


def parse_size(text: str) -> int:
    """Bytes of "16GB" or "800MB".

    Raises:
        ValueError: it is not such a size.
    """
    units = {"GB": 1e9, "MB": 1e6}
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise ValueError(f"size {text!r} is not understood; write 16GB or 800MB") from None
    if size <= 0:
        raise ValueError(f"size {text!r} must be above zero")
    return size


def _size(count: float) -> str:
    """Bytes as MB or GB (decimal)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
