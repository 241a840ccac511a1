"""Many processes quantize one model: the only importer of torch.distributed.

    torchrun --nproc-per-node 2 cli.py quantize ...

    calibration windows   each process has its share and advances their hidden states alone
    Hessians              sums over tokens, so they add: sum_()
    rows of a solve       independent given the Hessian: each process solves its share,
                          and gather_rows() gives all of them the codes
    disk and screen       rank 0 alone; collect() and deal() bring it the hidden states to save,
                          and hand out those that were saved

Every process factors every Hessian: they would only wait for the one that did, and the factor need
not be sent. On one process each function here is the identity, and torch.distributed is not loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

from quant.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor

_SLAB_BYTES = 1 << 26  # what sum_ sends at a time: its buffers stay small beside a Hessian
_TIMEOUT = timedelta(hours=2)  # of one collective; the watch sees dead processes long before
_watch: Watch | None = None
_background: Any = None  # a group of its own for what a thread sends beside the work


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started; nothing happens where it did not.

    Raises:
        ConnectionError: the processes do not find one another.
    """
    global _watch, _background
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _watch is not None:
        yield
        return
    import torch
    import torch.distributed as dist

    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
        _watch = Watch(store, rank, world)
        if torch.cuda.is_available():
            torch.cuda.set_device(_local("RANK") % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        ranks = {"rank": rank, "world_size": world}
        dist.init_process_group(backend, store=store, timeout=_TIMEOUT, **ranks)
        _background = dist.new_group(timeout=_TIMEOUT, backend="gloo")
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"the processes do not find one another ({error})") from error
    _watch.start()
    with open(os.devnull, "w") as nowhere:
        if rank:
            sys.stdout = sys.stderr = nowhere
        try:
            yield
            _collective(dist.barrier)  # rank 0 may still be writing
            _watch.stop()
            dist.destroy_process_group()
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def check_device(device: str) -> None:
    """Refuse several processes on one GPU, which NCCL does not connect.

    Raises:
        ValueError: this machine has more processes of the run than GPUs, and they are asked for.
    """
    if device != "cuda" or world_size() == 1:
        return
    import torch

    processes, gpus = processes_here(), torch.cuda.device_count()
    if processes > gpus:
        raise ValueError(
            f"device cuda: {processes} processes for {gpus} GPUs here; start one for each GPU "
            "(--nproc-per-node), or use --device cpu"
        )


def processes_here() -> int:
    """How many of the processes that work on this model share this machine."""
    return _local("WORLD_SIZE", 1) if world_size() > 1 else 1


def _local(name: str, otherwise: int = 0) -> int:
    """What torchrun says of this machine's processes."""
    return int(os.environ.get(f"LOCAL_{name}", otherwise))


def print_error(line: str) -> None:
    """Print a line that ends the run on stderr; of many processes, the first to fail does so."""
    if _watch is None or _watch.claim():
        print(line, file=sys.__stderr__ if _watch else sys.stderr, flush=True)


def rank() -> int:
    """This process's number, from 0."""
    return _group().get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """How many processes work on this model."""
    dist = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist and dist.is_available() and dist.is_initialized() else 1


def share(count: int, of: int | None = None) -> slice:
    """A process's part of `count` windows or rows: consecutive, equal but for the last ones.

    Args:
        of: the rank of the process; this one by default.
    """
    size = -(-count // world_size())
    start = min((rank() if of is None else of) * size, count)
    return slice(start, min(start + size, count))


def sum_(tensor: Tensor) -> None:
    """Replace a contiguous tensor by its sum over processes, added in the order of ranks.

    Process r receives everybody's r-th piece, adds them up, and sends the sum to all: as little
    traffic as any all-reduce, every process gets the same bits, and so does the next run.
    """
    import torch

    world = world_size()
    if world == 1:
        return
    for slab in tensor.view(-1).split(_SLAB_BYTES // tensor.element_size()):
        pieces = slab.new_zeros(world, -(-len(slab) // world))
        pieces.view(-1)[: len(slab)] = slab
        received = torch.empty_like(pieces)  # row r: this process's piece, as rank r has it
        _collective(_group().all_to_all_single, received, pieces)
        total = received[0].clone()
        for part in received[1:]:
            total += part
        _collective(_group().all_gather, list(pieces), total)
        slab.copy_(pieces.view(-1)[: len(slab)])


def total(count: int) -> int:
    """The sum of a number over processes."""
    import torch

    counts = torch.tensor([count])
    sum_(counts)
    return int(counts)


def gather_rows(part: Tensor, count: int) -> Tensor:
    """All `count` rows of a tensor of which each process has its share(count), on every process."""
    world = world_size()
    if world == 1:
        return part
    size = -(-count // world)
    padded = part.new_zeros(size, *part.shape[1:])
    padded[: len(part)] = part
    rows = part.new_empty(world * size, *part.shape[1:])
    _collective(_group().all_gather, list(rows.split(size)), padded)
    return rows[:count]


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on every process; it is called there alone."""
    if world_size() == 1:
        return make()
    holder = [make() if rank() == 0 else None]
    _collective(_group().broadcast_object_list, holder)
    return holder[0]


def collect(chunks: Iterable[bytes], count: int, size: int) -> Iterator[bytes]:
    """All `count` chunks of `size` bytes, in order, on rank 0, and none elsewhere.

    May run in a thread beside other operations. Another process must exhaust it, too: it sends.

    Args:
        chunks: this process's share(count) of them.
    """
    import torch

    if rank() == 0:
        yield from chunks
        for source in range(1, world_size()):
            buffer = torch.empty(size, dtype=torch.uint8)
            for _ in range(count)[share(count, source)]:
                _collective(_group().recv, buffer, source, _background)
                yield buffer.numpy().tobytes()
        return
    for chunk in chunks:
        buffer = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
        _collective(_group().send, buffer, 0, _background)


def deal(chunks: Iterator[bytearray], count: int, size: int) -> Iterator[bytearray]:
    """The other way: this process's share(count) of the chunks that rank 0 has."""
    import torch

    if rank() == 0:
        yield from islice(chunks, len(range(count)[share(count)]))
        for target in range(1, world_size()):
            for chunk in islice(chunks, len(range(count)[share(count, target)])):
                buffer = torch.frombuffer(chunk, dtype=torch.uint8)
                _collective(_group().send, buffer, target, _background)
        return
    for _ in range(count)[share(count)]:
        raw = bytearray(size)
        _collective(_group().recv, torch.frombuffer(raw, dtype=torch.uint8), 0, _background)
        yield raw


def _group() -> Any:
    """torch.distributed; callers have seen that a group exists."""
    return sys.modules["torch.distributed"]


def _collective(operation: Callable[..., Any], *args: Any) -> None:
    """Run a collective operation; says which process has stopped if it fails."""
    try:
        operation(*args)
    except RuntimeError as error:
        reason = _watch.diagnose() if _watch else str(error).splitlines()[0]
        raise ConnectionError(reason) from error
