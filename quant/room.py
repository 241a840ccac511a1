"""Whether a planned run fits the memory and the disk that there are, and what makes it fit."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from calib.capture import Budget
from quant.machine import available_memory, free_gpu_memory, nearest_folder
from quant.partial import partial_path
from quant.plan import Plan, make_plan
from quant.units import at_least, size
from quant.workload import Job, down_bytes


def fit_memory(job: Job, limit: int, folder: Path) -> Job:
    """The job with as little saving as brings its forecast under `limit` bytes, of this machine and
    of its GPU: first nothing of down_proj's input is kept, then activations go to `folder`, then
    batches are smaller.

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
        plan = make_plan(way)
        if max(plan.memory, plan.gpu_memory) <= limit:
            return way
    raise ValueError(
        f"max-memory {size(limit)}: the least this model takes is about {size(plan.memory)}"
        f"{plan.of_gpu}; pass --max-memory {_least(plan)}{_less(way, plan, limit)}"
    )


def _least(plan: Plan) -> str:
    return at_least(max(plan.memory, plan.gpu_memory))


def _less(job: Job, plan: Plan, limit: int) -> str:
    """What to pass instead where the most memory goes to what the model writes, in words."""
    if not plan.less_writing:
        return ""
    other = make_plan(replace(job, own=0, windows=job.windows - job.own))
    enough = max(other.memory, other.gpu_memory) <= limit
    return f", or --own-windows 0{'' if enough else f' and --max-memory {_least(other)}'}"


def use_gpu_memory(job: Job, limit: int) -> Job:
    """The job with the activations between layers on the GPU, and all of down_proj's input kept
    there, as far as the forecast stays under `limit` bytes.
    """
    storage = job.storage if job.storage.spill else replace(job.storage, device="cuda")
    for budget in (replace(job.budget, keep_bytes=down_bytes(job)), job.budget):
        way = replace(job, storage=storage, budget=budget)
        if make_plan(way).gpu_memory <= limit:
            return way
    return job


def check_room(plan: Plan, output: Path, spill: Path | None) -> None:
    """Refuse, before any work, what memory or disk cannot hold.

    Raises:
        ValueError: says what is needed, what there is, and the option that helps.
    """
    free_memory = available_memory()
    if free_memory is not None and plan.memory > (free_memory := free_memory // plan.here):
        save = "pass --max-memory" if spill else "pass --spill DIR or --max-memory"
        raise ValueError(
            f"memory: about {size(plan.memory)} are needed and {size(free_memory)} are free"
            + plan.of_each
            + (plan.less_writing or f"; {save}, or fewer --samples")
        )
    written = sum(file.stat().st_size for file in partial_path(output).glob("*"))
    if plan.gpu_memory and plan.gpu_memory > (free := free_gpu_memory()):
        raise ValueError(
            f"GPU memory: about {size(plan.gpu_memory)} are needed and {size(free)} are free"
            + (plan.less_writing or "; pass --max-memory, or --device cpu")
        )
    place = nearest_folder(output)
    needs = {"--output": (place, plan.disk - written)}
    if spill is not None:
        spill = nearest_folder(spill)
        if os.stat(place).st_dev == os.stat(spill).st_dev:
            needs["--output"] = (place, plan.disk - written + plan.spilled)
        else:
            needs["--spill"] = (spill, plan.spilled)
    for option, (folder, need) in needs.items():
        if need > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"{folder}: {size(need)} of disk are needed and {size(free)} are free; choose "
                f"another {option}, or fewer --samples"
            )
