"""pytest tests/test_whole_model.py: a quantized model with the CPU kernel against plain torch.

QUANTIZED_MODEL=FOLDER takes a quantized checkpoint of your own as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from quant import QuantConfig, RTNOptions, load_quantized, quantize_checkpoint
from quant.kernels import cpu
from quant.llama.generate import generate
from quant.llama.model import Llama
from quant.llama.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[1] / "quant" / "bundled"
PROMPTS = ("def ", "import os", "class A:", "    return self.", "The river")

pytestmark = pytest.mark.skipif(
    not cpu.is_available(torch.device("cpu")), reason="the native library is not built"
)


@pytest.fixture(scope="module", params=["bundled", "own"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "own":
        if "QUANTIZED_MODEL" not in os.environ:
            pytest.skip("set QUANTIZED_MODEL to the folder of a quantized checkpoint")
        return Path(os.environ["QUANTIZED_MODEL"])
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(
        BUNDLED, output, torch.arange(64).view(2, 32), QuantConfig(4, 64), RTNOptions()
    )
    return output


def load(folder: Path, backend: str, precision: str = "exact") -> tuple[Llama, Tokenizer]:
    return load_quantized(folder, "cpu", "float32", backend, precision)


def test_exact_logits_equal_the_reference(folder: Path) -> None:
    reference, tokenizer = load(folder, "reference")
    exact, _ = load(folder, "cpu")
    text = (BUNDLED / "heldout.txt").read_text(encoding="utf-8")
    for tokens in (1, 4, 128):  # by one row, a few, and by panels
        ids = torch.tensor([tokenizer.encode(text)[:tokens]])
        expected = reference(ids)
        assert (exact(ids) - expected).abs().max() <= 1e-5 * expected.abs().max(), tokens


@pytest.mark.slow
def test_high_writes_the_tokens_of_the_reference(folder: Path) -> None:
    reference, tokenizer = load(folder, "reference")
    high, _ = load(folder, "cpu", "high")
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert list(generate(high, ids, 200)) == list(generate(reference, ids, 200)), prompt
