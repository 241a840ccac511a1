"""pytest tests/test_calib.py: windows, Hessians, sources, and the walk over a layer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from calib import capture
from calib.hessian import Hessian
from calib.hidden import HiddenStates, Storage
from calib.sampling import advice, check_windows, token_windows
from calib.sources import SOURCES, documents, stdlib
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS, DecoderLayer


def words(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def test_windows_are_packed_without_overlap_and_seeded() -> None:
    texts = [" ".join(map(str, range(start, start + 50))) for start in range(0, 500, 50)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    windows = token_windows(words, texts, 5, 40, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    assert windows.shape == (5, 40) and windows.dtype == torch.int64
    assert all(
        torch.equal(row, torch.arange(row[0], row[0] + 40)) and row[0] % 40 == 0 for row in windows
    )
    assert torch.equal(windows, token_windows(words, texts, 5, 40, seed=1))
    assert not torch.equal(windows, token_windows(words, texts, 5, 40, seed=2))


def test_too_little_text() -> None:
    with pytest.warns(UserWarning, match="holds 2 windows of 40 tokens, not 5"):
        assert token_windows(words, ["1 " * 85], 5, 40).shape == (2, 40)
    with pytest.raises(ValueError, match="39 tokens are fewer than one window of 40"):
        token_windows(words, ["1 " * 39], 5, 40)
    with pytest.raises(ValueError, match="at least 1 and 2"):
        token_windows(words, ["1"], 0, 40)


def test_hessian_is_the_sum_over_kept_tokens() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 5) > 0.5
    whole, first, second = Hessian(8), Hessian(8), Hessian(8)
    whole.add(x, mask)
    kept = x[mask].double()
    assert whole.tokens == len(kept)
    assert torch.allclose(whole.matrix.double(), kept.T @ kept, rtol=1e-6, atol=1e-6)
    first.add(x[:1], mask[:1])
    second.add(x[1:].bfloat16(), mask[1:])
    first.merge(second)
    assert first.tokens == whole.tokens and torch.allclose(first.matrix, whole.matrix, atol=0.2)
    with pytest.raises(ValueError, match="Hessians of 8 and 9 inputs"):
        whole.merge(Hessian(9))


def test_what_a_layer_keeps_has_the_same_room_in_every_layer() -> None:
    states = HiddenStates(6, 8, 16)
    first = states.room(4, 32, "cpu")
    assert first.shape == (4, 8, 32) and first.dtype == torch.float32
    states.swap()
    assert states.room(4, 32, "cpu").data_ptr() == first.data_ptr()
    assert states.room(3, 32, "cpu").shape == (3, 8, 32)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 19, 1 << 30])  # none, one batch of three, all
@pytest.mark.parametrize(("spill", "head_dim"), [(False, 8), (True, 8), (False, 16), (True, 4)])
def test_walk_computes_the_layer_and_sees_replaced_weights(
    tmp_path: Path, keep_bytes: int, spill: bool, head_dim: int
) -> None:
    config = LlamaConfig(64, 32, 48, 1, 4, 2, head_dim)
    torch.manual_seed(0)
    layer = DecoderLayer(config).requires_grad_(False)
    hidden = torch.randn(5, 1000, 32)  # more than one batch
    start = hidden.clone()
    storage = Storage(spill=tmp_path if spill else None)
    states = HiddenStates(5, 1000, 32, 4 * head_dim, storage)
    states.set_windows(hidden)
    seen: dict[str, torch.Tensor] = {}
    walking = capture.walk(layer, states, budget=capture.Budget(keep_bytes=keep_bytes))
    for group, hessian in zip(LINEAR_GROUPS, walking, strict=True):
        assert hessian.tokens == 5000
        seen[group[0]] = hessian.matrix.clone()
        for name in group:
            layer.linear(name).weight.mul_(1.1)
    assert (states.output() - layer(start)).abs().max() < 1e-4
    assert torch.equal(states.next.read(slice(None), 32), start)  # the input is left alone
    for group in LINEAR_GROUPS:  # the inputs that a plain forward of the replaced layer shows
        caught: list[torch.Tensor] = []
        handle = layer.linear(group[0]).register_forward_pre_hook(
            lambda _, args, c=caught: c.append(args[0])
        )
        layer(start)
        handle.remove()
        x = caught[0].reshape(-1, caught[0].shape[-1]).double()
        assert torch.allclose(seen[group[0]].double(), x.T @ x, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("spill", [False, True])
def test_a_float_layer_runs_in_place(tmp_path: Path, spill: bool) -> None:
    """In one buffer, of whole and of part batches, also where heads are wider than the stream."""
    layer = DecoderLayer(LlamaConfig(64, 32, 48, 1, 4, 2, 16)).requires_grad_(False)
    layer.post_attention_layernorm.weight.uniform_(0.5, 2)  # other than the norm before attention
    hidden, storage = torch.randn(5, 1000, 32), Storage(spill=tmp_path if spill else None)
    states = HiddenStates(5, 1000, 32, storage=storage, in_place=True)
    states.set_windows(hidden.clone())
    assert states.next is states.present
    capture.advance(layer, states)
    assert (states.output() - layer(hidden)).abs().max() < 1e-4


def test_a_sink_raises_the_first_token_of_each_window_for_qkv_alone() -> None:
    """By a literal sum in float64: the first token that is not padding, in H and in the drift."""
    layer = DecoderLayer(LlamaConfig(64, 32, 48, 1, 4, 2, 8)).requires_grad_(False)
    hidden, other = torch.randn(3, 50, 32), torch.randn(3, 50, 32)
    mask = torch.arange(50) >= torch.tensor([0, 7, 49])[:, None]

    def walked(sink: float) -> list[Hessian]:
        mine, theirs = (HiddenStates(3, 50, 32) for _ in range(2))
        mine.set_windows(hidden.clone())
        theirs.set_windows(other.clone())
        return list(capture.walk(layer, mine, mask, beside=(layer, theirs), sink=sink))

    plain, raised = walked(0.0), walked(0.2)
    x, y = (layer.input_layernorm(h).double() for h in (hidden, other))
    counts = torch.ones(3, 50, 1, dtype=torch.float64)
    for window, first in enumerate((0, 7, 49)):
        counts[window, first] = 1 + 0.2 * 50
    weighed = (counts * x)[mask]
    assert torch.allclose(raised[0].matrix.double(), weighed.T @ x[mask], rtol=1e-5, atol=1e-4)
    drift = (y - x)[mask].T @ weighed
    assert raised[0].drift is not None
    assert torch.allclose(raised[0].drift.double(), drift, rtol=1e-5, atol=1e-4)
    assert raised[0].tokens == plain[0].tokens == int(mask.sum())
    for one, same in zip(raised[1:], plain[1:], strict=True):
        assert torch.equal(one.matrix, same.matrix)


def test_stdlib_split_is_by_name() -> None:
    names = [name for name, _ in stdlib.modules()]
    held_out = [name for name in names if stdlib.is_held_out(name)]
    assert 0 < len(held_out) < len(names) / 10
    assert not any("test" in Path(name).parts for name in names)
    assert len(list(stdlib.documents())) == len(names) - len(held_out)


def test_stdlib_without_sources_falls_back(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="comes without its sources"):
        assert len("".join(stdlib.documents(tmp_path))) > 100_000


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "two"}) + "\n\n" + json.dumps({"text": "three"})
    )
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pq.write_table(pyarrow.table({"text": ["four"]}), tmp_path / "c.parquet")
    assert list(documents([str(tmp_path)])) == ["one", "two", "three", "four"]
    assert list(documents([str(tmp_path / "b.jsonl"), str(tmp_path / "a.txt")])) == [
        "two",
        "three",
        "one",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.doc", b"x", "ending '.doc' is not supported"),
        ("a.jsonl", b'{"txt": 1}', 'a.jsonl:1: expected a JSON object with a "text" field'),
        ("a.parquet", b"PAR1", "not a parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents([str(tmp_path / name)]))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        list(documents([str(tmp_path / "x.txt")]))
    with pytest.raises(ValueError, match="no text files"):
        list(documents([str(tmp_path)]))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_source_without_network_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    import datasets

    def offline(*args: object, **kwargs: object) -> None:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=f"{name}: cannot be downloaded .*give a local"):
        list(SOURCES[name]())
    assert not caplog.records  # no line for each retry


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 4), torch.full((2, 4), 3), torch.full((2, 4), torch.nan)]
)
def test_a_mask_is_of_zeros_and_ones_and_has_tokens(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected 1 for tokens and 0 for padding"):
        check_windows(torch.ones(2, 4, dtype=torch.long), mask, 9)


@pytest.mark.parametrize("windows", [torch.ones(2, 4), [[1, 2]]])
def test_windows_are_a_tensor_of_ids(windows: object) -> None:
    with pytest.raises(ValueError, match="expected a tensor"):
        check_windows(windows, None, 9)  # type: ignore[arg-type]


def test_one_line_of_advice_for_a_poor_choice() -> None:
    def told(windows: int, length: int, python_only: bool = False) -> str:
        ids = (torch.arange(windows * length) % 32).view(windows, length)
        return advice(ids, 1536, 4096, python_only)

    assert told(32, 512) == ""
    assert "windows of 2 tokens hold little context" in told(100_000, 2)
    assert told(2, 512) == "1024 calibration tokens for 1536 inputs of a linear; use more --samples"
    assert "accuracy on prose" in told(32, 512, True)
    assert told(32, 4096) == "" and "longer than the 4096 the model was made for" in told(9, 4097)
    assert "1024 calibration tokens" in told(2, 512, True)  # one line, the worst first
    for ids, count in ((torch.full((4, 8), 7), 1), (torch.arange(992).view(31, 32) % 31, 31)):
        line = advice(ids, 1536, 4096, python_only=True)
        assert line.startswith(f"the calibration text is {ids.numel()} tokens of {count} different")
