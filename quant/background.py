"""The thread beside the main one: it reads and writes while layers are computed.

An operation of torch takes all cores, through a team of OpenMP threads for each thread that calls
it. Once there are more of them than cores, none waits at the end of an operation any longer, they
sleep instead; and to be woken takes longer than many small operations themselves. So a thread that
works beside the main one keeps to itself.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def background_thread() -> ThreadPoolExecutor:
    """An executor of one thread, in which torch starts no others; those of the caller stay."""
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
