"""pytest tests/test_refusals.py: values that look right and are not, refused before any work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli
from calib.sources import documents
from quant.config import QuantConfig
from quant.loader import load_model

Make = Callable[..., Path]
QUANTIZE = ["quantize", "--model", "tiny"]
EVAL = ["eval", "--model", "tiny", "--data", "text.txt", "--window", "64"]
GENERATE = ["generate", "x", "--model", "tiny"]
NO_TPU = "error: device 'tpu' is not supported; there are auto, cpu and cuda"
REFUSED: dict[str, tuple[list[str], str]] = {
    "quantize device": ([*QUANTIZE, "--device", "tpu"], NO_TPU),
    "eval device": ([*EVAL, "--device", "tpu"], NO_TPU),
    "generate device": ([*GENERATE, "--device", "tpu"], NO_TPU),
    "dtype": ([*EVAL, "--dtype", "foo"], "dtype 'foo' is not supported; there are auto, float16"),
    "module as dtype": ([*GENERATE, "--dtype", "nn"], "dtype 'nn' is not supported"),
    "reference": (
        [*EVAL, "--reference", "other"],
        "reference: has a vocabulary of 2112, the model one of 2080",
    ),
    "nan": ([*GENERATE, "--temperature", "nan"], "temperature nan is out of range"),
    "inf": ([*GENERATE, "--temperature", "inf"], "temperature inf is out of range"),
    "negative": ([*GENERATE, "--temperature", "-1"], "temperature -1.0 is out of range"),
    "top-p": ([*GENERATE, "--top-p", "nan"], "top_p nan is out of range"),
    "prompt": (
        ["generate", "a\udcff", "--model", "tiny"],
        "prompt 'a\\udcff': character 2 is not UTF-8",
    ),
    "samples": ([*QUANTIZE, "--samples", "0"], "Invalid value for '--samples'"),
    "seq-len": ([*QUANTIZE, "--seq-len", "0"], "Invalid value for '--seq-len'"),
    "window": (["eval", "--model", "tiny", "--window", "0"], "Invalid value for '--window'"),
    "group": (
        [*QUANTIZE, "--group-size", "1024"],
        "in_features 128 is not divisible by group_size 1024; choose 64, 32, or -1",
    ),
    "seed": ([*QUANTIZE, "--seed", "9" * 30], "Invalid value for '--seed'"),
    "sampling seed": ([*GENERATE, "--seed", "-1"], "Invalid value for '--seed'"),
    "no source": ([*QUANTIZE, "--calib", ""], "calibration text: a name is empty"),
    "no text": ([*EVAL[:3], "--data", ""], "evaluation text: its name is empty"),
    "head": ([*QUANTIZE, "--lm-head-bits", "5"], "--lm-head-bits 5: choose one of 2, 3, 4, 8"),
    "file as folder": (
        [*QUANTIZE, "--output", "text.txt/new"],
        "text.txt is a file, no folder; choose another",
    ),
    "push": ([*QUANTIZE, "--push", ""], "--push"),
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with code 2."""
    sys.argv = ["cli.py", *arguments]
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    (tmp_path / "text.txt").write_text("some text to judge with\n" * 99)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_is_refused(
    make_checkpoint: Make, here: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make_checkpoint("tiny", intermediate_size=192)
    if case == "reference":
        make_checkpoint("other", vocab_size=2112)
    before = sorted(here.iterdir())
    arguments, message = REFUSED[case]
    assert message in refusal(arguments, capsys)
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_dtype_that_weights_have_not(
    make_checkpoint: Make,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    dtype: torch.dtype,
) -> None:
    for file in make_checkpoint("tiny").glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            save_file({**state, name: (state[name] * 9).to(dtype)}, file, {"format": "pt"})
    told = f"{name}: is {str(dtype).removeprefix('torch.')} in the file; weights must be float16"
    small = ["--samples", "2", "--seq-len", "32", "--solver", "rtn", "--calib", "text.txt"]
    assert told in refusal([*GENERATE, "--dtype", "float32"], capsys)
    with pytest.raises(SystemExit):
        sys.argv = ["cli.py", *QUANTIZE, *small]
        cli.main()
    assert f"error: {told}" in capsys.readouterr().err


def test_a_reference_that_is_quantized(
    quantized: Make, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantized(QuantConfig(4, 64))
    compare = ["eval", "--model", str(folder), "--data", "text.txt", "--reference", str(folder)]
    told = "out: is quantized already; give the float checkpoint to compare with"
    assert told in refusal(compare, capsys)


def test_a_model_wants_rows_of_ids(make_checkpoint: Make) -> None:
    model = load_model(make_checkpoint())
    for ids in (torch.ones(4, dtype=torch.long), torch.ones(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected \(batch, tokens\)"):
            model(ids)


def test_text_in_jsonl_is_a_string(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r'a.jsonl:2: expected a JSON object with a "text" field'):
        list(documents([str(tmp_path / "a.jsonl")]))


def test_symmetric_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="symmetric is 'no'; it must be True or False"):
        QuantConfig(symmetric="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4.0, "4", True, 5])
def test_bits_are_an_integer(bits: object) -> None:
    with pytest.raises(ValueError, match=f"bits {bits} is not supported"):
        QuantConfig(bits=bits)  # type: ignore[arg-type]
