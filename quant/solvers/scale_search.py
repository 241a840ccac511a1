"""Scales that lose least where the inputs are strong.

Min-max gives a group the scale that reaches its largest weight, however rarely that weight matters.
Here each group of a row takes the scale s (and the zero z of an asymmetric grid) that minimises

    sum over i of  h_i (w_i - s (c_i - z))^2 ,    c_i = nearest code to w_i,   h = diag(H)

which is the layer's squared output error if inputs were uncorrelated. The loss has one broad
valley in s, so the search is coarse, then fine around the best, then s is refit to the codes found,
sum h w (c - z) / sum h (c - z)^2: about 20 evaluations a group. The min-max grid itself is a
candidate, so the result is never worse. Every candidate is rounded to float16 before it is judged.

A symmetric grid of 4 bits has codes -8..7, one more below zero than above. `signed` also tries
negative scales, which turn the longer side towards the larger weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.grid import LARGEST_SCALE, SMALLEST_SCALE, Grid, fit_minmax
from quant.native import searching

_COARSE = torch.linspace(0.35, 1.05, 11).tolist()  # fractions of the min-max scale, 0.07 apart
_FINE = torch.linspace(0.93, 1.07, 11).tolist()  # fractions of the best coarse scale
_CHUNK, _LARGE_CHUNK = 1 << 17, 1 << 25  # weights at a time: in a CPU's cache, and elsewhere


def fit_weighted(
    weight: Tensor, importance: Tensor, config: QuantConfig, signed: bool = False
) -> Grid:
    """The grid of each group with the least weighted rounding error.

    Args:
        weight: (out, in) float32; in must be divisible by the group size.
        importance: (in,) float32, not negative: the diagonal of the Hessian.
        config: bits, group size, symmetric.
        signed: let symmetric grids have negative scales.

    Returns:
        A Grid with float16-exact scales; groups without importance keep the min-max grid.
    """
    start = fit_minmax(weight, config)
    width = config.width(weight.shape[1])
    signed = signed and config.symmetric
    importance = (importance / importance.mean().clamp(min=1e-30)).float().view(-1, width)
    if searching.can_search(weight, width):
        coarse = [f * sign for f in _COARSE for sign in ((1, -1) if signed else (1,))]
        limits = 0 if config.symmetric else 1, config.max_code
        begin = start.scales, start.zeros
        scales, zeros = searching.search(weight, importance, begin, (coarse, _FINE), limits)
        return replace(start, scales=scales, zeros=zeros.to(torch.uint8))
    rows = max(1, (_CHUNK if weight.is_cpu else _LARGE_CHUNK) // weight.shape[1])
    parts = []
    for first in range(0, len(weight), rows):
        chunk = slice(first, first + rows)
        groups = weight[chunk].float().view(-1, *importance.shape)  # (rows, groups, width)
        search = _Search(groups, importance, start.scales[chunk], start.zeros[chunk].float())
        parts.append(search.run(config, signed))
    scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(start, scales=scales, zeros=zeros.to(torch.uint8))


class _Search:
    """What native/search.h does, in torch. The best grid so far of some rows' groups:
    `scales`, `zeros`, `losses`, each (rows, groups).

    Args:
        groups: (rows, groups, width) weights.
        importance: (groups, width).
        scales, zeros: (rows, groups), where the search starts.
    """

    def __init__(self, groups: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self.groups, self.importance = groups, importance
        self.scales, self.zeros = scales, zeros
        self.losses = torch.full_like(scales, torch.inf)

    def run(self, config: QuantConfig, signed: bool) -> tuple[Tensor, Tensor]:
        """Search; the best scales and zeros."""
        scales, zeros, top = self.scales, self.zeros, float(config.max_code)
        self._try(scales, zeros, top)
        signs = (1, -1) if signed else (1,)
        for fraction in _COARSE:
            for sign in signs:
                self._try(scales * (fraction * sign), zeros, top)
        scales, zeros = self.scales, self.zeros
        shifts = (0,) if config.symmetric else (-1, 0, 1)
        for shift in shifts:
            shifted = (zeros + shift).clamp(1, top)
            for fraction in _FINE:
                self._try(scales * fraction, shifted, top)
        self._try(self._least_squares(top), self.zeros, top)
        return self.scales, self.zeros

    def _least_squares(self, top: float) -> Tensor:
        """The best scales for the codes of the best grids; these scales where all codes are 0."""
        codes = self._codes(self.groups / self.scales[..., None], self.zeros, top)
        weighted = codes * self.importance
        squares = (weighted * codes).sum(-1)
        fitted = (weighted * self.groups).sum(-1) / squares
        return torch.where(squares > 0, fitted, self.scales)

    @staticmethod
    def _codes(values: Tensor, zeros: Tensor, top: float) -> Tensor:
        """Nearest code minus zero of values in steps."""
        codes = values.round()
        low, high = -zeros[..., None], (top - zeros)[..., None]
        return torch.minimum(torch.maximum(codes, low, out=codes), high, out=codes)

    def _try(self, scales: Tensor, zeros: Tensor, top: float) -> None:
        """Take a candidate where it is better than what was found so far."""
        sizes = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        scales = torch.copysign(sizes, scales)
        values = self.groups * (1 / scales)[..., None]
        errors = values.sub_(self._codes(values, zeros, top)).square_()
        losses = torch.einsum("rgw,gw->rg", errors, self.importance) * scales.square()
        better = losses < self.losses
        self.losses = torch.where(better, losses, self.losses)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
