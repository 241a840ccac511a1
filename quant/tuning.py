"""The last step of `--effort max`: scales and norms of all layers, moved by the gradient of the
divergence from the float model (quant.distill).

One window in eight is held out, from the solver too, and judges: after every few windows, values
are rounded to what the file holds (float16 scales, norms in the checkpoint's dtype) and measured on
it. Where that is better, it is kept; where not, values go back to the best and steps become
smaller. So the result is never worse on the windows that judge than what the solver made.

There are more scales than tokens to learn from, but the float model has more to say: from the
second pass on, 4 tokens in 10 are drawn anew from its own predictions, so that each pass has
another text. Its answer to that is one forward, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from quant import distributed
from quant.distill import Lesson, Student, retell
from quant.finished_layers import FinishedLayers
from quant.grid import LARGEST_SCALE, SMALLEST_SCALE
from quant.layer_inputs import advance_float, embed, empty_states
from quant.layer_loop import Run, copy_plain
from quant.layer_reader import EMBEDDING, FINAL_NORM, read_end
from quant.llama.model import RMSNorm
from quant.resume import Finished
from quant.run_options import TuningPass
from quant.verification import digest

_RATE = 2e-4  # of its size a value moves in a step, at first
_FASTER, _SLOWER = 1.3, 3.0  # times, after steps that helped and that did not
_STOP = 5e-6  # no smaller steps are tried
_DECAYS = (0.9, 0.95)  # of Adam's means of the gradient and of its square
_JUDGE = 8  # one window in so many is held out
_STEPS = 7  # windows, a step each, between two judgements
_RETOLD = 0.4  # of the tokens, from the second pass on
_SEED = 0


@dataclass(frozen=True)
class Tuning:
    """What came of it: the loss on the held-out windows before, and the best after each pass."""

    windows: int
    held_out: int
    before: float
    after: tuple[float, ...]
    kept: bool

    def summary(self) -> str:
        """What was gained, in one line."""
        if not self.kept:
            return "tuning: nothing was better on held-out windows; values stay as they were"
        return f"tuning: KL on held-out windows {self.before:.5f} -> {self.after[-1]:.5f}"


class _Adam:
    """Adam's two means of a tensor; its steps are relative to what the tensor was at first."""

    def __init__(self, start: Tensor) -> None:
        self.size = start.abs()
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)

    def step(self, value: Tensor, gradient: Tensor, rate: float, count: int) -> Tensor:
        """The value after step number `count`, from 1."""
        gradient = gradient * self.size
        self.mean.lerp_(gradient, 1 - _DECAYS[0])
        self.square.lerp_(gradient.square(), 1 - _DECAYS[1])
        mean = self.mean / (1 - _DECAYS[0] ** count)
        spread = (self.square / (1 - _DECAYS[1] ** count)).sqrt_().add_(1e-20)
        return value - rate * self.size * mean / spread


class _Search:
    """The best values found, and how far the next steps go."""

    def __init__(self, student: Student, judge: Lesson, dtypes: dict[str, torch.dtype]) -> None:
        self.student, self.judge, self.dtypes = student, judge, dtypes
        self.adams = {name: _Adam(value) for name, value in student.values.items()}
        self.rate, self.count = _RATE, 0
        self.best = self.before = student.divergence(judge)
        self.moved = self.stored = dict(student.values)  # the best, and as a file holds it

    def advance(self, lesson: Lesson, windows: Tensor) -> None:
        """A step for each of these windows; then the values are the best so far."""
        student = self.student
        for batch in windows.split(1):
            _, gradients = student.gradients(lesson, batch)
            self.count += 1
            for name, gradient in gradients.items():
                step = self.adams[name].step(student.values[name], gradient, self.rate, self.count)
                student.values[name] = step
        moved = dict(student.values)
        student.values = rounded(moved, self.dtypes)
        loss = student.divergence(self.judge)
        if loss < self.best:
            self.best, self.moved, self.stored = loss, moved, student.values
            self.rate *= _FASTER
        else:
            self.rate /= _SLOWER
        student.values = dict(self.moved)


def tune(
    student: Student,
    judge: Lesson,
    lessons: Iterator[Lesson],
    passes: int,
    dtypes: dict[str, torch.dtype],
    on_pass: Callable[[TuningPass], None] = lambda done: None,
) -> Tuning:
    """Move the values of `student` to the best found; what they start from if nothing is better.

    Args:
        student: its values are those of a file.
        judge: the windows that are held out.
        lessons: what is learned from in each pass.
        passes: at most so many.
        dtypes: of the values whose name is there in the file; float16 for the others.
    """
    search = _Search(student, judge, dtypes)
    generator = torch.Generator().manual_seed(_SEED)
    after: list[float] = []
    taught = 0
    while len(after) < passes and search.rate > _STOP:
        lesson = next(lessons)
        taught = len(lesson.windows)
        for windows in torch.randperm(taught, generator=generator).split(_STEPS):
            search.advance(lesson, windows)
        after.append(search.best)
        on_pass(TuningPass(len(after), passes, search.before, search.best))
    student.values = search.stored
    better = search.best < search.before
    return Tuning(taught, len(judge.windows), search.before, tuple(after), better)


def split(windows: int) -> tuple[Tensor, Tensor]:
    """The indices of the windows that judge, one in eight and at least one, and of the others."""
    judging = torch.arange(windows) % _JUDGE == min(_JUDGE, windows) - 1
    return judging.nonzero().flatten(), (~judging).nonzero().flatten()


def rounded(values: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Values as the file holds them, in float32."""
    result = {}
    for name, value in values.items():
        if name not in dtypes:  # a scale: neither 0 nor infinite
            value = value.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).copysign(value)
        result[name] = value.to(dtypes.get(name, torch.float16)).float()
    return result


def hold_out(run: Run) -> None:
    """Set the windows that judge aside, so that the solver does not see them.

    Raises:
        ValueError: there is one window only, there are several processes, or the head is quantized.
    """
    if not getattr(run.solver, "tuning", 0):
        return
    if len(run.windows) < 2:
        raise ValueError("tuning: 1 window; at least 2 are needed, one of which judges")
    if distributed.world_size() > 1:
        raise ValueError("tuning is not divided among processes; run it in one")
    if run.config.has_head:
        raise ValueError("tuning needs the float head; quantize the head with another effort")
    held_out, others = split(len(run.windows))
    mask = run.mask
    run.held_out = run.windows[held_out], None if mask is None else mask[held_out]
    run.windows, run.mask = run.windows[others], None if mask is None else mask[others]


def tune_run(run: Run) -> None:
    """Tune what a run has quantized, and write its layers again where that helped."""
    passes, journal = getattr(run.solver, "tuning", 0), run.journal
    if not passes or journal.tuning is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        student, norm = _student(run)
        held_out, mask = run.held_out
        judge = next(_lessons(run, held_out, mask, norm, student.head))
        lessons = _lessons(run, run.windows, run.mask, norm, student.head)
        stored = run.reader.tensor(FINAL_NORM).dtype
        dtypes = {name: stored for name in student.values if name.endswith("norm.weight")}
        tuning = tune(student, judge, lessons, passes, dtypes, run.options.on_pass)
    records = _write_again(run, student) if tuning.kept else []
    journal.end_tuning(asdict(tuning), records)


def _student(run: Run) -> tuple[Student, RMSNorm]:
    """The quantized model, and the final norm of the float model."""
    reader, llama, journal = run.reader, run.llama, run.journal
    norm, head = read_end(reader, llama, run.device)
    embedding = reader.tensor(EMBEDDING).clone()
    parts = [layer.parts for layer in journal.layers]
    layers = FinishedLayers(journal.folder, parts, run.config, run.device)
    return Student(llama, layers, embedding, head, norm), norm


def _lessons(
    run: Run, windows: Tensor, mask: Tensor | None, norm: RMSNorm, head: Tensor
) -> Iterator[Lesson]:
    """The windows as they are, then again and again with some of their tokens told anew."""
    generator = torch.Generator().manual_seed(_SEED)
    states = empty_states(run.llama, windows, run.options.storage)
    while True:
        embed(run.reader, states, windows)
        compute = (run.device, run.options.budget)
        advance_float(run.reader, run.llama, states, run.llama.num_hidden_layers, compute)
        lesson = Lesson(windows, mask, states, norm)
        yield lesson
        windows = retell(lesson, head, _RETOLD, generator)


def _write_again(run: Run, student: Student) -> list[Finished]:
    """The records of all layers, with their new values, and of embedding, norm and head."""
    values = {name: value.cpu() for name, value in student.values.items()}
    records = []
    for index, old in enumerate(run.journal.layers):
        linears, plain = student.layers.read(index)
        prefix, digests = f"model.layers.{index}.", {}
        for name, qt in linears.items():
            moved = replace(qt, grid=replace(qt.grid, scales=values[prefix + name]))
            run.writer.add_quantized(prefix + name, moved)
            digests[prefix + name] = digest(moved)
        for name, tensor in plain.items():
            run.writer.add_plain(prefix + name, values.get(prefix + name, tensor).to(tensor.dtype))
        records.append(Finished(run.journal.writer.take()(), old.report, digests))
    copy_plain(run, {FINAL_NORM: values[FINAL_NORM]})
    return [*records, Finished(run.journal.writer.take()(), {}, {})]
