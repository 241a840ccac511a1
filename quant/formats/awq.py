"""AWQ as AutoAWQ's `gemm` version stores it: 4 bits, read only.

Each quantized linear P of K inputs, N outputs and G groups is three tensors instead of P.weight:

    P.qweight  int32 (K, N / 8)   codes, packed along N
    P.qzeros   int32 (G, N / 8)   zeros, packed along N: true zeros, no offset
    P.scales   float16 (G, N)

The codes of a word lie in the order 0 2 4 6 1 3 5 7, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quant.checkpoint import CheckpointReader, module_names
from quant.config import QuantConfig
from quant.formats.reading import assemble, method, stored_settings, unpack_rows
from quant.grid import QuantizedTensor

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SUFFIXES = ("qweight", "qzeros", "scales")


def matches(reader: CheckpointReader) -> bool:
    """Whether the checkpoint says that it is AWQ, of any version."""
    return method(reader) == "awq"


def quant_config(reader: CheckpointReader) -> QuantConfig:
    """Bits and group size; the grid is asymmetric where the settings have `zero_point`.

    Raises:
        ValueError: another version than gemm, or not 4 bits.
    """
    stored = stored_settings(reader)
    version = str(stored.get("version") or stored.get("format") or "gemm").lower()
    bits = stored.get("bits", stored.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise ValueError(
            f"{reader.path}: AWQ version {version!r} with {bits!r} bits is not supported; 'gemm' "
            "with 4 bits is"
        )
    group_size = stored.get("group_size", stored.get("q_group_size", 128))
    return QuantConfig(bits, group_size, not stored.get("zero_point", True))


def read(reader: CheckpointReader) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Every module's QuantizedTensor (by name without suffix) and every other tensor, one at a
    time.
    """
    quant_config(reader)
    packed = set(module_names(reader.names(), ".qweight"))
    for name in reader.names():
        module, _, suffix = name.rpartition(".")
        if module not in packed or suffix not in _SUFFIXES:
            yield name, reader.tensor(name)
        elif suffix == "qweight":
            yield module, _read_one(reader, module)


def _read_one(reader: CheckpointReader, module: str) -> QuantizedTensor:
    """One linear, brought to (out, in)."""
    words, scales = reader.tensor(f"{module}.qweight"), reader.tensor(f"{module}.scales")
    out_features = scales.shape[-1]
    codes = unpack_rows(words, 4, out_features, _ORDER)  # (in, out)
    zeros = unpack_rows(reader.tensor(f"{module}.qzeros"), 4, out_features, _ORDER)
    return assemble(module, codes.T.contiguous(), scales.T, zeros.T, 4, None)
