"""Processes that watch one another, so that one that dies ends the others with one clear line.

Each process counts up a number in the store they share, every BEAT_S, and looks at the next
process's: what has not moved for LIMIT_S is dead or hangs. A failing process first claims the right
to say why; the others see the claim and end in silence. All this happens in a thread, because the
work may be minutes deep in one product of matrices.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

BEAT_S = 1.0
LIMIT_S = 30.0  # without a sign of life; a process may be starved for seconds on a busy machine
_GRACE_S = 3.0  # for the main thread to end by itself
_EXIT_CODE = 2
_RESUME = "finished layers are kept: start again with --resume"


class Watch:
    """The watch of one process.

    Args:
        store: a torch.distributed store that outlives any single process.
        rank: this process, of `world`.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store = store.clone()  # a connection of its own: no call waits for another thread's
        self._rank, self._world = rank, world
        self._beats = 0
        self._done = threading.Event()
        self._may_claim = threading.Lock()
        self._store.set(f"who/{rank}", f"pid {os.getpid()} on {socket.gethostname()}")
        self._beat()

    def start(self) -> None:
        """Begin to watch; SIGTERM, by which torchrun ends the others, is answered from now on."""
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        os.set_blocking(self._wake, False)  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch: the work is done."""
        self._done.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def claim(self) -> bool:
        """Whether this process is the first to fail, and may say why: once, though the work and the
        watch may both see it end.
        """
        if not self._may_claim.acquire(blocking=False):
            return False
        try:
            mine = str(self._rank).encode()
            return self._store.compare_set("failed", "", mine.decode()) == mine
        except RuntimeError:  # the store is gone with the first node
            return self._rank <= 1

    def diagnose(self) -> str:
        """Which processes show no sign of life, after a few seconds' look."""
        try:
            before = self._counts()
            for _ in range(5):
                self._beat()
                time.sleep(BEAT_S)
            after = self._counts()
            silent = [r for r in range(self._world) if before[r] == after[r] and r != self._rank]
            names = [f"process {r} ({self._store.get(f'who/{r}').decode()})" for r in silent]
        except RuntimeError:
            names = ["the node of process 0"]
        if not names:
            return f"the run was ended from outside; {_RESUME}"
        return f"{' and '.join(names)} of {self._world} stopped; {_RESUME}"

    def _run(self) -> None:
        """The thread: a beat and a look every BEAT_S."""
        following = (self._rank + 1) % self._world
        count, seen = b"", time.monotonic()
        while not self._done.wait(BEAT_S):
            try:
                self._beat()
                if self._store.check(["failed"]):
                    self._end()
                latest = self._store.get(f"beat/{following}")
            except RuntimeError:
                self._end(self.diagnose())
            if latest != count:
                count, seen = latest, time.monotonic()
            if time.monotonic() - seen > LIMIT_S or self._terminated():
                self._end(self.diagnose())

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _counts(self) -> list[bytes]:
        """The number of every process."""
        return self._store.multi_get([f"beat/{r}" for r in range(self._world)])

    def _terminated(self) -> bool:
        """Whether SIGTERM has come."""
        try:
            return signal.SIGTERM in os.read(self._wake, 64)
        except BlockingIOError:
            return False

    def _end(self, reason: str | None = None) -> None:
        """End this process from the watch's thread, as a kill would: whatever is finished is safe
        on disk.
        """
        if reason and self.claim():
            print(f"error: {reason}", file=sys.__stderr__, flush=True)
        self._done.wait(_GRACE_S)
        os._exit(_EXIT_CODE)
