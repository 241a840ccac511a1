"""How a run goes, and what it tells while it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from calib.capture import Budget
from calib.hidden import Storage
from quant.report import LinearReport


@dataclass(frozen=True)
class Step:
    """Progress: a group of linears of one layer is solved."""

    layer: int
    num_layers: int
    linears: tuple[LinearReport, ...]


@dataclass(frozen=True)
class RunOptions:
    """How a run goes. Codes depend on `hidden` and, by the order of float32 sums, on `budget`.

    Attributes:
        device: where layers are computed, "cpu" or "cuda".
        overwrite: replace the output folder if it exists, and forget an earlier run.
        resume: continue the earlier run that stopped, if there is one.
        storage: dtype and place of the activations between layers.
        budget: how much of a layer's activations is computed and kept at a time.
        forecast: of seconds and peak_memory_bytes, kept in the report beside what was measured.
        data: what the windows are taken from, for the report.
        words: the command line's options by name, kept to say which differs where a run of other
            settings is not continued.
        on_write: called with the tokens that the model wrote to calibrate on, and all of them.
        on_step: called after each solved group.
    """

    device: str = "cpu"
    overwrite: bool = False
    resume: bool = False
    storage: Storage = Storage()  # noqa: RUF009 - frozen
    budget: Budget = Budget()  # noqa: RUF009 - frozen
    forecast: dict[str, float] | None = None
    data: str = ""
    words: dict[str, str] = field(default_factory=dict)
    on_write: Callable[[int, int], None] = lambda done, total: None
    on_step: Callable[[Step], None] = lambda step: None

    def numerics(self) -> dict[str, Any]:
        """The settings that the codes depend on."""
        return {
            "device": self.device,
            "hidden": str(self.storage.dtype).removeprefix("torch."),
            "batch_tokens": self.budget.batch_tokens,
        }
