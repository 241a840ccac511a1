"""pytest tests/test_background.py: what runs beside the main thread takes no cores from it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from quant.background import background_thread

TASKS = "/proc/self/task"


def started(work: Callable[[], object]) -> int:
    """How many threads of this process `work` added."""
    before = len(os.listdir(TASKS))
    work()
    return len(os.listdir(TASKS)) - before


@pytest.mark.skipif(not os.path.isdir(TASKS), reason="the system does not list threads")
def test_the_background_thread_starts_no_team_and_leaves_the_callers() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.ones(1 << 20)
        (x + 1).sum()  # the caller's own team
        with background_thread() as pool:
            assert started(lambda: pool.submit(lambda: (x + 1).sum()).result()) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
