"""pytest tests/test_native.py: threads, forks, torch.compile, instruction sets, bad input."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import ISAS, KERN, built, make, rows, shuffled

from quant import native
from quant.grid import Grid, QuantizedTensor
from quant.kernels import PRECISIONS, cpu


@built
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("m", [1, 5, 40, 70])
def test_the_number_of_threads_changes_nothing(precision: str, m: int) -> None:
    assert KERN is not None
    packed, x = cpu.pack(make(1000, 512, 128)), rows(m, 512)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(cpu.matmul(x, packed, precision))
        KERN.kern_use_pool(None, threads)  # threads of its own
        results.append(cpu.matmul(x, packed, precision))
        KERN.kern_use_pool(native.torch_pool(), threads)
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@built
def test_calls_from_several_python_threads() -> None:
    packed, x = cpu.pack(make(1000, 512, 128)), rows(9, 512)
    expected, wrong = cpu.matmul(x, packed, "high"), []

    def call() -> None:
        for _ in range(30):
            if not torch.equal(cpu.matmul(x, packed, "high"), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_threads_it_has_not() -> None:
    """In a process of its own: forking a threaded test runner is not safe."""
    code = (
        "import os, signal, torch; from test_native import cpu, make, rows\n"
        "packed, x = cpu.pack(make(1000, 512, 128)), rows(40, 512)\n"
        "y = cpu.matmul(x, packed, 'high')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    os._exit(0 if y.tolist() == cpu.matmul(x, packed, 'high').tolist() else 1)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0


@built
def test_under_torch_compile() -> None:
    packed, x = cpu.pack(shuffled(make(40, 256), 4)), rows(3, 256)
    compiled = torch.compile(lambda x: cpu.matmul(x, packed, "high") + 1, backend="aot_eager")
    assert torch.equal(compiled(x), cpu.matmul(x, packed, "high") + 1)
    tensors = (packed["codes"], packed["scales"], packed["zeros"], packed["extent"])
    torch.library.opcheck(torch.ops.llama_gptq.matmul.default, (x, *tensors, packed["gather"], 1))


@built
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from quant import native; print(native.library().kern_selected().decode())"
    for name in [*ISAS, "pentium"]:
        environment = {**os.environ, "LLAMA_GPTQ_ISA": name}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        if name == "pentium":
            assert "LLAMA_GPTQ_ISA=pentium: not available here; there are" in done.stderr
        else:
            assert done.stdout.strip() == name


@built
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", 1)
    native.library.cache_clear()
    with pytest.warns(UserWarning, match=r"built from other sources.*pip install --force-re"):
        assert native.library() is None
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.library() is not None


@built
def test_bad_arguments() -> None:
    packed = cpu.pack(make(40, 128, 32))
    with pytest.raises(ValueError, match=r"x of shape \(2, 127\).*expected \(..., 128\)"):
        cpu.matmul(torch.ones(2, 127), packed)
    with pytest.raises(ValueError, match="torch.int64"):
        cpu.matmul(torch.ones(2, 128, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match="meta"):
        cpu.matmul(torch.ones(2, 128, device="meta"), packed)
    with pytest.raises(ValueError, match="precision 'half' is unknown; there are exact"):
        cpu.matmul(torch.ones(2, 128), packed, "half")
    gathered = cpu.pack(shuffled(make(40, 128), 3))
    for columns in (gathered["gather"] + 127, gathered["gather"] - 1, gathered["gather"].long()):
        with pytest.raises(ValueError, match="packed tensors do not belong together"):
            cpu.matmul(torch.ones(2, 128), {**gathered, "gather": columns})
    for name, wrong in (
        ("codes", packed["codes"][:1]),
        ("codes", packed["codes"].float()),
        ("scales", packed["scales"][:, :3]),
        ("scales", packed["scales"].char()),
        ("zeros", packed["zeros"][:1]),
        ("zeros", packed["zeros"].half()),
        ("extent", torch.empty(80, 128, 0)),
    ):
        with pytest.raises(ValueError, match="packed tensors do not belong together"):
            cpu.matmul(torch.ones(2, 128), {**packed, name: wrong})


def test_what_cannot_be_packed() -> None:
    qt = make(40, 96, 32)
    codes, grid, index = qt.codes, qt.grid, torch.arange(96) // 32
    two = Grid(grid.scales[:, :2], grid.zeros[:, :2], 4)
    for bad, message in (
        (QuantizedTensor(codes, replace(grid, bits=5)), "bits 5: the kernel has 2, 3, 4 and 8"),
        (QuantizedTensor(codes[:24], grid), r"scales \(40, 3\), zeros \(40, 3\) for 24 outputs"),
        (QuantizedTensor(codes[:, :95], grid), "95 inputs do not divide into 3 groups"),
        (QuantizedTensor(codes, two, index), "index of 96 up to 2: 96 inputs, 2 groups"),
        (
            QuantizedTensor(codes, grid, index[:90]),
            "index of 90 up to 2: 96 inputs, 3 groups",
        ),
        (QuantizedTensor(codes + 1, grid), "a code is 16; with 4 bits the most is 15"),
        (QuantizedTensor(codes, replace(grid, zeros=grid.zeros + 2)), "a zero is 17; .* is 16"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.pack(bad)


@built
@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "gather"])
def test_tensors_that_move_are_found_again(name: str) -> None:
    """As `share_memory_` moves them: the same object, its data elsewhere."""
    packed = cpu.pack(shuffled(make(40, 256), 4))
    other = packed[name].flip(-1)
    x = rows(3, 256)
    before = cpu.matmul(x, packed, "high")
    packed[name].set_(other)
    after = cpu.matmul(x, packed, "high")
    assert not torch.equal(after, before)
    assert torch.equal(after, cpu.matmul(x, {**packed, name: other.clone()}, "high"))


@built
@pytest.mark.skipif(platform.system() != "Linux", reason="readelf reads Linux libraries")
def test_the_library_needs_the_c_library_alone() -> None:
    assert KERN is not None
    listing = subprocess.run(["readelf", "-d", KERN._name], capture_output=True, text=True).stdout
    needed = {line.split("[")[1].split("]")[0] for line in listing.splitlines() if "NEEDED" in line}
    assert needed
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-aarch64.so.1"}
