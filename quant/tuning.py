"""The last pass of `--effort max`: scales and norms of all layers, moved by the gradient of the
divergence from the float model (quant.distill).

Every value is its start times a factor; Adam moves the factors, a step for every batch of windows.
One window in eight teaches nothing and judges: after each pass over the others, values are rounded
to what the file holds (float16 scales, norms in the checkpoint's dtype) and measured on it. The
best of these is kept, and only if it is better than the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from quant import distributed
from quant.distill import FINAL_NORM, Lesson, Student
from quant.finished_layers import FinishedLayers
from quant.grid import LARGEST_SCALE, SMALLEST_SCALE
from quant.layer_loop import Run, copy_plain, original_states
from quant.llama.model import RMSNorm
from quant.resume import Finished
from quant.run_options import TuningPass
from quant.verification import digest

EMBEDDING = "model.embed_tokens.weight"
_RATE = 1e-3  # of a factor in a step, at the most; see docs/accuracy.md
_DECAYS = (0.9, 0.95)  # of Adam's means of the gradient and of its square
_JUDGE = 8  # one window in so many is held out
_BATCH = 1  # windows in a step


@dataclass(frozen=True)
class Tuning:
    """What came of it: the loss on the held-out windows before, and after each pass; and the pass
    whose values are kept, 0 for none.
    """

    windows: int
    held_out: int
    before: float
    after: tuple[float, ...]
    kept: int

    def summary(self) -> str:
        """What was gained, in one line."""
        loss = "KL on held-out windows"
        if not self.kept:
            return f"tuning: not kept, {loss} {self.before:.5f} -> {min(self.after):.5f} at best"
        after, passes = self.after[self.kept - 1], len(self.after)
        return f"tuning: {loss} {self.before:.5f} -> {after:.5f}, pass {self.kept} of {passes} kept"


class _Adam:
    """Factors of one tensor, and Adam's two means."""

    def __init__(self, start: Tensor) -> None:
        self.start, self.factors = start, torch.ones_like(start)
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)

    def step(self, gradient: Tensor, rate: float, count: int) -> Tensor:
        """The tensor after step number `count`, from 1."""
        gradient = gradient * self.start
        self.mean.lerp_(gradient, 1 - _DECAYS[0])
        self.square.lerp_(gradient.square(), 1 - _DECAYS[1])
        mean = self.mean / (1 - _DECAYS[0] ** count)
        spread = (self.square / (1 - _DECAYS[1] ** count)).sqrt_().add_(1e-20)
        self.factors.addcdiv_(mean, spread, value=-rate).clamp_(0.5, 2)
        return self.start * self.factors


def tune(
    student: Student,
    lesson: Lesson,
    passes: int,
    dtypes: dict[str, torch.dtype],
    seed: int = 0,
    on_pass: Callable[[TuningPass], None] = lambda done: None,
) -> Tuning:
    """Move the values of `student` to the best found; what they start from if nothing is better.

    Args:
        student: its values are those of a file.
        lesson: at least two windows.
        passes: over the windows that teach.
        dtypes: of the values whose name is there in the file; float16 for the others.
        seed: of the order of the windows.
    """
    held_out, taught = split(len(lesson.windows))
    judges = held_out.split(_BATCH)
    before = best = student.divergence(lesson, judges)
    kept, values, after = 0, dict(student.values), []
    adams = {name: _Adam(value) for name, value in values.items()}
    steps, count = passes * math.ceil(len(taught) / _BATCH), 0
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, passes + 1):
        for batch in taught[torch.randperm(len(taught), generator=generator)].split(_BATCH):
            _, gradients = student.gradients(lesson, batch)
            rate, count = _rate(count / steps), count + 1
            for name, gradient in gradients.items():
                student.values[name] = adams[name].step(gradient, rate, count)
        moved = dict(student.values)
        student.values = rounded(moved, dtypes)
        after.append(student.divergence(lesson, judges))
        if after[-1] < best:
            best, kept, values = after[-1], number, student.values
        on_pass(TuningPass(number, passes, before, after[-1]))
        student.values = moved
    student.values = values
    return Tuning(len(taught), len(held_out), before, tuple(after), kept)


def split(windows: int) -> tuple[Tensor, Tensor]:
    """The indices of the windows that judge, one in eight and at least one, and of the others."""
    judging = torch.arange(windows) % _JUDGE == min(_JUDGE, windows) - 1
    return judging.nonzero().flatten(), (~judging).nonzero().flatten()


def _rate(done: float) -> float:
    """Half a cosine, from the full rate to a fiftieth."""
    return _RATE * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done))


def rounded(values: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Values as the file holds them, in float32."""
    result = {}
    for name, value in values.items():
        if name not in dtypes:  # a scale: neither 0 nor infinite
            value = value.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).copysign(value)
        result[name] = value.to(dtypes.get(name, torch.float16)).float()
    return result


def check_tuning(run: Run) -> None:
    """Refuse what tuning cannot work with.

    Raises:
        ValueError: there is one window only, or there are several processes.
    """
    if not getattr(run.solver, "tuning", 0):
        return
    if len(run.windows) < 2:
        raise ValueError("tuning: 1 window; at least 2 are needed, one of which judges")
    if distributed.world_size() > 1:
        raise ValueError("tuning is not divided among processes; run it in one")


def tune_run(run: Run) -> None:
    """Tune what a run has quantized, and write its layers again where that helped."""
    passes, journal = getattr(run.solver, "tuning", 0), run.journal
    if not passes or journal.tuning is not None:
        return
    with torch.inference_mode(False):
        student, lesson, dtypes = _student(run)
        tuning = tune(student, lesson, passes, dtypes, on_pass=run.options.on_pass)
    records = _write_again(run, student) if tuning.kept else []
    journal.end_tuning(asdict(tuning), records)


def _student(run: Run) -> tuple[Student, Lesson, dict[str, torch.dtype]]:
    """The quantized model, the float model's hidden states, and the dtypes of the norms."""
    reader, llama, journal = run.reader, run.llama, run.journal
    parts = [layer.parts for layer in journal.layers]
    norm = RMSNorm(llama.hidden_size, llama.rms_norm_eps)
    stored = reader.tensor(FINAL_NORM)
    norm.load_state_dict({"weight": stored.to(run.device, torch.float32)}, assign=True)
    norm.requires_grad_(False)
    embedding = reader.tensor(EMBEDDING).clone()
    head = embedding if llama.tie_word_embeddings else reader.tensor("lm_head.weight").clone()
    head = head.to(run.device, torch.float32)
    layers = FinishedLayers(journal.folder, parts, run.config)
    student = Student(llama, layers, embedding, head, norm)
    with torch.no_grad():
        states = original_states(run, run.windows, len(parts))
    dtypes = {name: stored.dtype for name in student.values if name.endswith("norm.weight")}
    return student, Lesson(run.windows, run.mask, states, norm), dtypes


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
