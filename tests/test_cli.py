"""pytest tests/test_cli.py: the commands as a user types them, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import one_line_warnings

ROOT = Path(__file__).parents[1]
Make = Callable[..., Path]


def cli(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, encoding="utf-8", errors="replace"
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def quick(source: Path) -> list[str]:
    """A small quantize command."""
    sizes = ["--samples", "4", "--seq-len", "64"]
    return ["quantize", "--model", str(source), "--output", "out", *sizes]


def test_the_two_commands_of_the_readme(tmp_path: Path) -> None:
    """The commands in README's first code block, on the bundled model."""
    block = re.findall(
        r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )[0]
    commands = re.findall(r"python cli.py (.*)", block)
    assert [command.split()[0] for command in commands] == ["quantize", "eval", "generate"]
    outputs = []
    for command in commands:
        run = cli(*shlex.split(command.partition("#")[0]), cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert "checkpoint: bundled-w4-g128" in outputs[0] and (tmp_path / "bundled-w4-g128").is_dir()
    assert "protocol: " in outputs[1] and "perplexity" in outputs[1] and "float" in outputs[1]
    assert outputs[2].startswith("def ") and len(outputs[2]) > 20
    again = cli("quantize", "--bits", 4, cwd=tmp_path)
    assert again.returncode == 2 and "exists already; choose" in again.stderr
    again = cli("quantize", "--resume", cwd=tmp_path)
    assert again.returncode == 2 and "exists already, and no run of it stopped" in again.stderr


def test_own_model_with_options(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(intermediate_size=192)
    text = tmp_path / "text.txt"
    text.write_text("some text to calibrate on and to judge with\n" * 200)
    run = cli(
        *("quantize", "--model", source, "--output", "out", "--bits", 4, "--asym", "--calib", text),
        *(
            "--samples",
            8,
            "--seq-len",
            64,
            "--no-act-order",
            "--damp",
            0.05,
            "--device",
            "cpu",
            "--seed",
            3,
        ),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "group size 128 does not divide every linear of this model; using 64" in run.stdout
    assert (
        json.loads((tmp_path / "out" / "quantize_report.json").read_text())["settings"]["damp"]
        == 0.05
    )
    run = cli("quantize", "--model", "out", "--output", "twice", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "") and "is quantized already" in run.stderr
    run = cli("eval", "--ppl", "--data", text, "--window", 64, "--json", cwd=tmp_path)
    result = json.loads(run.stdout)
    assert result["perplexity"] > 1 and result["reference"]["kl_mean"] >= 0
    run = cli(
        "generate",
        "x",
        "--model",
        source,
        "--max-new-tokens",
        3,
        "--temperature",
        0.5,
        cwd=tmp_path,
    )
    assert run.returncode == 0 and run.stdout.startswith("x")
    assert (
        "grid:                 4 bits, group size 64, asymmetric"
        in cli("inspect", "out", cwd=tmp_path).stdout
    )
    assert "to quantize:" in cli("inspect", source, cwd=tmp_path).stdout


def test_without_arguments_and_help(tmp_path: Path) -> None:
    assert "Three commands to start with" in cli(cwd=tmp_path).stdout
    for command in ("quantize", "eval", "generate", "inspect"):
        assert cli(command, "--help", cwd=tmp_path).returncode == 0
    code = "import sys, cli, quant; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "no folder": (["quantize", "--model", "absent"], "absent: no such folder"),
    "bits": (["quantize", "--model", "MODEL", "--bits", "5"], "bits 5 is not supported"),
    "group": (
        ["quantize", "--model", "MODEL", "--group-size", "48"],
        "group_size 48 is not supported",
    ),
    "solver": (["quantize", "--model", "MODEL", "--solver", "x"], "solver 'x' is unknown"),
    "effort": (["quantize", "--model", "MODEL", "--effort", "x"], "effort 'x' is unknown"),
    "target": (
        ["quantize", "--model", "MODEL", "--asym", "--target", "vllm"],
        "--target vllm will not load the result",
    ),
    "push": (["quantize", "--model", "MODEL", "--push", "a b"], "--push a b: Repo id must use"),
    "export": (["export", "--to", "x", "MODEL", "out"], "cannot export to 'x'"),
    "export float": (["export", "--to", "gptq_v2", "MODEL", "out"], "is not quantized"),
    "empty text": (["quantize", "--model", "MODEL", "--calib", "empty.txt"], "empty.txt: is empty"),
    "short text": (
        ["quantize", "--model", "MODEL", "--calib", "short.txt"],
        "fewer than one window of 256",
    ),
    "no text": (["quantize", "--model", "MODEL", "--calib", "x.txt"], "x.txt: no such file"),
    "nothing yet": (["eval", "--ppl"], "nothing quantized yet"),
    "generate nothing": (["generate", "a"], "nothing quantized yet"),
    "inspect": (["inspect", "absent"], "absent: no such folder"),
    "inspect nothing": (["inspect", ""], "error: .: holds no checkpoint; there would be config.js"),
    "convert nothing": (["convert", "", "out"], "error: .: holds no checkpoint;"),
    "convert a shard": (["convert", "short.txt", "out"], "of others give the folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(make_checkpoint: Make, tmp_path: Path, case: str) -> None:
    source = make_checkpoint()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments, message = BAD_INPUT[case]
    run = cli(*[str(source) if a == "MODEL" else a for a in arguments], cwd=tmp_path)
    assert run.returncode == 2
    assert (
        message in run.stderr
        and len(run.stderr.splitlines()) == 1
        and "Traceback" not in run.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    limited = (  # files of 100 KB at most: what a full disk does, without filling one
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import cli; cli.main()"
    )
    pytest.importorskip("resource")
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-c", limited, *quick(source)]
    run = subprocess.run(
        command, cwd=tmp_path / "here", env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "cannot be written" in run.stderr.splitlines()[-1]
    assert list((tmp_path / "here").iterdir()) == []


OTHER_WORDS: list[tuple[list[str], str]] = [
    (["--effort", "fast"], "--effort was balanced, now fast"),
    (["--target-bpw", "5"], "--target-bpw was not given, now 5.0"),
    (
        ["--calib", "a.txt", "--no-act-order"],
        "--calib was not given, now a.txt; --act-order was True, now False",
    ),
]


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
write = sys.stderr.write

def interrupting(text):
    if "layer 3/30" in text:
        os.kill(os.getpid(), signal.SIGINT)
    return write(text)

sys.stderr.write = interrupting
import cli
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_what_is_finished(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint(num_hidden_layers=30)
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-c", INTERRUPTED, *quick(source)]
    run = subprocess.run(
        command, cwd=tmp_path / "here", env=environment(), capture_output=True, text=True
    )
    rest = run.stderr
    assert "layer 1/30" in rest and "layer 4/30" not in rest
    assert run.returncode == 130 and "Traceback" not in rest
    assert "finished layers are kept in out.partial; continue with the same command" in rest
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out.partial"]
    again = cli(*quick(source), cwd=tmp_path / "here")
    assert again.returncode == 2 and "pass --resume to continue it, or --overwrite" in again.stderr
    (tmp_path / "here" / "a.txt").write_text("some words " * 1000)
    for words, told in OTHER_WORDS:
        other = cli(*quick(source), "--resume", *words, cwd=tmp_path / "here")
        line = f"error: out.partial: cannot be continued, {told}; change it back, or pass --over"
        assert other.returncode == 2 and other.stderr.startswith(line)
        assert len(other.stderr) < 200 and len(other.stderr.splitlines()) == 1
    assert cli(*quick(source), "--resume", cwd=tmp_path / "here").returncode == 0


def test_a_run_killed_at_its_very_end_is_finished(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    killed = "import os, quant.partial as p; p.remove_notes = lambda path: os._exit(9); import cli"
    command = [sys.executable, "-c", f"{killed}; cli.main()", *quick(source)]
    run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True)
    assert run.returncode == 9 and (tmp_path / "out" / "state.json").is_file()
    again = cli(*quick(source), "--resume", cwd=tmp_path)
    assert again.returncode == 0 and again.stderr == ""
    assert again.stdout.splitlines()[-1] == "checkpoint: out, which an earlier run had finished"
    assert not {"state.json", "lock"} & {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
def test_a_closed_output_is_no_error(make_checkpoint: Make, tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{ROOT / 'cli.py'}' inspect '{make_checkpoint()}' >&-"
    run = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True)
    assert run.returncode == 0 and run.stderr == b""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_closed_pipe_is_no_error(make_checkpoint: Make, tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{ROOT / 'cli.py'}' inspect '{make_checkpoint()}' | true"
    run = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True)
    assert run.stderr == ""


def test_warnings_of_one_kind_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_warnings():
        for layer in range(3):
            warnings.warn(f"layer {layer}: rounded", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err.splitlines() == [
        "warning: layer 0: rounded",
        "warning: another",
        "warning: 2 more like: layer 0: rounded",
    ]


def test_text_that_the_terminal_cannot_show(make_checkpoint: Make, tmp_path: Path) -> None:
    """Windows pipes know few characters; the others become question marks, not errors."""
    arguments = ["generate", "é", "--model", str(make_checkpoint()), "--max-new-tokens", "0"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "?\n", "")


def test_missing_tokenizer_and_foreign_architecture(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    (source / "tokenizer.model").unlink()
    run = cli("quantize", "--model", source, cwd=tmp_path)
    assert run.returncode == 2 and "no tokenizer" in run.stderr
    other = make_checkpoint("other", model_type="mistral")
    run = cli("quantize", "--model", other, cwd=tmp_path)
    assert run.returncode == 2 and "model_type 'mistral' is not supported" in run.stderr
    odd = make_checkpoint("odd", intermediate_size=144)
    run = cli("quantize", "--model", odd, cwd=tmp_path)
    assert run.returncode == 2 and "shape (144, 128) cannot be packed" in run.stderr
    small = make_checkpoint("small", vocab_size=64)
    run = cli("quantize", "--model", small, "--seq-len", 64, "--samples", 4, cwd=tmp_path)
    assert run.returncode == 2 and "outside the model's vocabulary of 64" in run.stderr
