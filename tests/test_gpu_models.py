"""pytest tests/test_gpu_models.py: models and commands on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED
from test_gpu import CONFIG, DEVICES, GPU, pytestmark  # noqa: F401 - they mark this file, too
from test_resume import ROOT

from quant import EFFORTS, evaluate, generate_batch, load_model, quantize_checkpoint
from quant.sources import open_tokenizer


@pytest.fixture(scope="module")
def checkpoint(bundled_text: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, quantized on the CPU."""
    folder = tmp_path_factory.mktemp("cpu") / "out"
    quantize_checkpoint(BUNDLED, folder, bundled_text, CONFIG, EFFORTS["fast"])
    return folder


@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_perplexity(checkpoint: Path, bundled_text: torch.Tensor, precision: str) -> None:
    """In float32 the GPU is exact whatever the precision; in the file's float16 nearly."""
    bounds = {"exact": 1e-5, "high": 1e-4, "fast": 0.02}
    ids, results = bundled_text.flatten(), {}
    for name, dtype in (("cpu", "float32"), ("gpu", "float32"), ("gpu", "auto")):
        model = load_model(checkpoint, DEVICES[name], dtype, precision=precision)
        reference = load_model(BUNDLED, DEVICES[name], dtype)
        results[name, dtype] = evaluate(model, ids, 128, reference)
    wanted = results["cpu", "float32"]
    assert wanted.reference is not None
    for case, bound in ((("gpu", "float32"), bounds[precision]), (("gpu", "auto"), 0.02)):
        mine = results[case]
        print(precision, case, mine.perplexity / wanted.perplexity - 1)
        assert mine.perplexity == pytest.approx(wanted.perplexity, rel=bound)
        assert mine.reference is not None
        float_bound = 1e-5 if case[1] == "float32" else 2e-3
        expected = wanted.reference.perplexity
        assert mine.reference.perplexity == pytest.approx(expected, rel=float_bound)


def test_greedy_tokens(checkpoint: Path) -> None:
    prompts = ["def quantize(", "import os\n\n\nclass Reader:\n    "]
    new = []
    for device in DEVICES.values():
        model = load_model(checkpoint, device, "float32", precision="exact")
        ids = [open_tokenizer(checkpoint).encode(prompt) for prompt in prompts]
        batch = generate_batch(model, ids, 48)
        alone = [model.generate(torch.tensor([one]), 48)[0, len(one) :].tolist() for one in ids]
        assert batch == alone
        new.append(batch)
    assert new[0] == new[1]


def command(*words: str, limit: float = 1.0) -> subprocess.CompletedProcess[str]:
    """The command line, given a share of the GPU's memory."""
    code = f"import torch; torch.cuda.set_per_process_memory_fraction({limit}); import cli"
    return subprocess.run(
        [sys.executable, "-c", f"{code}; cli.main()", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


WORDS = ("quantize", "--samples", "8", "--seq-len", "128", "--device", GPU)


def test_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = command(*WORDS, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert " of the GPU; disk: " in done.stdout
    report = json.loads((output / "quantize_report.json").read_text())
    assert 0 < report["peak_gpu_memory_bytes"] < report["forecast"]["peak_gpu_memory_bytes"]
    judged = command("eval", "--model", str(output), "--device", GPU, "--json")
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout)["reference"]["ratio"] < 1.1
    written = command("generate", "def ", "--model", str(output), "--device", GPU)
    assert written.returncode == 0 and written.stdout.startswith("def "), written.stderr


def test_bits_per_weight_on_the_command_line(tmp_path: Path) -> None:
    done = command(*WORDS, "--output", str(tmp_path / "out"), "--target-bpw", "4.6")
    assert done.returncode == 0 and "bits per weight" in done.stdout, done.stderr


def test_a_full_gpu_is_told_in_one_line(tmp_path: Path) -> None:
    full = command(*WORDS, "--output", str(tmp_path / "out"), limit=1e-5)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1].startswith("error: the GPU's memory is full (")


def test_processes_of_one_gpu(tmp_path: Path) -> None:
    """One more than there are GPUs: refused, but not on the CPU."""
    count = torch.cuda.device_count() + 1
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "cli.py"]
    run += ["quantize", "--samples", "8", "--seq-len", "64", "--output", str(tmp_path / "out")]
    done = [
        subprocess.run([*run, "--device", device], cwd=ROOT, capture_output=True, text=True)
        for device in ("cuda", "cpu")
    ]
    assert f"error: device cuda: {count} processes for {count - 1} GPUs here" in done[0].stderr
    assert done[1].returncode == 0 and (tmp_path / "out").is_dir(), done[1].stderr
