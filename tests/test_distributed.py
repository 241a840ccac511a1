"""pytest tests/test_distributed.py: sums, rows and chunks over processes, and what ends them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, finish, start

from quant import distributed
from quant.watch import Watch


def test_one_process_is_the_identity() -> None:
    tensor = torch.randn(5, 3)
    before = tensor.clone()
    distributed.sum_(tensor)
    assert torch.equal(tensor, before)
    assert distributed.gather_rows(tensor, 5) is tensor
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.share(7) == slice(0, 7)
    assert distributed.from_first(lambda: "made") == "made"
    chunks = [bytearray(b"ab"), bytearray(b"cd")]
    assert list(distributed.collect(map(bytes, chunks), 2, 2)) == chunks
    assert list(distributed.deal(iter(chunks), 2, 2)) == chunks


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    distributed.check_device("cuda")  # of one process, whatever the environment says
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    distributed.check_device("cpu")
    with pytest.raises(ValueError, match="device cuda: 2 processes for 1 GPUs here; start one for"):
        distributed.check_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    distributed.check_device("cuda")


def test_importing_does_not_load_torch() -> None:
    code = "import sys, quant.distributed; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_three_processes(tmp_path: Path) -> None:
    """The sum is the one in the order of ranks, bit for bit, and everybody has it; rows come back
    in their order; rank 0 alone makes and prints.
    """
    body = """
    distributed._SLAB_BYTES = 400  # several slabs, of a length that 3 does not divide
    tensor = torch.randn(37, 11, generator=torch.Generator().manual_seed(rank))
    distributed.sum_(tensor)
    tokens = torch.tensor([rank + 1])
    distributed.sum_(tokens)
    everything = torch.arange(70, dtype=torch.uint8).view(7, 10)
    rows = distributed.gather_rows(everything[distributed.share(7)], 7)
    few = distributed.gather_rows(everything[:1][distributed.share(1)], 1)
    made = distributed.from_first(lambda: f"by {rank}")
    print("printed by", rank)

    kept = [everything[i].numpy().tobytes() for i in range(7)]
    collected = []
    thread = threading.Thread(
        target=lambda: collected.extend(
            distributed.collect(kept[distributed.share(7)], 7, 10)
        )
    )
    thread.start()  # beside other operations
    for _ in range(50):
        distributed.sum_(torch.ones(10))
    thread.join()
    dealt = [bytes(raw) for raw in distributed.deal(iter(map(bytearray, collected)), 7, 10)]
    torch.save([tensor, tokens, rows, few, made, collected, dealt], folder / f"{rank}.pt")
    """
    results = finish(start(body, 3, tmp_path))
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert [out for _, out, _ in results] == ["printed by 0\n", "", ""]
    parts = [torch.randn(37, 11, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    expected = parts[0] + parts[1] + parts[2]
    assert not torch.equal(expected, parts[2] + parts[1] + parts[0])  # the order does show
    everything = torch.arange(70, dtype=torch.uint8).view(7, 10)
    for rank in range(3):
        tensor, tokens, rows, few, made, collected, dealt = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(tensor, expected)
        assert tokens.tolist() == [6]
        assert torch.equal(rows, everything) and torch.equal(few, everything[:1])
        assert made == "by 0"
        chunks = [bytes(row.tolist()) for row in everything]
        assert collected == (chunks if rank == 0 else [])
        assert dealt == chunks[[slice(0, 3), slice(3, 6), slice(6, 7)][rank]]


@pytest.mark.parametrize("faulty", ["rank == 1", "True"])
def test_an_error_is_printed_once(faulty: str, tmp_path: Path) -> None:
    """Whether one process finds the error or all do: one line, and exit code 2 everywhere."""
    body = f"""
    watch.BEAT_S = 0.2
    if {faulty}:
        raise ValueError("windows.txt: is empty")
    distributed.from_first(lambda: time.sleep(0.1))
    distributed.sum_(torch.ones(3))
    """
    results = finish(start(body, 2, tmp_path))
    assert [code for code, _, _ in results] == [2, 2]
    assert "".join(err for _, _, err in results) == "error: windows.txt: is empty\n"


@pytest.mark.parametrize(
    "blow, work", [("SIGKILL", "distributed.sum_(torch.ones(3))"), ("SIGSTOP", "time.sleep(100)")]
)
def test_a_dead_process_ends_the_others(blow: str, work: str, tmp_path: Path) -> None:
    """Killed while the other waits for it, or hanging while the other works: that one names it and
    ends.
    """
    body = f"""
    watch.LIMIT_S, watch.BEAT_S = 3, 0.2
    if rank == 1:
        os.kill(os.getpid(), signal.{blow})
    {work}
    """
    survivor, victim = start(body, 2, tmp_path)
    (result,) = finish([survivor])
    victim.kill()
    victim.communicate()
    code, _, err = result
    assert code == 2
    assert err == (
        f"error: process 1 (pid {victim.pid} on {socket.gethostname()}) of 2 stopped; finished "
        "layers are kept: start again with --resume\n"
    )


def test_the_first_to_fail_says_so_once() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
    first, second = Watch(store, 0, 2), Watch(store, 1, 2)
    assert first.claim() and not second.claim() and not first.claim()


def test_sigterm_ends_all_with_one_line(tmp_path: Path) -> None:
    body = """
    watch.BEAT_S = 0.5
    (folder / f"ready-{rank}").touch()
    time.sleep(100)
    """
    processes = start(body, 2, tmp_path)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [2, 2]
    lines = "".join(err for _, _, err in results)
    assert lines.startswith("error: the run was ended from outside") and lines.count("\n") == 1
