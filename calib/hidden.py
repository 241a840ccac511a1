"""The activations at a layer boundary, for all calibration windows: two buffers that take turns.

    present   the input of the layer at work; not changed while it runs
    next      first the input of o_proj, then the sum after attention, then the layer's output

After a layer the two are swapped. Because `present` stays as it is, it can be saved to disk while
the layer runs. A model that is not quantized needs no `next`: its sums replace what they are made
of. Buffers are allocated once per run, in memory, on the GPU, or as files that are mapped into
memory. So is the room for what a layer keeps of its widest input.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_PAGE = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True)
class Storage:
    """How activations are held.

    Attributes:
        dtype: float32, or bfloat16 for half the room; arithmetic is float32 either way.
        spill: a folder for files instead of memory.
        device: "cpu", or "cuda" for the GPU's memory, which spares every batch its way there and
            back; not together with `spill`.
    """

    dtype: torch.dtype = torch.float32
    spill: Path | None = None
    device: str = "cpu"


class HiddenStates:
    """Hidden states of (windows, tokens), and room for what a layer makes of them.

    Args:
        windows, tokens: how many.
        hidden_size: features between layers.
        widest: features of the widest thing a layer stores here, the input of o_proj included.
        storage: dtype and place.
        in_place: of a model that stays as it is, whose layers' outputs replace their inputs: one
            buffer is `present` and `next`.

    Raises:
        OSError: the folder to spill to is missing or too small.
    """

    def __init__(
        self,
        windows: int,
        tokens: int,
        hidden_size: int,
        widest: int = 0,
        storage: Storage = Storage(),  # noqa: B008 - frozen
        in_place: bool = False,
    ) -> None:
        self.windows, self.tokens, self.hidden_size = windows, tokens, hidden_size
        shape = (windows, tokens, max(hidden_size, widest))
        self.present = Buffer(shape, storage)
        self.next = self.present if in_place else Buffer(shape, storage)
        self._room: Tensor | None = None

    def swap(self) -> None:
        """The layer's output becomes the input of the next layer."""
        self.present, self.next = self.next, self.present

    def room(self, windows: int, features: int, device: torch.device | str) -> Tensor:
        """(windows, tokens, features) float32, for what a layer keeps besides: in one piece, and
        the same for every layer, since memory in many pieces is hardly ever given back.
        """
        shape = windows, self.tokens, features
        if self._room is None or self._room.shape != shape:
            self._room = torch.empty(shape, device=device)
        return self._room

    def set_windows(self, hidden: Iterable[Tensor]) -> None:
        """Take the hidden states (tokens, hidden_size) of one window after another."""
        for window, values in enumerate(hidden):
            self.present.write(slice(window, window + 1), values[None])

    def output(self) -> Tensor:
        """A copy of all hidden states (windows, tokens, hidden_size), float32."""
        return self.present.read(slice(None), self.hidden_size).clone()

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the hidden states, window by window; see `restore`."""
        for window in range(self.windows):
            raw = self.present.stored(slice(window, window + 1), self.hidden_size)
            yield raw.cpu().contiguous().view(torch.uint8).numpy().tobytes()

    def restore(self, window: int, raw: bytearray) -> None:
        """Put back the bytes of one window that `chunks` gave."""
        values = torch.frombuffer(raw, dtype=self.present.dtype)
        self.present.write(slice(window, window + 1), values.view(1, self.tokens, -1))

    @property
    def window_bytes(self) -> int:
        """Bytes of one window's hidden states."""
        return self.tokens * self.hidden_size * self.present.dtype.itemsize


class Buffer:
    """(windows, tokens, features), read and written by slices of windows."""

    def __init__(self, shape: tuple[int, int, int], storage: Storage) -> None:
        self.dtype, self._map = storage.dtype, None
        if storage.spill is None:
            self._data = torch.empty(shape, dtype=storage.dtype, device=storage.device)
        else:
            count = shape[0] * shape[1] * shape[2]
            self._map = _mapped_file(storage.spill, count * storage.dtype.itemsize)
            self._data = torch.frombuffer(self._map, dtype=storage.dtype).view(shape)

    def stored(self, windows: slice, features: int) -> Tensor:
        """Values as they are held: a view, or of a file a copy."""
        part = self._data[windows, :, :features]
        if self._map is None:
            return part
        part = part.clone()
        self._forget(windows)
        return part

    def read(self, windows: slice, features: int) -> Tensor:
        """(windows, tokens, features) float32; not to be changed in place."""
        return self.stored(windows, features).float()

    def write(self, windows: slice, values: Tensor) -> None:
        """Store values (windows, tokens, features)."""
        self._data[windows, :, : values.shape[-1]] = values
        self._forget(windows)

    def _forget(self, windows: slice) -> None:
        """Let the system move a mapped part out of memory; it stays in the file."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, end, _ = windows.indices(len(self._data))
        bytes_per_window = self._data[0].numel() * self.dtype.itemsize
        begin = start * bytes_per_window // _PAGE * _PAGE
        self._map.madvise(mmap.MADV_DONTNEED, begin, end * bytes_per_window - begin)  # type: ignore[attr-defined]


def _mapped_file(folder: Path, size_bytes: int) -> mmap.mmap:
    """A mapped file without a name, gone with the process; its room on the disk is taken now."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder to spill activations to")
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            file.truncate(size_bytes)
        except OSError as error:
            raise OSError(
                f"{folder}: no room for {size_bytes / 1e9:.2f} GB of activations ({error})"
            ) from error
        return mmap.mmap(file.fileno(), size_bytes)
