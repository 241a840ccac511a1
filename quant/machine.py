"""What this machine has and how fast it is."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.durable import unwritten
from quant.native.products import product

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Rates:
    """Of this machine: float32 operations and bytes to the disk, per second."""

    flops: float
    disk: float


def measure(folder: Path, device: str = "cpu") -> Rates:
    """Time a float32 product on a device for about a second, and 64 MB to the disk of `folder`, or
    half of what is free there.
    """
    left, right = torch.rand(1024, 2048, device=device), torch.rand(2048, 2048, device=device)
    product(left, right).sum().item()
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 1:
        product(left, right)[0, 0].item()  # waits for a GPU
        count += 1
    flops = count * 2 * 1024 * 2048 * 2048 / seconds
    del left, right
    return_memory()
    folder = nearest_folder(folder)
    blocks = max(1, min(16, shutil.disk_usage(folder).free // (2 * _BLOCK_BYTES)))
    start = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(blocks):
                file.write(bytes(_BLOCK_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(folder, error) from error
    return Rates(flops, blocks * _BLOCK_BYTES / (time.perf_counter() - start))


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, and within the limit of a container; None where the
    system does not tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return None
    limited = _room_of_group()
    return free if limited is None else min(free, limited)


def _room_of_group(
    groups: Path = Path("/sys/fs/cgroup"), own: str = "/proc/self/cgroup"
) -> int | None:
    """What the limit of this process's control group leaves (cgroup 2), not counting the least
    recently used part of the files in memory; None where there is no limit.
    """
    try:
        name = Path(own).read_text(encoding="utf-8").partition("::")[2].strip()
        group = groups / name.lstrip("/")
        limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # a limit of "max" is none
        return None


def free_gpu_memory() -> int:
    """Bytes that are free on the GPU of this process, which must have one."""
    free: int = torch.cuda.mem_get_info()[0]
    return free


def peak_gpu_memory_bytes() -> int | None:
    """The most memory that tensors took on the GPU; None where none was used."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def return_memory() -> None:
    """Give back to the system what the C library keeps of freed memory; without this its pieces
    pile up from layer to layer. Does nothing where the C library is not glibc.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def nearest_folder(path: Path) -> Path:
    """The nearest folder that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not tell.

    Linux is asked for VmHWM, because the peak of getrusage begins with that of the process which
    started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # type: ignore[attr-defined]
    return peak if sys.platform == "darwin" else peak * 1024
