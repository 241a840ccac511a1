"""pytest tests/test_meta.py: Meta's release in 1, 2 and 8 shards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_release import hugging_face_state, write_meta
from torch import Tensor

from quant import QuantConfig, RTNOptions, quantize_checkpoint
from quant.convert import convert, verify_source
from quant.llama.tokenizer import load_tokenizer
from quant.loader import load_model
from quant.sources import open_checkpoint, open_tokenizer

Make = Callable[..., Path]
ROOT = Path(__file__).parents[1]
EIGHT = {"num_attention_heads": 16, "num_key_value_heads": 8}  # one KV head in each of 8 shards


@pytest.mark.parametrize(("shards", "sizes"), [(1, {}), (2, {}), (8, EIGHT)])
def test_the_way_back_gives_the_same_bytes(
    make_checkpoint: Make, tmp_path: Path, shards: int, sizes: dict[str, Any]
) -> None:
    source = make_checkpoint(**sizes)
    convert(write_meta(source, tmp_path / "meta" / "7b", shards), tmp_path / "back")
    convert(source, tmp_path / "same")
    expected, found = hugging_face_state(tmp_path / "same"), hugging_face_state(tmp_path / "back")
    assert expected.keys() == found.keys()
    assert all(t.dtype == found[n].dtype and torch.equal(t, found[n]) for n, t in expected.items())
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
    read_off = {k: v for k, v in old.items() if k not in ("max_position_embeddings",)}
    assert {key: new[key] for key in read_off} == read_off
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    text = "def f(x):\n  return x"
    assert open_tokenizer(tmp_path / "meta" / "7b").encode(text) == load_tokenizer(source).encode(
        text
    )


def test_transformers_reads_the_converted_folder(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    meta = write_meta(make_checkpoint(dtype=torch.float32), tmp_path / "meta" / "7b", 2)
    convert(meta, tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.inference_mode():
        expected = theirs(windows).logits
    ours = load_model(meta, device="cpu")(windows)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("def f(x):").input_ids == open_tokenizer(meta).encode("def f(x):")


def test_quantizing_needs_no_conversion(
    make_checkpoint: Make, windows: Tensor, tmp_path: Path
) -> None:
    source = make_checkpoint()
    meta = write_meta(source, tmp_path / "meta" / "7b", 2)
    for model, name in ((source, "a"), (meta, "b")):
        quantize_checkpoint(model, tmp_path / name, windows, QuantConfig(4, 32), RTNOptions())
    a, b = (hugging_face_state(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checksum_that_differs_is_named(make_checkpoint: Make, tmp_path: Path) -> None:
    meta = write_meta(make_checkpoint(), tmp_path / "meta" / "7b", 2)
    assert verify_source(meta) == ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    (meta / "params.json").write_text((meta / "params.json").read_text() + " ")
    with pytest.raises(ValueError, match="params.json: MD5 is .*, by checklist.chk .*"):
        verify_source(meta)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match="consolidated.00.pth: is in checklist.chk but missing"):
        verify_source(meta)


def test_there_is_nothing_to_verify_with(make_checkpoint: Make, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(ValueError, match="only Meta's releases come with checksums"):
        verify_source(source)
    meta = write_meta(source, tmp_path / "meta" / "7b", 1)
    (meta / "checklist.chk").unlink()
    with pytest.raises(ValueError, match="checklist.chk: file is missing"):
        verify_source(meta)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for call in (open_checkpoint, open_tokenizer):
        with pytest.raises(ValueError, match="absent: no such folder"):
            call(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match="notes.txt: not a checkpoint file of a kind that is known"
    ):
        open_tokenizer(tmp_path / "notes.txt")


class Command:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil"),))


def test_a_pickled_command_is_not_run(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    meta = write_meta(make_checkpoint(), tmp_path / "meta" / "7b", 1)
    torch.save({"output.weight": Command()}, meta / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"consolidated.00.pth: holds more than tensors \(.*\)"):
        open_checkpoint(meta)
    assert not (tmp_path / "evil").exists()


def resave(folder: Path, change: Callable[[dict[str, Any]], None], number: int = 0) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(file)
    change(state)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("output.weight"), "tensor output.weight is not in every shard"),
        (lambda s: s.update({"x": torch.ones(1)}), "tensor x is not in every shard"),
        (lambda s: s.update({"x": 1}), "entry 'x' is not a tensor under a name"),
        (
            lambda s: s.update({"norm.weight": torch.ones(1).expand(1 << 40)}),
            "norm.weight of shape .* is not a dense tensor within the file",
        ),
        (
            lambda s: s.update({"output.weight": torch.ones(2, 2)}),
            "slices of lm_head.weight differ",
        ),
        (
            lambda s: s.update({"norm.weight": torch.ones(2)}),
            r"norm.weight has shape \(2,\) in the shards, \(128,\) by params.json",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    make_checkpoint: Make, tmp_path: Path, change: Callable, message: str
) -> None:
    meta = write_meta(make_checkpoint(), tmp_path / "meta" / "7b", 2)
    resave(meta, change)
    with pytest.raises(ValueError, match=message):
        reader = open_checkpoint(meta)
        for name in reader.names():
            reader.tensor(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": "x"}, "dim is 'x'; it must be a positive integer"),
        ({"n_heads": 0}, "n_heads is 0; it must be a positive integer"),
        ({"n_layers": 10**9}, "n_layers is 1000000000, the shards have 2 layers"),
        ({"use_scaled_rope": True}, "use_scaled_rope"),
        ({"norm_eps": None}, "norm_eps None is not positive"),
        ({"dim": 256}, "has shape .* by params.json"),
    ],
)
def test_params_that_do_not_fit_are_refused(
    make_checkpoint: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    meta = write_meta(make_checkpoint(), tmp_path / "meta" / "7b", 2)
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**params, **change}))
    with pytest.raises(ValueError, match=message):
        reader = open_checkpoint(meta)
        for name in reader.names():
            reader.tensor(name)


def test_a_missing_file_is_named(make_checkpoint: Make, tmp_path: Path) -> None:
    meta = write_meta(make_checkpoint(), tmp_path / "meta" / "7b", 2)
    for name in ("consolidated.00.pth", "params.json"):
        (meta / name).unlink()
        with pytest.raises(ValueError, match=f"7b/{name}: file is missing; download it again"):
            open_checkpoint(meta)


def test_the_command(make_checkpoint: Make, tmp_path: Path) -> None:
    meta = write_meta(make_checkpoint(), tmp_path / "meta" / "7b", 2)
    command = [sys.executable, str(ROOT / "cli.py"), "convert", str(meta), "out", "--verify"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "verified: consolidated.00.pth" in run.stdout and "checkpoint: out" in run.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = {"tokenizer.model", "tokenizer_config.json"}
    assert names == {"model.safetensors", "config.json", "generation_config.json"} | tokenizer
    shutil.rmtree(tmp_path / "out")
    (meta / "consolidated.01.pth").write_bytes(b"junk")
    run = subprocess.run(command[:-1], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "consolidated.01.pth: damaged or truncated" in run.stderr
    assert not (tmp_path / "out").exists()
