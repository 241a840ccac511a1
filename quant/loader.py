"""Load a checkpoint, float or quantized, into the native model.

The model is built empty (meta device); every tensor of the file is put where its name says,
memory-mapped and in its storage dtype. Where the file holds codes, the linear becomes a
QuantLinear: the data decides, not a flag.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quant.checkpoint import CheckpointReader
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.kernels import choose
from quant.linear import QuantLinear
from quant.llama.config import LlamaConfig
from quant.llama.model import Linear, Llama
from quant.llama.tokenizer import Tokenizer, load_tokenizer


def load_quantized(
    path: str | Path, device: str = "auto", dtype: str = "auto", backend: str | None = None
) -> tuple[Llama, Tokenizer]:
    """Load a quantized checkpoint with its tokenizer.

    Args:
        path: folder of the checkpoint.
        device: "cpu", "cuda" or "auto" (a GPU if torch sees one).
        dtype: storage dtype of the tensors that are not quantized: "auto" keeps the file's, or
            "float16", "bfloat16", "float32".
        backend: force a backend of quant.kernels by name.

    Returns:
        (model, tokenizer): `model(ids)` gives float32 logits.

    Raises:
        ValueError: the folder is not a quantized Llama checkpoint, or is damaged; the message names
            the tensor.
    """
    reader = CheckpointReader(Path(path))
    if not is_quantized(reader):
        raise ValueError(
            f"{path}: not a quantized checkpoint; make one with: python cli.py quantize --model "
            f"{path}"
        )
    return load_model(path, device, dtype, backend), load_tokenizer(Path(path))


def is_quantized(reader: CheckpointReader) -> bool:
    """Whether one of FORMATS recognises the checkpoint."""
    return any(form.matches(reader) for form in FORMATS.values())


def load_model(
    path: str | Path, device: str = "auto", dtype: str = "auto", backend: str | None = None
) -> Llama:
    """Load a float or quantized checkpoint; arguments and errors as in `load_quantized`."""
    reader = CheckpointReader(Path(path))
    config = LlamaConfig.from_dict(reader.config)
    place = torch.device(resolve_device(device))
    with torch.device("meta"):
        model = Llama(config)
    backend = choose(place, backend)
    form = next((form for form in FORMATS.values() if form.matches(reader)), None)
    entries = (
        form.read(reader) if form else ((name, reader.tensor(name)) for name in reader.names())
    )
    for name, value in entries:
        if isinstance(value, QuantizedTensor):
            _put_quantized(model, name, value, backend, place)
        elif not name.endswith("rotary_emb.inv_freq"):
            _put_plain(
                model, name, value if dtype == "auto" else value.to(getattr(torch, dtype)), place
            )
    if config.tie_word_embeddings:
        model.tie()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(
            f"{path}: tensor {missing[0]} is missing from the checkpoint ({len(missing)} in all)"
        )
    return model.eval().requires_grad_(False)


def resolve_device(device: str) -> str:
    """ "auto" becomes "cuda" where torch sees a GPU, else "cpu"."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu")
    return device


def _put_plain(model: Llama, name: str, tensor: Tensor, device: torch.device) -> None:
    """Assign a tensor to the parameter of that name, after checking its shape."""
    module_name, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        expected = getattr(module, attribute)
    except AttributeError:
        raise ValueError(
            f"{name}: the checkpoint has a tensor that a Llama of this config.json has not"
        ) from None
    if isinstance(expected, Tensor) and expected.shape != tensor.shape:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} in the file, {tuple(expected.shape)} by "
            "config.json; one is wrong"
        )
    setattr(module, attribute, nn.Parameter(tensor.to(device), requires_grad=False))


def _put_quantized(
    model: Llama, name: str, qt: QuantizedTensor, backend: str, device: torch.device
) -> None:
    """Replace the linear of that name by a QuantLinear; its bias is kept."""
    parent_name, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    assert isinstance(old, Linear)
    expected = tuple(old.weight.shape)
    if tuple(qt.codes.shape) != expected:
        raise ValueError(
            f"{name}: shape {tuple(qt.codes.shape)} in the file, {expected} by config.json; one "
            "is wrong"
        )
    linear = QuantLinear(qt, None, backend, device)
    linear.bias = old.bias
    setattr(model.get_submodule(parent_name), attribute, linear)
