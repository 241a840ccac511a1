"""The weight to aim at, so that errors of the layers before are undone rather than passed on.

A linear of the quantized model sees x where the float model saw x~. Instead of keeping W x, the
linear should give W x~. The squared distance to that is, up to a constant,

    tr (W* - Q) H (W* - Q)^T ,      W* = W + W D H^-1 ,   D = sum of (x~ - x) x^T ,

(QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692), so any solver serves, given W* for W.

The outputs of o_proj and down_proj are added to the residual stream, h here and h~ in the float
model, and only the sum matters. They should give W x~ + h~ - h, which adds L H^-1 to W* with

    L = sum of (h~ - h) x^T .

A part of D and L is noise of the calibration data: W* goes a share of the way, and H is damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMP = 0.3  # of the mean diagonal of H, far more than GPTQ's: D is noisier than H


def towards_float(weight: Tensor, hessian: Tensor, missing: Tensor) -> Tensor:
    """W + missing (H + 0.3 mean(diag H) I)^-1.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32, the sum of x x^T.
        missing: (out, in) float32, the sum of (y~ - W x) x^T with y~ the output to aim at.

    Returns:
        (out, in) float32.
    """
    H = hessian.clone()
    H.diagonal().add_((_DAMP * H.diagonal().mean()).clamp(min=1e-12))
    lower, failed = torch.linalg.cholesky_ex(H)
    if failed.item():  # rounding of a nearly singular H: float64 has room for it
        lower = torch.linalg.cholesky(H.double()).to(H.dtype)
    return weight + torch.cholesky_solve(missing.T, lower).T
