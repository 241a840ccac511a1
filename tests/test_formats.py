"""pytest tests/test_formats.py: round trips of the GPTQ format, and files as other tools write
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.config import QuantConfig
from quant.formats import FORMATS
from quant.grid import Grid, QuantizedTensor
from quant.packing import pack
from quant.sources import open_checkpoint


def random_tensor(bits: int, groups: int = 2, symmetric: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (96, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (96, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    scales = torch.randn(96, groups, generator=generator).half().float()  # of both signs
    return QuantizedTensor(codes, Grid(scales, zeros, bits))


def read_all(folder: Path, form: str = "autogptq") -> dict[str, Any]:
    return dict(FORMATS[form].read(open_checkpoint(folder)))


@pytest.mark.parametrize("form", [name for name in FORMATS if hasattr(FORMATS[name], "Writer")])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_is_exact(tmp_path: Path, form: str, bits: int, symmetric: bool) -> None:
    qt = random_tensor(bits, symmetric=symmetric)
    writer = FORMATS[form].Writer(tmp_path, QuantConfig(bits, 32, symmetric), {})
    writer.add_plain("norm.weight", torch.ones(3, dtype=torch.bfloat16))
    writer.add_quantized("a.b", qt)
    writer.close({"model_type": "llama", "pretraining_tp": 2})
    back = read_all(tmp_path, form)
    assert torch.equal(back["a.b"].codes, qt.codes)
    assert torch.equal(back["a.b"].grid.scales, qt.grid.scales)
    assert torch.equal(back["a.b"].grid.zeros, qt.grid.zeros)
    assert back["a.b"].group_index is None and back["norm.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretraining_tp"] == 1
    second = tmp_path / "quantize_config.json"
    assert second.is_file() == (form == "autogptq")
    assert form != "autogptq" or config["quantization_config"] == json.loads(second.read_text())


def test_an_independent_reader_agrees(tmp_path: Path) -> None:
    qt = random_tensor(4, symmetric=True)
    writer = FORMATS["autogptq"].Writer(tmp_path, QuantConfig(4, 32), {})
    writer.add_quantized("a", qt)
    writer.close({"model_type": "llama"})
    file = load_file(tmp_path / "model.safetensors")
    words = file["a.qweight"].numpy().astype(np.uint32)
    codes = np.concatenate(
        [(words[r] >> 4 * i & 15)[None] for r in range(8) for i in range(8)]
    )  # (K, N)
    zero_words = file["a.qzeros"].numpy().astype(np.uint32)
    zeros = (
        np.stack([zero_words[:, n // 8] >> 4 * (n % 8) & 15 for n in range(96)], 1) + 1
    )  # (G, N)
    groups = file["a.g_idx"].numpy()
    weight = file["a.scales"].float().numpy()[groups] * (codes.astype(np.float32) - zeros[groups])
    assert (file["a.qzeros"] == 0x77777777).all()
    assert np.array_equal(weight.T, qt.dequantize().numpy())


def foreign(
    folder: Path, stored: dict[str, Any], zeros: int, g_idx: torch.Tensor | None, where: str
) -> torch.Tensor:
    """A file as another tool writes it: constant stored zeros, any g_idx; returns its codes (out,
    in).
    """
    folder.mkdir(exist_ok=True)
    codes = torch.randint(
        0, 16, (64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    state = {
        "m.qweight": pack(codes, 4),
        "m.qzeros": pack(torch.full((32, 2), zeros, dtype=torch.uint8), 4).T.contiguous(),
        "m.scales": torch.ones(2, 32, dtype=torch.float16),
    }
    if g_idx is not None:
        state["m.g_idx"] = g_idx.to(torch.int32)
    save_file(
        state,
        folder / ("gptq_model-4bit-32g.safetensors" if where == "old" else "model.safetensors"),
    )
    config: dict[str, Any] = {"model_type": "llama"}
    if where == "config":
        config["quantization_config"] = stored
    else:
        (folder / "quantize_config.json").write_text(json.dumps(stored))
    (folder / "config.json").write_text(json.dumps(config))
    return codes.T


V1 = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize("where", ["config", "separate", "old"])
@pytest.mark.parametrize(
    ("stored", "zeros"),
    [
        (V1, 7),
        ({**V1, "checkpoint_format": "gptq_v2"}, 8),
        ({**V1, "format": "gptq_v2"}, 8),
        ({**V1, "checkpoint_format": "gptq"}, 8),  # mislabelled files exist: all zeros are 8
    ],
)
def test_both_zero_conventions(
    tmp_path: Path, stored: dict[str, Any], zeros: int, where: str
) -> None:
    codes = foreign(tmp_path, stored, zeros, None, where)
    assert torch.equal(read_all(tmp_path)["m"].dequantize(), codes.float() - 8)


def test_shuffled_groups_are_kept(tmp_path: Path) -> None:
    index = torch.arange(64).flip(0) % 2
    foreign(tmp_path, V1, 7, index, "config")
    assert torch.equal(read_all(tmp_path)["m"].group_index.long(), index)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({**V1, "quant_method": "hqq"}, "quantization method 'hqq' is not supported"),
        ({"group_size": 32}, "name no bits"),
        ({}, "has quantization settings"),
        ({**V1, "bits": 5}, "bits 5 is not supported"),
        ({**V1, "quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported"),
        ({**V1, "checkpoint_format": "foo"}, "config.json: checkpoint_format is 'foo'; it must be"),
        ({**V1, "checkpoint_format": 7}, "config.json: checkpoint_format is 7; it must be"),
        ({**V1, "format": ["gptq"]}, r"config.json: format is \['gptq'\]; it must be"),
        ({**V1, "sym": "x"}, "config.json: sym is 'x'; it must be true or false"),
        ({**V1, "dynamic": 5}, "config.json: dynamic is 5; it must be an object"),
        ({**V1, "dynamic": {"[": {}}}, r"config.json: dynamic has the rule '\[', no regular"),
    ],
)
def test_unreadable_settings_are_refused(
    tmp_path: Path, stored: dict[str, Any], message: str
) -> None:
    foreign(tmp_path, stored, 7, None, "config")
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path)


def test_contradicting_shapes_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path, V1, 7, None, "config")
    state = load_file(tmp_path / "model.safetensors")
    state["m.scales"] = torch.ones(2, 24, dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="qweight has 32 outputs, scales 24"):
        read_all(tmp_path)
