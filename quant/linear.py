"""QuantLinear: a packed weight and the backend that multiplies it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.grid import QuantizedTensor
from quant.kernels import BACKENDS


class QuantLinear(nn.Module):
    """y = x W^T + bias, with W kept as integer codes.

    Args:
        qt: the weight, (out_features, in_features).
        bias: (out_features,) in any float dtype, or None.
        backend: a name in BACKENDS.
        device: where the packed tensors live.
    """

    def __init__(
        self,
        qt: QuantizedTensor,
        bias: Tensor | None = None,
        backend: str = "reference",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = qt.in_features, qt.out_features
        self.backend = backend
        self._packed_names = []
        for name, tensor in BACKENDS[backend].pack(qt).items():
            self.register_buffer(name, tensor.to(device) if tensor.dim() else tensor)
            self._packed_names.append(name)
        self.bias = None if bias is None else nn.Parameter(bias.to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = {name: getattr(self, name) for name in self._packed_names}
        y = BACKENDS[self.backend].matmul(x, packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, backend={self.backend}"
