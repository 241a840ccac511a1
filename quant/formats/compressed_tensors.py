"""compressed-tensors `pack-quantized`, which llm-compressor writes and vLLM and transformers read.

Each quantized linear P of K inputs, N outputs and G groups is, instead of P.weight:

    P.weight_packed      int32 (N, K * bits / 32)   codes, packed along K
    P.weight_scale       float (N, G)
    P.weight_zero_point  int32 (N * bits / 32, G)   zeros, packed along N; asymmetric only
    P.weight_shape       int64 (2,)                 N, K
    P.weight_g_idx       int32 (K,)                 only where groups are not consecutive

The bits of a row are one run, as in quant/packing.py; older versions put whole codes
into a word, which differs for 3 bits (10 codes a word) and is told by the shape. Codes and zeros
are stored as unsigned numbers, and the zero is the true one: no offset. The settings stand in
config.json under `quantization_config`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader, module_names
from quant.checkpoint_writer import CheckpointWriter
from quant.config import QuantConfig
from quant.formats.reading import assemble, method, stored_settings, unpack_rows
from quant.grid import QuantizedTensor
from quant.packing import pack, pack_rows, unpack
from quant.stream_writer import StreamWriter

_SUFFIXES = ("packed", "scale", "zero_point", "shape", "g_idx")


class Writer:
    """Streams a quantized checkpoint into a folder; arguments as in formats.autogptq."""

    def __init__(
        self,
        folder: Path,
        config: QuantConfig,
        settings: dict[str, Any],
        shards: CheckpointWriter | StreamWriter | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self._shards = shards or CheckpointWriter(folder)
        self._plain_linears: list[str] = []

    def add_quantized(self, name: str, qt: QuantizedTensor) -> None:
        """Write the linear called `name` (without ".weight").

        Raises:
            ValueError: the format cannot hold the tensor.
        """
        _refuse(name, qt, self.config)
        self._shards.add(f"{name}.weight_packed", pack_rows(qt.codes.cpu(), qt.bits))
        self._shards.add(f"{name}.weight_scale", qt.grid.scales.to(torch.float16))
        if not self.config.symmetric:
            self._shards.add(f"{name}.weight_zero_point", pack(qt.grid.zeros.cpu(), qt.bits))
        self._shards.add(f"{name}.weight_shape", torch.tensor(qt.codes.shape))

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not quantized, in its own dtype."""
        module, _, kind = name.rpartition(".")
        if tensor.ndim == 2 and kind == "weight" and not module.endswith("embed_tokens"):
            self._plain_linears.append(module)
        self._shards.add(name, tensor)

    def flush(self) -> None:
        """Put what was added so far on the disk."""
        self._shards.flush()

    def close(self, model_config: dict[str, Any]) -> None:
        """Finish the shards and write config.json."""
        self._shards.close()
        plain = list(self._plain_linears)
        if model_config.get("tie_word_embeddings") and "lm_head" not in plain:
            plain.append("lm_head")
        stored = _stored(self.config, plain)
        config = {**model_config, "pretraining_tp": 1, "quantization_config": stored}
        text = json.dumps(config, indent=1) + "\n"
        (self.folder / "config.json").write_text(text, encoding="utf-8")


def _refuse(name: str, qt: QuantizedTensor, config: QuantConfig) -> None:
    """Raise ValueError if the format cannot hold the tensor."""
    if qt.group_index is not None:
        raise ValueError(
            f"{name}: its groups are not consecutive inputs (desc_act), which compressed-tensors "
            "no longer stores; export to gptq_v2 or float16"
        )
    if qt.bits != config.bits or qt.grid.scales.shape[1] * config.width(qt.in_features) != (
        qt.in_features
    ):
        raise ValueError(
            f"{name}: has another grid than the checkpoint, but compressed-tensors is written with "
            "one; export to autogptq or gptq_v2"
        )
    if qt.out_features % 32 or qt.in_features % 32:
        raise ValueError(
            f"{name}: shape ({qt.out_features}, {qt.in_features}) cannot be packed; multiples of "
            "32 can"
        )
    half = 2 ** (qt.bits - 1)
    if config.symmetric and not bool((qt.grid.zeros == half).all()):
        raise ValueError(
            f"{name}: the checkpoint calls itself symmetric, but not every zero is {half}; "
            "correct `sym` in its config"
        )
    if int(qt.grid.zeros.max()) > qt.grid.max_code:
        raise ValueError(
            f"{name}: has a zero of {int(qt.grid.zeros.max())}, but compressed-tensors holds 0 to "
            f"{qt.grid.max_code}; export to autogptq"
        )


def _stored(config: QuantConfig, plain_linears: list[str]) -> dict[str, Any]:
    """The object under `quantization_config`; readers refuse keys that they do not know."""
    channel = config.group_size == -1
    weights = {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else config.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "block_structure": None,
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": plain_linears,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": {**group, "weights": weights}},
    }


def matches(reader: CheckpointReader) -> bool:
    """Whether the checkpoint is one of compressed-tensors, of any of its formats."""
    return method(reader) == "compressed-tensors"


def quant_config(reader: CheckpointReader) -> QuantConfig:
    """Bits, group size and symmetry of the first group of linears.

    Raises:
        ValueError: the settings are of another format, or quantize activations.
    """
    arguments = _weights(reader)[0]
    group_size = arguments.get("group_size") or -1
    return QuantConfig(arguments.get("num_bits", 0), group_size, bool(arguments.get("symmetric")))


def read(reader: CheckpointReader) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Every module's QuantizedTensor (by name without suffix) and every other tensor, one at a
    time.
    """
    groups = _weights(reader)
    packed = set(module_names(reader.names(), ".weight_packed"))
    for name in reader.names():
        module, _, suffix = name.rpartition(".weight_")
        if module not in packed or suffix not in _SUFFIXES:
            yield name, reader.tensor(name)
        elif suffix == "packed":
            yield module, _read_one(reader, module, groups)


def _weights(reader: CheckpointReader) -> list[dict[str, Any]]:
    """The weight settings of every group of linears, after refusing what is not weight-only."""
    stored = stored_settings(reader)
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{reader.path}: quantization_config has no config_groups")
    found = []
    for name, group in groups.items():
        where = f"{reader.path}: config_groups.{name}"
        group = group if isinstance(group, dict) else {}
        form = group.get("format") or stored.get("format")
        if form != "pack-quantized":
            raise ValueError(f"{where}: format {form!r} is not supported; 'pack-quantized' is")
        weights = group.get("weights")
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            raise ValueError(f"{where}: weights are {weights!r:.60}, not integers")
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError(f"{where}: quantized activations are not supported")
        if weights.get("strategy") not in ("group", "channel"):
            raise ValueError(
                f"{where}: strategy {weights.get('strategy')!r} is not supported; 'group' and "
                "'channel' are"
            )
        found.append(weights)
    return found


def _read_one(
    reader: CheckpointReader, module: str, groups: list[dict[str, Any]]
) -> QuantizedTensor:
    """One linear; its bits are those of the settings by which the packed shape comes out."""
    words = reader.tensor(f"{module}.weight_packed")
    shape = reader.tensor(f"{module}.weight_shape").flatten().tolist()
    if len(shape) != 2 or words.dim() != 2 or words.shape[0] != shape[0]:
        raise ValueError(
            f"{module}: weight_shape {shape} and packed shape {tuple(words.shape)} disagree"
        )
    out_features, in_features = (int(size) for size in shape)
    choices = [QuantConfig(group.get("num_bits", 0)).bits for group in groups]
    fitting = [bits for bits in choices if words.shape[1] in _words(in_features, bits)]
    if in_features <= 0 or not fitting:
        raise ValueError(
            f"{module}: rows of {words.shape[1]} words do not hold {in_features} codes of any "
            "num_bits in the settings"
        )
    bits = fitting[0]
    scales = reader.tensor(f"{module}.weight_scale")
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if f"{module}.weight_zero_point" in reader:
        zeros = _unpack(reader.tensor(f"{module}.weight_zero_point").T, bits, out_features).T
    index = f"{module}.weight_g_idx"
    return assemble(
        module,
        _unpack(words, bits, in_features),
        scales,
        zeros,
        bits,
        reader.tensor(index) if index in reader else None,
    )


def _words(count: int, bits: int) -> tuple[int, int]:
    """Words of a row of `count` codes: of one run of bits, and of whole codes."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(rows, W) words of either kind -> (rows, count) codes."""
    if words.shape[-1] * 32 == count * bits and count % 32 == 0:
        return unpack(words.T, bits, count).T.contiguous()
    return unpack_rows(words, bits, count)
