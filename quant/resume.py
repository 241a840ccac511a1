"""What of a run is durable, so that it can be killed at any moment and continued.

A finished layer reaches the disk in this order, while the next one is computed:

    1. its tensors, as part files of the checkpoint
    2. the hidden states behind it; those behind the layer before it stay until the next layer
    3. state.json, which lists both with their SHA-256

Each file is written under another name, synced and renamed. On --resume everything listed is read
back. The run continues behind the last layer for which all parts and the hidden states are whole;
so a torn part costs one layer. The tensors come out byte for byte as those of an undisturbed run,
because the same batches are computed from the same hidden states by the same code, on as many
threads. Keeping hidden states costs 4 bytes (2 with bfloat16) per token and feature written per
layer, and twice that of disk; computing them again would cost a forward per finished layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from calib.hidden import HiddenStates
from quant import distributed
from quant.background import background_thread
from quant.checkpoint_writer import CheckpointWriter, Part
from quant.durable import file_sha256, write_file
from quant.fingerprint import machine, warn_of_another_machine
from quant.own_windows import keep_windows, kept_windows
from quant.partial import OWN_WINDOWS, STATE
from quant.run_state import Finished, RunState


@dataclass
class Journal:
    """The durable state of a run in its partial folder.

    Attributes:
        folder: where parts, hidden states and state.json are.
        fingerprint: what a run must have in common with the one it continues.
        words: the command line's options by name, to say which of them differs.
        writer: writes the parts.
        windows: of all processes, with those that the model writes.
        own_windows: the file of the latter.
        layers: the finished layers; one more record follows for the embedding, norm and head.
        hidden: (layers before it, file) of the hidden states kept.
        damaged: the run stopped at a damaged layer; it may be continued with other weights.
    """

    folder: Path
    fingerprint: dict[str, Any]
    words: dict[str, str]
    writer: CheckpointWriter
    windows: int
    layers: list[Finished] = field(default_factory=list)
    hidden: dict[int, Part] = field(default_factory=dict)
    damaged: bool = False
    own_windows: Part | None = None

    def __post_init__(self) -> None:
        self._machine = machine()  # of this thread; others compute with fewer
        self._pool = background_thread()
        self._writing: Future[None] | None = None
        self.writer.on_shard = self._write_state

    def resume(self) -> None:
        """Take over what an earlier run left in the folder, if it left anything.

        Raises:
            ValueError: it was another model, other data, settings or code, or state.json is
                damaged; nothing is touched.
        """
        if not (self.folder / STATE).exists():
            return
        state = RunState.read(self.folder)
        if state.damaged and state.fingerprint["weights"] != self.fingerprint["weights"]:
            warnings.warn(
                f"{self.folder}: the weights were mended since a damaged layer stopped the run; "
                "layers finished before are kept as they are",
                stacklevel=1,
            )
            state.fingerprint["weights"] = self.fingerprint["weights"]
        state.refuse_other(self.folder, self.fingerprint, self.words)
        warn_of_another_machine(self.folder, state.machine, self._machine)
        self.writer.shards, self.layers, self.hidden = state.shards, state.layers, state.hidden
        self.own_windows = state.own_windows
        self._list_parts()
        self._drop_damaged()
        self._list_parts()
        self._remove_strangers()

    def kept_windows(self, tokens: int) -> Tensor | None:
        """What the model wrote to calibrate on in an earlier run, (windows, tokens) of ids."""
        return kept_windows(self.folder, self.own_windows, tokens)

    def keep_windows(self, windows: Tensor) -> None:
        """Make what the model wrote durable.

        Raises:
            ValueError: the run that is continued had others.
        """
        self.own_windows = keep_windows(self.folder, windows, self.own_windows)
        self._write_state()  # or the folder would count for nothing before the first layer

    def load_hidden(self, states: HiddenStates) -> None:
        """Read the hidden states behind the last finished layer."""
        with (self.folder / self.hidden[len(self.layers)].name).open("rb") as file:
            size = states.window_bytes
            stored = iter(lambda: bytearray(file.read(size)), b"")
            for window, raw in enumerate(distributed.deal(stored, self.windows, size)):
                states.restore(window, raw)

    def commit_plain(self, report: dict[str, Any], digests: dict[str, str]) -> None:
        """Make what was added to the writer behind the last layer durable, before returning."""
        self.commit_later(report, digests, None)
        self.wait()

    def commit_later(
        self, report: dict[str, Any], digests: dict[str, str], states: HiddenStates | None
    ) -> None:
        """Make a layer durable while the caller goes on; first waits for the layer before it, so
        that `states.present` is saved before it is used again.
        """
        self.wait()
        job = (self.writer.take(), report, digests, states)
        self._writing = self._pool.submit(self._commit, *job)

    def wait(self) -> None:
        """Wait until what was handed over is durable.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Finish what is under way and stop the thread."""
        self._pool.shutdown(wait=True)

    def note_damage(self) -> None:
        """Let the run be continued when the checkpoint is mended, if a layer is finished."""
        self.wait()
        if self.layers:
            self.damaged = True
            self._write_state()

    def forget_hidden(self) -> None:
        """Remove the hidden states: the checkpoint is finished."""
        self.hidden = {}
        self._write_state()
        for file in self.folder.glob("hidden-*"):
            file.unlink()

    def _commit(
        self,
        write: Callable[[], list[Part]],
        report: dict[str, Any],
        digests: dict[str, str],
        states: HiddenStates | None,
    ) -> None:
        before = len(self.layers) + 1
        parts = write()
        if states is not None:
            self.hidden = {key: file for key, file in self.hidden.items() if key == before - 1}
            self.hidden[before] = self._save_hidden(states, before)
        self.layers.append(Finished(parts, report, digests))
        self._write_state()

    def _save_hidden(self, states: HiddenStates, before: int) -> Part:
        """Write the hidden states over the older of the two that are kept."""
        file = self.folder / f"hidden-{before % 2}"

        def write(path: Path) -> None:
            with path.open("wb") as opened:
                chunks, size = states.chunks(), states.window_bytes
                for chunk in distributed.collect(chunks, self.windows, size):
                    opened.write(chunk)

        write_file(file, write)
        return Part(file.name, file.stat().st_size, file_sha256(file))

    def _write_state(self) -> None:
        marks = (self.fingerprint, self.words, self._machine)
        facts = (*marks, self.layers, self.damaged, self.hidden)
        RunState(*facts, self.writer.shards, self.own_windows).write(self.folder)

    def _drop_damaged(self) -> None:
        """Go back to the last layer with whole parts before it and whole hidden states behind it;
        to the start if the parts are being joined to shards already and one of these is damaged.
        """
        if self.writer.shards:
            files = [*self.writer.shards, *self.writer.unjoined()]
            if not all(file.is_whole(self.folder) for file in files):
                self.writer.shards, self.layers = [], []
            return
        whole = 0
        while whole < len(self.layers) and self._is_whole(self.layers[whole]):
            whole += 1
        while whole and not self._has_hidden(whole):
            whole -= 1
        self.layers = self.layers[:whole]

    def _list_parts(self) -> None:
        self.writer.parts = [part for layer in self.layers for part in layer.parts]

    def _is_whole(self, layer: Finished) -> bool:
        return all(part.is_whole(self.folder) for part in layer.parts)

    def _has_hidden(self, before: int) -> bool:
        return before in self.hidden and self.hidden[before].is_whole(self.folder)

    def _remove_strangers(self) -> None:
        """Remove what a crash left behind and the state does not list."""
        known = {STATE, OWN_WINDOWS, "lock"} | {file.name for file in self.hidden.values()}
        known |= {part.name for part in self.writer.parts}
        known |= {shard.name for shard in self.writer.shards}
        for file in (file for file in self.folder.iterdir() if file.name not in known):
            file.unlink()
