"""A float checkpoint whose linears are rounded as it is read: half the memory, and our kernel."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quant.checkpoint import CheckpointReader, check_float
from quant.config import QuantConfig
from quant.grid import QuantizedTensor, fit_minmax, nearest_codes
from quant.layer_reader import EMBEDDING, LINEARS

_GROUP = 32  # inputs with a scale, where that divides them
_ROWS = 4096  # rounded at a time


def rounded_entries(
    reader: CheckpointReader, bits: int, tied: bool
) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """The tensors of a float checkpoint, linears rounded and all others copied, so that nothing of
    the file stays mapped; `tied` makes a head of the embedding.
    """
    for name in reader.names():
        tensor = reader.tensor(name)
        check_float(name, tensor)
        linear = name.removesuffix(".weight")
        if linear == "lm_head" or ".".join(linear.rsplit(".", 2)[1:]) in LINEARS:
            yield linear, _rounded(tensor, bits)
        else:
            yield name, tensor.clone()
            if tied and name == EMBEDDING:
                yield "lm_head", _rounded(tensor, bits)
        del tensor
        reader.release()


def _rounded(weight: Tensor, bits: int) -> QuantizedTensor:
    """A weight (out, in), every `_GROUP` inputs with a scale where that divides them."""
    group_size = -1 if weight.shape[1] % _GROUP else _GROUP
    parts = []
    for rows in weight.split(_ROWS):
        grid = fit_minmax(rows.float(), QuantConfig(bits, group_size))
        parts.append(QuantizedTensor(nearest_codes(rows.float(), grid), grid))
    return QuantizedTensor.stack(parts)
