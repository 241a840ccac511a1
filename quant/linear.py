"""QuantLinear: a packed weight and the backend that multiplies it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.grid import QuantizedTensor
from quant.kernels import BACKENDS, PRECISIONS


class QuantLinear(nn.Module):
    """y = x W^T + bias, with W kept as integer codes.

    Args:
        qt: the weight, (out_features, in_features).
        bias: (out_features,) in any float dtype, or None.
        backend: a name in BACKENDS.
        device: where the packed tensors live.
        precision: "exact", "high" or "fast"; see quant/kernels.

    Raises:
        ValueError: the precision is unknown.
    """

    def __init__(
        self,
        qt: QuantizedTensor,
        bias: Tensor | None = None,
        backend: str = "reference",
        device: torch.device | str = "cpu",
        precision: str = "exact",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision {precision!r} is unknown; there are {', '.join(PRECISIONS)}"
            )
        self.in_features, self.out_features = qt.in_features, qt.out_features
        self.backend, self.precision = backend, precision
        for name, tensor in BACKENDS[backend].pack(qt).items():
            self.register_buffer(name, tensor.to(device) if tensor.dim() else tensor)
        self.bias = None if bias is None else nn.Parameter(bias.to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = BACKENDS[self.backend].matmul(x, self._buffers, self.precision)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, backend={self.backend}, {self.precision}"
