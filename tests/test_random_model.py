"""pytest tests/test_random_model.py: the random checkpoints that measurements are made on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from quant import QuantConfig, quantize_checkpoint
from quant.pipeline import open_float

ROOT = Path(__file__).parents[1]
SIZES = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}  # of Llama 2
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def test_it_is_written_alike_and_can_be_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: torch.Tensor
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import random_model

    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        random_model.write_model(tmp_path / name, TINY, seed)
    one, two, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")
    )
    assert one == two != other
    with pytest.raises(FileExistsError, match="one"):
        random_model.write_model(tmp_path / "one", TINY)
    reader, _ = open_float(tmp_path / "one")
    gate = reader.tensor("model.layers.1.mlp.gate_proj.weight")
    strong = torch.arange(128) % 61 == 0
    assert gate.dtype == torch.float16 and gate.shape == (256, 128)
    assert (gate[:, strong].float().std() / gate[:, ~strong].float().std()) == pytest.approx(
        8, rel=0.1
    )
    assert not torch.equal(gate, reader.tensor("model.layers.0.mlp.gate_proj.weight"))
    report = quantize_checkpoint(tmp_path / "one", tmp_path / "out", windows, QuantConfig(4, 32))
    assert len(report.linears) == 14
    for size, count in SIZES.items():
        config = {**random_model._COMMON, **random_model.SIZES[size], "vocab_size": 32000}
        shapes = random_model.tensor_shapes(config)
        assert sum(map(math.prod, shapes.values())) == count
