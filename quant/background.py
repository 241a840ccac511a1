"""The thread beside the main one: it reads and writes while layers are computed.

An operation of torch takes all cores, through a team of OpenMP threads for each thread that calls
it. Once there are more of them than cores, none waits at the end of an operation any longer, they
sleep instead; and to be woken takes longer than many small operations themselves. So a thread that
works beside the main one keeps to itself.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

_LARGE = 1 << 24  # bytes


def background_thread() -> ThreadPoolExecutor:
    """An executor of one thread, in which torch starts no others; those of the caller stay."""
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))


class TensorWriter:
    """Writes one tensor at a time into files while the caller makes the next one."""

    def __init__(self) -> None:
        self._pool = background_thread()
        self._writing: Future[None] | None = None

    def write(self, file: Path, place: int, tensor: Tensor) -> None:
        """Put a contiguous tensor at a place of a file that exists, when the one before is written;
        it must stay as it is until then.

        Raises:
            OSError: the one before cannot be written.
        """
        self.wait()
        self._writing = self._pool.submit(_write, file, place, tensor)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: it cannot be.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def _write(file: Path, place: int, tensor: Tensor) -> None:
    """Open the file for one tensor, so that a failure leaves none open."""
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if tensor.nbytes > _LARGE:  # the disk then works while the next one is made
            opened.flush()
            os.fsync(opened.fileno())
