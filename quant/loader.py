"""Load a checkpoint, float or quantized, into the native model.

The model is built empty (meta device); every tensor of the file is put where its name says,
memory-mapped and in its storage dtype. Where the file holds codes, the linear becomes a
QuantLinear: the data decides, not a flag. Linears that share an input become one (q, k, v; gate,
up), so that it is prepared and multiplied once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.checkpoint import CheckpointReader, check_float, llama_config
from quant.formats import FORMATS
from quant.grid import QuantizedTensor
from quant.kernels import choose
from quant.linear import QuantLinear
from quant.llama.model import LINEAR_GROUPS, MERGED_NAMES, Linear, Llama
from quant.llama.tokenizer import Tokenizer
from quant.rounded import rounded_entries
from quant.sources import open_checkpoint, open_tokenizer

_DTYPES = ("auto", "float16", "bfloat16", "float32")


def load_quantized(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    precision: str = "high",
) -> tuple[Llama, Tokenizer]:
    """Load a quantized checkpoint with its tokenizer.

    Args:
        path: folder of the checkpoint.
        device: "cpu", "cuda" or "auto" (a GPU if torch sees one).
        dtype: storage dtype of the tensors that are not quantized: "auto" keeps the file's, or
            "float16", "bfloat16", "float32".
        backend: force a backend of quant.kernels by name.
        precision: what the CPU kernel does to activations: "exact" keeps them in float32, "high"
            rounds them to 16 bits, "fast" to 8.

    Returns:
        (model, tokenizer): `model(ids)` gives float32 logits.

    Raises:
        ValueError: the folder is not a quantized Llama checkpoint, or is damaged; the message names
            the tensor.
    """
    reader = open_checkpoint(path)
    if not is_quantized(reader):
        raise ValueError(
            f"{path}: not a quantized checkpoint; make one with: python cli.py quantize --model "
            f"{path}"
        )
    return load_model(path, device, dtype, backend, precision), open_tokenizer(Path(path))


def is_quantized(reader: CheckpointReader) -> bool:
    """Whether one of FORMATS recognises the checkpoint, or its file holds rounded values."""
    rounded = any(type.rounded for type in reader.stored_types().values())
    return rounded or any(form.matches(reader) for form in FORMATS.values())


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    precision: str = "high",
    bits: int | None = None,
) -> Llama:
    """Load a float or quantized checkpoint; arguments and errors as in `load_quantized`.

    Args:
        bits: round the linears of a float checkpoint, the head too, to so many bits in memory, to
            the nearest code, with a scale for every 32 inputs where that divides them.
    """
    place = torch.device(resolve_device(device))
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; there are {', '.join(_DTYPES)}")
    reader = open_checkpoint(path)
    config = llama_config(reader)
    with torch.device("meta"):
        model = Llama(config)
    linears = _QuantLinears(model, choose(place, backend), place, precision)
    for name, value in _entries(reader, bits, config.tie_word_embeddings):
        if isinstance(value, QuantizedTensor):
            linears.add(name, value)
        elif not name.endswith("rotary_emb.inv_freq"):
            stored = None if dtype == "auto" else getattr(torch, dtype)
            _put_plain(model, name, value, place, stored)
    linears.attach()
    if config.tie_word_embeddings and isinstance(model.lm_head, Linear):
        model.tie()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(
            f"{path}: tensor {missing[0]} is missing from the checkpoint ({len(missing)} in all)"
        )
    return model.eval().requires_grad_(False)


def _entries(
    reader: CheckpointReader, bits: int | None, tied: bool
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The tensors of a checkpoint by name: codes as the file has them, or as `bits` asks for."""
    for form in FORMATS.values():
        if form.matches(reader):
            return form.read(reader)
    if bits:
        return rounded_entries(reader, bits, tied)
    return ((name, reader.tensor(name)) for name in reader.names())


def resolve_device(device: str) -> str:
    """ "auto" becomes "cuda" where torch sees a GPU, else "cpu".

    Raises:
        ValueError: no such device, or torch sees no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; there are auto, cpu and cuda")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu")
    return device


def _put_plain(
    model: Llama, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Assign a tensor to the parameter of that name, after checking its shape and dtype; it is
    stored as `dtype`, or as it is.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        expected = getattr(module, attribute)
    except AttributeError:
        raise ValueError(
            f"{name}: the checkpoint has a tensor that a Llama of this config.json has not"
        ) from None
    known = isinstance(expected, Tensor) or (attribute == "bias" and expected is None)
    if not known:
        raise ValueError(f"{name}: a tensor of {tensor.dtype} is not what a Llama has there")
    check_float(name, tensor)
    if isinstance(expected, Tensor) and expected.shape != tensor.shape:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} in the file, {tuple(expected.shape)} by "
            "config.json; one is wrong"
        )
    setattr(module, attribute, nn.Parameter(tensor.to(device, dtype), requires_grad=False))


_GROUP_OF = {
    name: (group, merged)
    for group, merged in zip(LINEAR_GROUPS, MERGED_NAMES, strict=True)
    for name in group
}


class _QuantLinears:
    """Collects the quantized linears of a file, in any order, and puts them into the model.

    A group of LINEAR_GROUPS is packed as one matrix as soon as it is complete, so that unpacked
    codes of one layer at most are in memory.
    """

    def __init__(self, model: Llama, backend: str, device: torch.device, precision: str) -> None:
        self._model = model
        self._settings = (backend, device, precision)
        self._waiting: dict[str, QuantizedTensor] = {}
        self._packed: dict[str, tuple[list[str], QuantLinear]] = {}

    def add(self, name: str, qt: QuantizedTensor) -> None:
        """Take the weight of the linear of that name, after checking its shape."""
        linear = dict(self._model.named_modules()).get(name)
        if not isinstance(linear, Linear):
            raise ValueError(f"{name}: the checkpoint has codes for what is no linear of a Llama")
        expected = tuple(linear.weight.shape)
        if tuple(qt.codes.shape) != expected:
            raise ValueError(
                f"{name}: shape {tuple(qt.codes.shape)} in the file, {expected} by config.json; "
                "one is wrong"
            )
        self._waiting[name] = qt
        layer, *suffix = name.rsplit(".", 2)
        group, merged = _GROUP_OF.get(".".join(suffix), ((), ""))
        members = [f"{layer}.{member}" for member in group]
        if members and all(member in self._waiting for member in members):
            self._pack(members, f"{layer}.{merged}")

    def _pack(self, members: list[str], merged: str) -> None:
        parts = [self._waiting.pop(member) for member in members]
        if all(parts[0].stacks_with(part) for part in parts):
            self._packed[merged] = (members, self._linear(QuantizedTensor.stack(parts)))
            return
        for member, part in zip(members, parts, strict=True):
            self._packed[member] = ([member], self._linear(part))

    def _linear(self, qt: QuantizedTensor) -> QuantLinear:
        backend, device, precision = self._settings
        return QuantLinear(qt, None, backend, device, precision)

    def attach(self) -> None:
        """Replace the float linears, whose biases are kept."""
        for name, qt in self._waiting.items():
            self._packed[name] = ([name], self._linear(qt))
        for name, (members, linear) in self._packed.items():
            biases = [self._model.get_submodule(member).bias for member in members]
            present = [bias for bias in biases if isinstance(bias, Tensor)]
            if present:
                linear.bias = nn.Parameter(torch.cat(present), requires_grad=False)
            for member in members:
                self._set(member, None)
            self._set(name, linear)

    def _set(self, name: str, module: nn.Module | None) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, module)
