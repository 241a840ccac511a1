"""What a run looks like: a progress bar on a terminal, a line per layer elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quant.llama.model import LINEAR_GROUPS
from quant.run_options import Step


class StepPrinter:
    """Shows layer, stage, time and the mean relative error so far; call it with each Step."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._start = time.perf_counter()
        self._errors: list[float] = []
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("embedding", total=None, note="")

    def __enter__(self) -> StepPrinter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def wrote(self, done: int, total: int) -> None:
        """The model has written `done` of `total` tokens to calibrate on."""
        self._bar.update(self._task, description="writing", note=f"{done} of {total} tokens")
        if not self._console.is_terminal and done == total:
            elapsed = time.perf_counter() - self._start
            self._console.print(f"wrote {total} tokens to calibrate on  {elapsed:.0f} s")

    def __call__(self, step: Step) -> None:
        self._errors += [linear.relative_error for linear in step.linears]
        mean = sum(self._errors) / len(self._errors)
        stage = " ".join(linear.name.rpartition(".")[2] for linear in step.linears)
        label = "head"
        if step.layer < step.num_layers:
            label = f"layer {step.layer + 1}/{step.num_layers}"
        self._bar.update(
            self._task,
            advance=1,
            total=step.num_layers * len(LINEAR_GROUPS),
            description=label,
            note=f"{stage}  relative error {mean:.5f}",
        )
        if not self._console.is_terminal and stage.endswith(("down_proj", "lm_head")):
            elapsed = time.perf_counter() - self._start
            remaining = elapsed / (step.layer + 1) * max(0, step.num_layers - step.layer - 1)
            self._console.print(
                f"{label}  relative error {mean:.5f}  {elapsed:.0f} s, about {remaining:.0f} s left"
            )


@contextmanager
def window_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of evaluated windows on a terminal, nothing elsewhere; yields what to call."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("windows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
