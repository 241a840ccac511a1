"""pytest tests/test_room.py: what does not fit is refused, or made to fit."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calib.hidden import Storage
from quant import QuantConfig, distributed
from quant.checkpoint import llama_config
from quant.llama.config import LlamaConfig
from quant.machine import Rates, _room_of_group, available_memory
from quant.plan import job_of, make_plan
from quant.room import check_room, fit_memory, use_gpu_memory
from quant.solvers.gptq_options import EFFORTS
from quant.sources import open_checkpoint
from quant.units import at_least, parse_size
from quant.workload import Job

SEVEN_B = Job(LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128), QuantConfig(), 128, 2048, 2)


def test_memory_is_fitted_by_the_least_saving(tmp_path: Path) -> None:
    need = make_plan(SEVEN_B).memory
    assert fit_memory(SEVEN_B, need, tmp_path) == SEVEN_B
    assert fit_memory(SEVEN_B, need - 1, tmp_path).budget.keep_bytes == 0
    spilled = fit_memory(SEVEN_B, need - (1 << 30), tmp_path)
    assert spilled.storage.spill == tmp_path and spilled.budget == SEVEN_B.budget
    with pytest.raises(ValueError, match="max-memory 1.00 GB: the least this model takes") as told:
        fit_memory(SEVEN_B, 10**9, tmp_path)
    enough = parse_size(str(told.value).split()[-1])
    fit_memory(SEVEN_B, enough, tmp_path)
    with pytest.raises(ValueError, match="the least this model takes"):
        fit_memory(SEVEN_B, enough - 10**7, tmp_path)
    assert [at_least(size) for size in (5e8, 5e8 + 1, 2e9, 2e9 + 1)] == [
        "500MB",
        "501MB",
        "2.00GB",
        "2.01GB",
    ]
    assert parse_size("16GB") == 16 * 10**9 and parse_size(" 0.5gb") == 500_000_000
    for bad in ("16", "x GB", "-1GB", "GB", "infGB", "1e400GB"):
        with pytest.raises(ValueError, match="size '.*' (is not understood|must be above zero)"):
            parse_size(bad)


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(SEVEN_B)
    monkeypatch.setattr("quant.room.available_memory", lambda: plan.memory - 1)
    with pytest.raises(ValueError, match="GB are free; pass --spill DIR or --max-memory"):
        check_room(plan, tmp_path / "out", None)
    monkeypatch.setattr("quant.room.available_memory", lambda: None)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(plan.disk))
    check_room(plan, tmp_path / "not" / "yet", None)
    spilled = replace(plan, spilled=1)
    with pytest.raises(ValueError, match="of disk are needed and .* are free; choose another"):
        check_room(spilled, tmp_path / "out", tmp_path)
    if (elsewhere := Path("/dev/shm")).is_dir():
        spilled = replace(plan, spilled=plan.disk + 1)
        with pytest.raises(ValueError, match="/dev/shm: .* choose another --spill"):
            check_room(spilled, tmp_path / "out", elsewhere)


def test_processes_of_one_machine_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(replace(SEVEN_B, processes=8, here=4))
    monkeypatch.setattr("quant.room.available_memory", lambda: 4 * plan.memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "free")(plan.disk))
    check_room(plan, tmp_path / "out", None)
    monkeypatch.setattr("quant.room.available_memory", lambda: 4 * plan.memory - 1)
    with pytest.raises(ValueError, match="GB are free for each of 4 processes; pass --spill"):
        check_room(plan, tmp_path / "out", None)
    alone = make_plan(SEVEN_B)
    assert plan.memory == alone.memory and plan.states == 8 * alone.states  # of all, on one disk
    spilling = replace(SEVEN_B, storage=Storage(spill=tmp_path))
    spilled = make_plan(spilling).spilled
    assert make_plan(replace(spilling, here=4)).spilled == 4 * spilled > 0
    assert "for each of 4 processes; disk" in plan.lines(Rates(1e11, 1e9))[2]
    assert "each" not in alone.lines(Rates(1e11, 1e9))[2]
    graded = replace(SEVEN_B, beside=True, fisher=16384)  # gradients have a file in the first one
    more = make_plan(replace(graded, here=2)).memory - make_plan(graded).memory
    assert more == make_plan(graded).slopes > 0


def test_a_process_plans_its_share(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_checkpoint(make_checkpoint())
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    job = job_of(reader, llama_config(reader), QuantConfig(4, 32), (10, 64), EFFORTS["max"])
    assert (job.processes, job.here, job.own, job.windows) == (4, 2, 16, 19)  # of 64, of 74
    assert job.fisher == EFFORTS["max"].fisher / 4


def test_a_container_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, own = tmp_path / "one", tmp_path / "own"
    group.mkdir()
    own.write_text("0::/one\n")
    assert _room_of_group(tmp_path, str(own)) is None
    files = {"max": "max\n", "current": "700\n", "stat": "anon 500\ninactive_file 50\n"}
    for name, text in files.items():
        (group / f"memory.{name}").write_text(text)
    assert _room_of_group(tmp_path, str(own)) is None
    (group / "memory.max").write_text("1000\n")
    assert _room_of_group(tmp_path, str(own)) == 350
    monkeypatch.setattr("quant.machine._room_of_group", lambda: 350)
    assert available_memory() in (350, None)  # None where the system does not tell


def test_a_gpu_has_its_own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and, where they fit, activations are there; the machine holds what is read."""
    host = replace(SEVEN_B, device="cuda")
    plan = make_plan(host)
    assert plan.gpu_memory > 4 * (2 * 11008**2 + 3 * 4096 * 11008)  # H, its factor, the MLP
    assert "GB of the GPU; disk: " in plan.lines(Rates(1e13, 1e9))[2]
    assert make_plan(SEVEN_B).gpu_memory == 0 and make_plan(SEVEN_B).waiting == 0 < plan.waiting
    there = use_gpu_memory(host, 10**11)
    assert there.storage.device == "cuda" and there.budget.keep_bytes == 262144 * 11008 * 4
    kept = make_plan(there)
    moved = there.budget.keep_bytes - host.budget.keep_bytes + plan.states
    assert kept.gpu_memory - plan.gpu_memory == moved and plan.memory - kept.memory > 8e9
    some = use_gpu_memory(host, kept.gpu_memory - 1)
    assert some.storage.device == "cuda" and some.budget == host.budget
    assert use_gpu_memory(host, plan.gpu_memory) == host
    spilled = replace(host, storage=Storage(spill=tmp_path))
    assert use_gpu_memory(spilled, 10**11).storage == spilled.storage
    monkeypatch.setattr("quant.room.available_memory", lambda: None)
    monkeypatch.setattr("quant.room.free_gpu_memory", lambda: plan.gpu_memory - 1)
    with pytest.raises(
        ValueError, match="^GPU memory: about .* pass --max-memory, or --device cpu"
    ):
        check_room(plan, tmp_path / "out", None)
    least = max(plan.memory, plan.gpu_memory) - 1
    assert make_plan(fit_memory(host, least, tmp_path)).memory <= least
