"""What a process other than the first has in place of an output folder.

It writes nothing and reads nothing back. Its share of the hidden states behind each layer goes to
the first process, which keeps those of all windows in one file (quant.resume), and comes from there
when a run is resumed: with as many processes as before, or another number.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.hidden import HiddenStates
from quant import distributed
from quant.background import background_thread
from quant.grid import QuantizedTensor


class NoWriter:
    """Takes what a format's writer takes."""

    def add_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Nothing: the first process writes it."""

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Nothing: the first process writes it."""


class Follower:
    """Takes what a Journal takes.

    Args:
        windows: of all processes.
    """

    def __init__(self, windows: int) -> None:
        self.windows = windows
        self.folder: Path | None = None
        self._pool = background_thread()
        self._sending: Future[None] | None = None

    def keep_windows(self, windows: Tensor) -> None:
        """Nothing: the first process keeps them."""

    def load_hidden(self, states: HiddenStates) -> None:
        """Receive this process's share of what the first one kept."""
        dealt = distributed.deal(iter(()), self.windows, states.window_bytes)
        for window, raw in enumerate(dealt):
            states.restore(window, raw)

    def commit_later(
        self, report: dict[str, Any], digests: dict[str, str], states: HiddenStates
    ) -> None:
        """Send the hidden states while the caller goes on; first waits for those before."""
        self.wait()
        self._sending = self._pool.submit(self._send, states)

    def wait(self) -> None:
        """Wait until what was handed over is sent."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def close(self) -> None:
        """Finish what is under way and stop the thread."""
        self._pool.shutdown(wait=True)

    def _send(self, states: HiddenStates) -> None:
        for _ in distributed.collect(states.chunks(), self.windows, states.window_bytes):
            pass
