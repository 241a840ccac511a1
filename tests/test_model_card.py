"""pytest tests/test_model_card.py: the card says what was done, and nothing of this machine."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.config import QuantConfig
from quant.model_card import write_card
from quant.pipeline import quantize_checkpoint
from quant.publishing import check_push, push
from quant.run_options import RunOptions
from quant.solvers.gptq_options import GPTQOptions

Make = Callable[..., Path]


@pytest.fixture
def quantized(make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path) -> Path:
    config, out = QuantConfig(4, 64, False), tmp_path / "small-w4-g64"
    quantize_checkpoint(make_checkpoint(), out, windows, config, GPTQOptions(damp=0.02))
    return out


def test_a_run_writes_its_card(quantized: Path, tmp_path: Path) -> None:
    card = (quantized / "README.md").read_text()
    for part in (
        "# small-w4-g64\n",
        "| base model | tiny |",
        "| bits | 4 |",
        "| group size | 64 |",
        "| zeros | asymmetric |",
        "damp 0.02",
        "8 windows of 64 tokens",
        "load_quantized(",
    ):
        assert part in card
    assert str(tmp_path) not in card and "## Quality" not in card and "base_model:" not in card


def test_a_card_says_where_adapters_do_not_fit(
    quantized: Path, make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    assert "| adapters |" not in (quantized / "README.md").read_text()
    for option in ({"equalize": 0.25}, {"rotate": True}):
        made, out = make_checkpoint(str(option)), tmp_path / "moved"
        solver = GPTQOptions(**option)  # type: ignore[arg-type]
        options = RunOptions(overwrite=True)
        quantize_checkpoint(made, out, windows, QuantConfig(4, 64), solver, options)
        assert "| adapters | those of the base model do not fit" in (out / "README.md").read_text()


def test_measured_quality_is_kept(quantized: Path) -> None:
    write_card(quantized, "protocol: x\nperplexity 7.5")
    first = (quantized / "README.md").read_text()
    assert "## Quality\n\n```\nprotocol: x\nperplexity 7.5\n```" in first
    write_card(quantized)
    assert (quantized / "README.md").read_text() == first


def test_a_base_model_of_the_hub_is_linked(quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    config["_name_or_path"] = "meta-llama/Llama-2-7b-hf"
    (quantized / "config.json").write_text(json.dumps(config))
    write_card(quantized)
    assert "base_model: meta-llama/Llama-2-7b-hf\n" in (quantized / "README.md").read_text()


def test_a_foreign_readme_is_left_alone(quantized: Path) -> None:
    (quantized / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="was not written by this tool"):
        write_card(quantized)
    assert (quantized / "README.md").read_text() == "mine"


def test_pushing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the hub is asked for; a failure, and a missing package, are one line."""
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[Any, ...]] = []

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> Any:
            calls.append(("create", repository, private, exist_ok))
            owned = repository if "/" in repository else f"me/{repository}"
            return hub.RepoUrl(f"https://huggingface.co/{owned}")

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            calls.append(("upload", repo_id, folder_path))
            if repo_id == "a/full":
                raise OSError("no\nroom")

    monkeypatch.setattr(hub, "HfApi", Api)
    assert push(tmp_path, "a/b") == "https://huggingface.co/a/b"
    assert calls == [("create", "a/b", True, True), ("upload", "a/b", str(tmp_path))]
    with pytest.raises(OSError, match=r"a/full could not be pushed \(no room\)"):
        push(tmp_path, "a/full")
    push(tmp_path, "b")
    assert calls[-1] == ("upload", "me/b", str(tmp_path))


def test_a_push_that_cannot_be_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    check_push("a/b")
    for name in ("a b", "a/b/c", "a--b", "a/.b", "x" * 97):
        with pytest.raises(ValueError, match=f"--push {name}: .*[Rr]epo"):
            check_push(name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="--push a/b: no token for the Hugging Face hub; run: hf"):
        check_push("a/b")
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match="--push needs huggingface_hub"):
        check_push("a/b")


def test_a_full_disk_leaves_the_old_card(
    make_checkpoint: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(make_checkpoint(), tmp_path / "out", windows, QuantConfig(4, 64))
    old = (tmp_path / "out" / "README.md").read_bytes()

    def full(path: Path, data: bytes) -> None:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"README.md: cannot be written .*; free some space"):
        write_card(tmp_path / "out", "perplexity 1")
    assert (tmp_path / "out" / "README.md").read_bytes() == old
    assert not list((tmp_path / "out").glob("*.tmp"))
