"""What a run will take, before it starts: time, memory, disk.

Work and memory are counted in workload.py. Rates are measured on this machine in about two seconds:
a float32 product as the run makes them, and the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calib.capture import Budget
from calib.hidden import Storage
from quant import distributed
from quant.checkpoint import CheckpointReader
from quant.config import QuantConfig
from quant.equalized import TOKENS
from quant.geometry import stored_bytes
from quant.layer_reader import plain_tensors
from quant.llama.config import LlamaConfig
from quant.machine import Rates
from quant.peak_memory import (
    kept_states_bytes,
    own_windows_bytes,
    peak_bytes,
    slopes_bytes,
    states_bytes,
    writing_bytes,
)
from quant.units import duration, size
from quant.workload import Job, cost, waiting, work

_SHARD_BYTES = 4 << 30  # joined beside its parts
_KEEP_BESIDE_GRADIENTS = 1 << 26  # of down_proj's input: little, as there is much else to hold
_START_SECONDS, _LAYER_SECONDS = 1.0, 0.06  # checks and reading back; files of a layer


@dataclass(frozen=True)
class Plan:
    """The forecast for one process; sizes in bytes, work in float32 operations of the whole model.
    What is spilled is that of all processes of this machine.
    """

    layers: int
    tokens: int
    flops: dict[str, float]
    cost: float  # operations of a large product that take as long as all of the work
    memory: int
    gpu_memory: int
    writing: int  # of either, while the model writes
    states: int  # hidden states of two layer boundaries that are kept for --resume
    own_windows: int  # that are kept as well
    slopes: int  # gradients, in a file
    spilled: int
    output: int
    waiting: float  # seconds
    here: int  # processes on this machine

    @property
    def disk(self) -> int:
        """Bytes at most: the output's parts and the shard they become, hidden states, gradients,
        windows of the model's own.
        """
        slopes = 0 if self.spilled else self.slopes
        kept = self.states + self.own_windows + slopes
        return self.output + min(_SHARD_BYTES, self.output) + kept

    def seconds(self, rates: Rates) -> float:
        """Time at the measured rates; the disk works while a layer is computed."""
        least = _START_SECONDS + _LAYER_SECONDS * self.layers + self.waiting
        return least + max(self.cost / rates.flops, self.written / rates.disk)

    @property
    def written(self) -> float:
        """Bytes written over the run: the output twice, and the hidden states of every layer."""
        return 2 * self.output + self.layers * self.states / 2 + self.own_windows

    def lines(self, rates: Rates) -> list[str]:
        """The plan for the user."""
        work = ", ".join(f"{part} {count / 1e12:.3g}" for part, count in self.flops.items())
        return [
            f"plan: {self.layers} layers, {self.tokens} tokens",
            f"work: {work} TFLOP; about {duration(round(self.seconds(rates)))} at the "
            f"{rates.flops / 1e9:.0f} GFLOP/s and {rates.disk / 1e9:.2f} GB/s measured here",
            f"peak memory: about {size(self.memory)}{self.of_gpu}{self.of_each}; "
            f"disk: {size(self.disk)} while it runs"
            + (f" and {size(self.spilled)} spilled" if self.spilled else "")
            + f", {size(self.output)} of output",
        ]

    @property
    def less_writing(self) -> str:
        """What to do where the most memory goes to what the model writes, in words."""
        most = self.gpu_memory or self.memory
        return "; pass --own-windows 0" if most == self.writing else ""

    @property
    def of_each(self) -> str:
        """Of how many processes on this machine what is told is, in words."""
        return f" for each of {self.here} processes" if self.here > 1 else ""

    @property
    def of_gpu(self) -> str:
        """What the GPU has to hold, in words."""
        return f" and {size(self.gpu_memory)} of the GPU" if self.gpu_memory else ""


def make_plan(job: Job) -> Plan:
    """Count a run."""
    memory, gpu_memory = peak_bytes(job)
    writing = writing_bytes(job)
    if job.device == "cpu":
        memory = max(memory, writing)
    else:
        gpu_memory = max(gpu_memory, writing)
    inside, outside = stored_bytes(job.llama, job.config, job.weight_bytes)
    slopes = 0 if job.storage.device == "cuda" else slopes_bytes(job)
    return Plan(
        layers=job.llama.num_hidden_layers,
        tokens=job.tokens,
        flops=work(job),
        cost=cost(job),
        memory=int(memory),
        gpu_memory=int(gpu_memory),
        writing=int(writing),
        states=kept_states_bytes(job),
        own_windows=own_windows_bytes(job),
        slopes=slopes,
        spilled=job.here * (states_bytes(job) + slopes) if job.storage.spill else 0,
        output=int(inside + outside),
        waiting=waiting(job, inside + outside),
        here=job.here,
    )


def job_of(
    reader: CheckpointReader,
    llama: LlamaConfig,
    config: QuantConfig,
    windows: tuple[int, int],
    solver: Any,
    storage: Storage = Storage(),  # noqa: B008 - frozen
    device: str = "cpu",
) -> Job:
    """The first process's part in quantizing a checkpoint.

    Args:
        windows: how many of the text, in all processes, and their tokens.
        solver: the options of one of SOLVERS.
        storage: dtype and place of the activations between layers.
        device: where layers are computed, "cpu" or "cuda".
    """
    (count, tokens), own = windows, getattr(solver, "own", 0)
    parts = [distributed.share(number, 0) for number in (count + own, own)]
    count, own = (part.stop - part.start for part in parts)
    processes = distributed.world_size()
    fisher = getattr(solver, "fisher", 0) // processes
    return Job(
        llama,
        config,
        count,
        tokens,
        _weight_bytes(reader, llama),
        storage,
        Budget(keep_bytes=_KEEP_BESIDE_GRADIENTS) if fisher else Budget(),
        beside=getattr(solver, "needs_float", False),
        sweeps=getattr(solver, "sweeps", 0),
        refits=getattr(solver, "refits", 0),
        fisher=fisher,
        own=own,
        equalized=min(TOKENS, count * tokens) if getattr(solver, "equalize", 0) else 0,
        device=device,
        processes=processes,
        here=distributed.processes_here(),
    )


def _weight_bytes(reader: CheckpointReader, llama: LlamaConfig) -> float:
    """Bytes of a weight in the matrices that are copied: the embedding, and a head of its own."""
    sizes = []
    for name, shape in plain_tensors(llama).items():
        if len(shape) == 2:
            sizes.append(reader.tensor(name).element_size())
            reader.release()
    return sum(sizes) / len(sizes)
