"""pytest tests/test_resume.py: killed anywhere, resumed, and the tensors are those of a quiet run.

QUANT_KILLS=50 repeats the random kills 50 times.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calib.hidden import Storage
from quant import QuantConfig, RunOptions, quantize_checkpoint
from quant.partial import STATE, in_the_way, is_finished
from quant.solvers.gptq_options import GPTQOptions

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("QUANT_KILLS", "5"))
CONFIG = QuantConfig(4, 64)
Make = Callable[..., Path]
# Runs in processes of their own, forked off one that has imported everything. A line of JSON in
# starts one; it answers with lines: the pid, a layer for each step, and the exit status. The
# `patch` may replace functions, to die at a point of its choice.
DRIVER = """
import json, os, signal, sys, torch
from pathlib import Path
from calib.hidden import Storage
from quant import QuantConfig, RunOptions, quantize_checkpoint
from quant.geometry import linear_shapes
from quant.llama.config import LlamaConfig
torch.set_num_threads(1)
linear_shapes(LlamaConfig(64, 32, 48, 1, 4, 2, 8))  # what torch imports at its first use
windows = torch.randint(0, 2048, (8, 64), generator=torch.Generator().manual_seed(1))
def die(): os.kill(os.getpid(), signal.SIGKILL)
def start(source, output, spill, patch):
    exec(patch, globals())
    options = RunOptions(resume=True, storage=Storage(spill=Path(spill) if spill else None),
                         on_step=lambda step: os.write(1, b"%d\\n" % step.layer))
    quantize_checkpoint(source, output, windows, QuantConfig(4, 64), run_options=options)
for line in sys.stdin:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        start(*json.loads(line))
        os._exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


class Runs:
    """Starts runs one after another."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, source: Path, output: Path, spill: str = "", patch: str = "") -> int:
        """Start a run; its process id."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(source), str(output), spill, patch]), file=self.process.stdin)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> tuple[int, list[int]]:
        """Wait for the run: its exit status, and the layer of each of its steps."""
        assert self.process.stdout is not None
        layers = []
        while not (line := self.process.stdout.readline()).startswith("status"):
            layers.append(int(line))
        return int(line.split()[1]), layers

    def finish(self, source: Path, output: Path, spill: str = "") -> list[int]:
        """Run to the end; the layer of each step."""
        self.start(source, output, spill)
        status, layers = self.end()
        assert status == 0
        return layers


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and SIGKILL")
    made = Runs()
    yield made
    made.process.communicate()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}


def assert_same(one: Path, other: Path) -> None:
    """All tensors byte for byte, the same files, and the same errors in the report."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and len(first) > 10
    pairs = {k: (first[k].view(torch.uint8), second[k].view(torch.uint8)) for k in first}
    assert [k for k, pair in pairs.items() if not torch.equal(*pair)] == []
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    linears = [
        json.loads((f / "quantize_report.json").read_text())["linears"] for f in (one, other)
    ]
    assert linears[0] == linears[1]


def test_killed_at_random_moments(make_checkpoint: Make, tmp_path: Path, runs: Runs) -> None:
    source, quiet = make_checkpoint(num_hidden_layers=6), tmp_path / "quiet"
    runs.finish(source, tmp_path / "warm")
    start = time.perf_counter()
    runs.finish(source, quiet)
    seconds = time.perf_counter() - start
    choose, killed = random.Random(0), 0
    for kill in range(KILLS):
        output, spill = tmp_path / f"out{kill}", str(tmp_path) if kill % 2 else ""
        process = runs.start(source, output, spill)
        time.sleep(choose.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(process, signal.SIGKILL)
        killed += runs.end()[0] == signal.SIGKILL
        if not output.exists() or is_finished(output):
            runs.finish(source, output, spill)
        assert_same(quiet, output)
    assert killed


POINTS = {
    "in the middle of a part": """
import quant.checkpoint_writer as w
def torn(tensors, path, metadata, count=[0]):
    count[0] += 1
    if count[0] == 3:
        path.write_bytes(b"half of a file"); die()
    save(tensors, path, metadata=metadata)
save, w.save_file = w.save_file, torn
""",
    **{
        f"{when} rename {n}": f"""
import quant.durable as d
def replace(old, new, count=[0]):
    count[0] += 1
    if count[0] == {n} and "{when}" == "before": die()
    real(old, new)
    if count[0] == {n} and "{when}" == "after": die()
real, os.replace = os.replace, replace
"""
        for when, moments in (("before", (4, 5, 6, 13)), ("after", (5, 6, 9, 10, 11, 12, 13)))
        for n in moments  # 4, 5, 6: part, hidden states and state of layer 2; 10: plain tensors
    },
    "in the middle of the state": """
from pathlib import Path
def write(path, data, count=[0]):
    count[0] += path.name.startswith("state")
    if count[0] == 2: real(path, data[:50]); die()
    return real(path, data)
real, Path.write_bytes = Path.write_bytes, write
""",
    "before the folder gets its name": "Path.rename = lambda *_: die()",
    "after the folder gets its name": """
import quant.partial as p
p.remove_notes = lambda path: die()
""",
    "while its notes are removed": """
def unlink(path, **options):
    real(path, **options)
    if path.name == "lock": die()
real, Path.unlink = Path.unlink, unlink
""",
    "while hidden states are removed": """
import quant.resume as r
def forget(self): real(self); die()
real, r.Journal.forget_hidden = r.Journal.forget_hidden, forget
""",
}


def test_killed_at_chosen_points(make_checkpoint: Make, tmp_path: Path, runs: Runs) -> None:
    source, quiet = make_checkpoint(num_hidden_layers=3), tmp_path / "quiet"
    runs.finish(source, quiet)
    for number, (point, patch) in enumerate(POINTS.items()):
        output = tmp_path / f"out{number}"
        runs.start(source, output, patch=patch)
        assert runs.end()[0] == signal.SIGKILL, point
        runs.finish(source, output)
        assert_same(quiet, output)


def interrupted(make_checkpoint: Make, tmp_path: Path, runs: Runs) -> tuple[Path, Path, Path]:
    """A checkpoint of 4 layers, its partial folder with 3 finished, a quiet run's output."""
    source, out = make_checkpoint(num_hidden_layers=4), tmp_path / "out"
    runs.finish(source, tmp_path / "quiet")
    runs.start(source, out, patch=POINTS["after rename 9"])
    assert runs.end()[0] == signal.SIGKILL
    return source, tmp_path / "out.partial", tmp_path / "quiet"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "layers_redone"),
    [
        ([], 1),
        (["part-00003.safetensors"], 2),  # the states before it are kept
        (["hidden-1"], 2),
        (["part-00001.safetensors"], 4),
        (["hidden-0", "hidden-1"], 4),
    ],
)
def test_torn_files_are_noticed(
    make_checkpoint: Make, tmp_path: Path, runs: Runs, damage: list[str], layers_redone: int
) -> None:
    source, partial, quiet = interrupted(make_checkpoint, tmp_path, runs)
    for name in damage:
        truncate(partial / name)
    layers = runs.finish(source, tmp_path / "out")
    assert sorted(set(layers)) == list(range(4 - layers_redone, 4))
    assert_same(quiet, tmp_path / "out")


def test_a_full_disk_loses_no_layer(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint(num_hidden_layers=3), tmp_path / "out"
    quantize_checkpoint(source, tmp_path / "quiet", windows, CONFIG)
    real, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 14:  # in the second layer
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            quantize_checkpoint(source, out, windows, CONFIG)
    layers: list[int] = []
    options = RunOptions(resume=True, on_step=lambda step: layers.append(step.layer))
    quantize_checkpoint(source, out, windows, CONFIG, run_options=options)
    assert set(layers) == {2}
    assert_same(tmp_path / "quiet", out)


@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj", "joining"])
def test_parts_written_before_their_layer_is_done_are_kept(
    make_checkpoint: Make,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """As an embedding and a head of more than _PART_BYTES make them."""
    source, out = make_checkpoint(), tmp_path / "out"
    quantize_checkpoint(source, tmp_path / "quiet", windows, CONFIG)
    monkeypatch.setattr("quant.checkpoint_writer._PART_BYTES", 1)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def watch(step: Any) -> None:
        if place in [linear.name for linear in step.linears]:
            stop()

    with monkeypatch.context() as patched:
        patched.setattr("quant.checkpoint_writer._join", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, windows, CONFIG, run_options=RunOptions(on_step=watch))
    quantize_checkpoint(source, out, windows, CONFIG, run_options=RunOptions(resume=True))
    assert_same(tmp_path / "quiet", out)


def stop_after(layer: int) -> Callable[[Any], None]:
    def on_step(step: Any) -> None:
        if step.layer == layer:
            raise KeyboardInterrupt

    return on_step


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_another_run_is_not_continued(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source, out, windows, CONFIG, run_options=RunOptions(on_step=stop_after(1))
        )
    before = content(tmp_path / "out.partial")
    assert STATE in before
    again = RunOptions(resume=True)

    def refuses(message: str, *arguments: Any, options: RunOptions = again) -> None:
        with pytest.raises((ValueError, FileExistsError), match=message):
            quantize_checkpoint(*arguments, run_options=options)
        assert content(tmp_path / "out.partial") == before

    solver = GPTQOptions(damp=0.02)
    refuses("pass --resume to continue", source, out, windows, CONFIG, options=RunOptions())
    refuses("bits was 4, now 8", source, out, windows, QuantConfig(8, 64))
    refuses("continued, damp was 0.01, now 0.02;", source, out, windows, CONFIG, solver)
    finer = tuple((f"model.layers.{at}.mlp.down_proj", QuantConfig(8, 64)) for at in range(2))
    told = "continued, modules model.layers.0.mlp.down_proj bits was None, now 8;"
    refuses(told, source, out, windows, replace(CONFIG, modules=finer))
    refuses("calibration windows was 8 x 64, .*, now 7 x 64", source, out, windows[:7], CONFIG)
    storage = Storage(torch.bfloat16)
    lossy = RunOptions(resume=True, storage=storage)
    refuses("hidden was float32, now bfloat16", source, out, windows, CONFIG, options=lossy)
    shard = next(source.glob("model-00001*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"xx")
    refuses(r"weights was \w+, now \w+ \(those of --model\)", source, out, windows, CONFIG)
    shard.write_bytes(whole)
    state, before[STATE] = before[STATE], b"{"
    (tmp_path / "out.partial" / STATE).write_bytes(b"{")
    refuses("state.json: not readable .*; pass --overwrite to", source, out, windows, CONFIG)
    for key in ("fingerprint", "layers", "machine"):
        before[STATE] = json.dumps({**json.loads(state), key: None}).encode()
        (tmp_path / "out.partial" / STATE).write_bytes(before[STATE])
        refuses("state.json: is not what a run writes", source, out, windows, CONFIG)
    (tmp_path / "out.partial" / STATE).write_bytes(state)
    quantize_checkpoint(source, out, windows, CONFIG, run_options=again)
    assert not (tmp_path / "out.partial").exists() and STATE not in content(out)


def test_a_finished_checkpoint_is_told(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the notes of its run are left: by the same settings alone, and at once."""
    source, out = make_checkpoint(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("quant.partial.remove_notes", lambda path: None)
        report = quantize_checkpoint(source, out, windows, CONFIG)
    before, steps = content(out), []
    options = RunOptions(resume=True, on_step=steps.append)
    with pytest.raises(ValueError, match="out: cannot be continued, bits was 4, now 8;"):
        quantize_checkpoint(source, out, windows, QuantConfig(8, 64), run_options=options)
    with pytest.raises(FileExistsError, match="out: exists already; choose another"):
        quantize_checkpoint(source, out, windows, CONFIG)
    assert content(out) == before and {STATE, "lock"} <= before.keys()
    again = quantize_checkpoint(source, out, windows, CONFIG, run_options=options)
    assert again.linears == report.linears and steps == []
    assert content(out) == {k: v for k, v in before.items() if k not in (STATE, "lock")}
    with pytest.raises(FileExistsError, match="out: exists already; choose another"):
        quantize_checkpoint(source, out, windows, CONFIG, run_options=options)


def test_another_machine_is_told(
    make_checkpoint: Make,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    options = RunOptions(on_step=stop_after(1))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, windows, CONFIG, run_options=options)
    assert "an earlier run stopped here; pass --resume" in in_the_way(out, resume=False)
    assert in_the_way(out) == in_the_way(out, overwrite=True) == ""
    (tmp_path / "copy.partial").mkdir()
    for file in (tmp_path / "out.partial").iterdir():
        (tmp_path / "copy.partial" / file.name).write_bytes(file.read_bytes())
    again = RunOptions(resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_checkpoint(source, tmp_path / "copy", windows, CONFIG, run_options=again)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(UserWarning, match="threads was .*, now 77, .* may differ in a few codes"):
        quantize_checkpoint(source, out, windows, CONFIG, run_options=again)


def test_what_others_left_is_not_touched(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    """Folders whose names look like ours."""
    source = make_checkpoint()
    for name in ("out.partial", "out.old", ".out.old"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "thesis").write_text("mine")
    with pytest.raises(FileExistsError, match="out.partial: is not the folder of an earlier run"):
        quantize_checkpoint(source, tmp_path / "out", windows, CONFIG)
    (tmp_path / "out.partial").rename(tmp_path / "moved")
    (tmp_path / "out.partial").mkdir()
    for options in (RunOptions(), RunOptions(overwrite=True)):
        quantize_checkpoint(source, tmp_path / "out", windows, CONFIG, run_options=options)
    for name in ("moved", "out.old", ".out.old"):
        assert (tmp_path / name / "thesis").read_text() == "mine" and (
            tmp_path / name / "deep"
        ).is_dir()
    names = {path.name for path in tmp_path.iterdir() if "out" in path.name}
    assert names == {"out", "out.old", ".out.old"}


def test_overwrite_starts_again(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source, out, windows, CONFIG, run_options=RunOptions(on_step=stop_after(1))
        )
    steps: list[Any] = []
    options = RunOptions(overwrite=True, on_step=steps.append)
    quantize_checkpoint(source, out, windows, QuantConfig(8, 64), run_options=options)
    assert steps[0].layer == 0 and [p.name for p in tmp_path.iterdir() if "out" in p.name] == [
        "out"
    ]


def test_a_second_process_is_refused(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"

    def second(step: Any) -> None:
        options = RunOptions(overwrite=True)
        quantize_checkpoint(source, out, windows, CONFIG, run_options=options)

    with pytest.raises(BlockingIOError, match="out: another process is making this checkpoint"):
        quantize_checkpoint(source, out, windows, CONFIG, run_options=RunOptions(on_step=second))
    quantize_checkpoint(source, out, windows, CONFIG, run_options=RunOptions(resume=True))


def test_half_precision_states_on_disk_are_close(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    source = make_checkpoint()
    reports = [
        quantize_checkpoint(
            source, tmp_path / str(dtype), windows, CONFIG, run_options=RunOptions(storage=storage)
        )
        for dtype in (torch.float32, torch.bfloat16)
        for storage in [Storage(dtype, tmp_path)]
    ]
    errors = [[linear.relative_error for linear in report.linears] for report in reports]
    assert errors[0] != errors[1]
    assert all(abs(a - b) < 0.05 * a for a, b in zip(*errors, strict=True))
    with pytest.raises(OSError, match="no such folder to spill activations to"):
        options = RunOptions(storage=Storage(spill=tmp_path / "absent"))
        quantize_checkpoint(source, tmp_path / "out", windows, CONFIG, run_options=options)
