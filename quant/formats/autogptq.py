"""The GPTQ checkpoint as AutoGPTQ defined it and GPTQModel, transformers, vLLM and ExLlama read it.

Each quantized linear P of K inputs, N outputs and G groups is four tensors instead of P.weight:

    P.qweight  int32 (K * bits / 32, N)   codes, packed along K
    P.qzeros   int32 (G, N * bits / 32)   zeros, packed along N
    P.scales   float16 (G, N)
    P.g_idx    int32 (K,)                 group of each input channel

Version 1 (`checkpoint_format: gptq`) stores zero - 1, version 2 (`gptq_v2`) stores zero. Symmetric
grids are written as version 1, which every reader takes; asymmetric ones as version 2, because
version 1 is ambiguous there. The settings stand in config.json and in quantize_config.json.

Linears with other bits or groups are listed under `dynamic` (gptq_rules.py); their bits are read
from the shapes of the tensors, never by a foreign expression. `lm_head` announces a quantized head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader, module_names
from quant.checkpoint_writer import CheckpointWriter
from quant.config import QuantConfig
from quant.formats.gptq_rules import bits_by_shape, check_settings, dynamic_rules, grid_of
from quant.formats.reading import assemble, method, stored_settings
from quant.grid import QuantizedTensor
from quant.packing import pack, unpack
from quant.stream_writer import StreamWriter

_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


class Writer:
    """Streams a quantized checkpoint into a folder.

    Args:
        folder: where to write; made by the caller.
        config: what is stored.
        settings: the solver's settings; `damp` is repeated in the file for information.
        shards: where tensors go; a CheckpointWriter of the folder if not given.
        version: 1 or 2; if not given, 1 for symmetric grids and 2 for others.
    """

    def __init__(
        self,
        folder: Path,
        config: QuantConfig,
        settings: dict[str, Any],
        shards: CheckpointWriter | StreamWriter | None = None,
        version: int | None = None,
    ) -> None:
        self.folder, self.config, self.settings = folder, config, settings
        self.version = version or (1 if config.symmetric else 2)
        self._shards = shards or CheckpointWriter(folder)
        self._any_shuffled = False
        self._modules = dict(config.modules)

    def add_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Write the linear called `name` (without ".weight").

        Raises:
            ValueError: this version or layout cannot hold the tensor.
        """
        _refuse_what_would_wrap(name, qt, self.version)
        groups = qt.grid.scales.shape[1]
        own = grid_of(qt.bits, qt.in_features, groups, self.config)
        if own != self.config.common or name == "lm_head":
            self._modules[name] = own
        index = qt.group_index
        self._any_shuffled |= index is not None
        if index is None:
            index = torch.arange(qt.in_features) // (qt.in_features // groups)
        stored_zeros = qt.grid.zeros - (1 if self.version == 1 else 0)
        self._shards.add(f"{name}.qweight", pack(qt.codes.T, qt.bits))
        self._shards.add(f"{name}.qzeros", pack(stored_zeros, qt.bits).T)
        self._shards.add(f"{name}.scales", qt.grid.scales.T.to(torch.float16))
        self._shards.add(f"{name}.g_idx", index.to(torch.int32))

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not quantized, in its own dtype."""
        self._shards.add(name, tensor)

    def flush(self) -> None:
        """Put what was added so far on the disk."""
        self._shards.flush()

    def close(self, model_config: dict[str, Any]) -> None:
        """Finish the shards and write both configs."""
        self._shards.close()
        stored = {
            "quant_method": "gptq",
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "desc_act": self._any_shuffled,
            "sym": self.config.symmetric,
            "lm_head": "lm_head" in self._modules,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "damp_percent": self.settings.get("damp", 0.01),
            "true_sequential": True,
            "static_groups": True,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["llama-gptq:0.1.0"]},
        }
        if rules := dynamic_rules(self._modules, self.config):
            stored["dynamic"] = rules
        config = {**model_config, "pretraining_tp": 1, "quantization_config": stored}
        _write_json(self.folder / "quantize_config.json", stored)
        _write_json(self.folder / "config.json", config)


def _refuse_what_would_wrap(name: str, qt: QuantizedTensor, version: int) -> None:
    """Raise ValueError if a stored zero, or the packing, does not fit."""
    if qt.out_features % 32 or qt.in_features % 32:
        raise ValueError(
            f"{name}: shape ({qt.out_features}, {qt.in_features}) cannot be packed; the GPTQ "
            "format needs multiples of 32"
        )
    low, high = (1, qt.grid.max_code + 1) if version == 1 else (0, qt.grid.max_code)
    least, most = int(qt.grid.zeros.min()), int(qt.grid.zeros.max())
    if least < low or most > high:
        other = "gptq_v2" if version == 1 else "autogptq"
        raise ValueError(
            f"{name}: has a zero of {least if least < low else most}, but version {version} of the "
            f"GPTQ format holds {low} to {high}; export to {other}"
        )


def matches(reader: CheckpointReader) -> bool:
    """Whether the checkpoint holds packed weights, other than those of AWQ."""
    packed = any(name.endswith(".qweight") for name in reader.names())
    return packed and method(reader) != "awq"


def stored_config(reader: CheckpointReader) -> dict[str, Any]:
    """The quantization settings, from config.json or quantize_config.json.

    Raises:
        ValueError: neither has them, or they are of another method.
    """
    stored = stored_settings(reader)
    if not stored:
        raise ValueError(
            f"{reader.path}: neither config.json nor quantize_config.json has quantization settings"
        )
    if method(reader) != "gptq":
        raise ValueError(
            f"{reader.path}: quantization method {method(reader)!r} is not supported; supported is "
            "'gptq'"
        )
    return stored


def quant_config(reader: CheckpointReader) -> QuantConfig:
    """Bits, group size and symmetry of a checkpoint, with the linears that differ."""
    config, modules = _common_config(reader), {}
    mixed = stored_config(reader).get("dynamic")
    for module in module_names(reader.names(), ".qweight"):
        if not mixed and module != "lm_head":
            continue
        bits = _bits(reader, module, config)
        width = reader.tensor(f"{module}.qweight").shape[0] * 32 // bits
        own = grid_of(bits, width, reader.tensor(f"{module}.scales").shape[0], config)
        if own != config or module == "lm_head":
            modules[module] = own
    return replace(config, modules=tuple(modules.items()))


def _common_config(reader: CheckpointReader) -> QuantConfig:
    """What the settings say of most linears."""
    stored = stored_config(reader)
    check_settings(reader)
    return QuantConfig(stored["bits"], stored.get("group_size", -1), stored.get("sym", True))


def _bits(reader: CheckpointReader, module: str, config: QuantConfig) -> int:
    """Bits of a linear: those of the settings, or by its shapes where the settings have rules."""
    if not stored_config(reader).get("dynamic"):
        return config.bits
    zeros, scales = (reader.tensor(f"{module}.{name}").shape for name in ("qzeros", "scales"))
    return bits_by_shape(module, tuple(zeros), tuple(scales))


def checkpoint_format(reader: CheckpointReader) -> str:
    """ "gptq" (version 1) or "gptq_v2", as the settings say."""
    stored = stored_config(reader)
    return str(stored.get("checkpoint_format") or stored.get("format") or "gptq")


def read(reader: CheckpointReader) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Every module's QuantizedTensor (by name without suffix) and every other tensor, one at a
    time.
    """
    config = _common_config(reader)
    version_1 = checkpoint_format(reader) == "gptq"
    packed = set(module_names(reader.names(), ".qweight"))
    for name in reader.names():
        module, dot, suffix = name.rpartition(".")
        if module in packed and dot + suffix in _SUFFIXES:
            if suffix == "qweight":
                yield module, _read_one(reader, module, config, version_1)
        else:
            yield name, reader.tensor(name)


def _read_one(
    reader: CheckpointReader, module: str, config: QuantConfig, version_1: bool
) -> QuantizedTensor:
    """One linear, with its zeros brought to the meaning of quant.grid."""
    words, scales = reader.tensor(f"{module}.qweight"), reader.tensor(f"{module}.scales")
    zero_words, bits = reader.tensor(f"{module}.qzeros"), _bits(reader, module, config)
    if not words.dim() == scales.dim() == zero_words.dim() == 2:
        raise ValueError(f"{module}: qweight, scales and qzeros are not all matrices")
    out_features, in_features = scales.shape[1], words.shape[0] * 32 // bits
    if words.shape[1] != out_features:
        raise ValueError(
            f"{module}: qweight has {words.shape[1]} outputs, scales {out_features}; one is damaged"
        )
    codes = unpack(words, bits, in_features).T.contiguous()  # (N, K), without a copy
    zeros = unpack(zero_words.T, bits, out_features)  # (N, G)
    already_true = config.symmetric and bool((zeros == 2 ** (bits - 1)).all())
    if version_1 and not already_true:  # else written as version 2, labelled 1
        zeros = zeros + 1
    index = reader.tensor(f"{module}.g_idx") if f"{module}.g_idx" in reader else None
    return assemble(module, codes, scales.T, zeros, bits, index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
