"""The loop inside a block of columns, which GPTQ and the sweeps after it share.

Column j receives the errors of the columns before it and is rounded:

    v_j = values_j + sum over i < j of errors_i ratio_ij ,
    code_j = nearest code to v_j ,   errors_j = original_j - scale_j (code_j - zero_j)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.native import solving


def round_block(
    values: Tensor, original: Tensor, ratio: Tensor, scales: Tensor, zeros: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block in turn, compiled where that is possible.

    Args:
        values, original, scales, zeros: (block, out).
        ratio: (block, block); what stands on and below the diagonal is not read.

    Returns:
        Codes uint8 and errors, (block, out).
    """
    rounding = solving.round_block if solving.can_round(values) else _in_torch
    return rounding(values, original, ratio, scales, zeros, max_code)


def _in_torch(
    values: Tensor, original: Tensor, ratio: Tensor, scales: Tensor, zeros: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """What native/solve.h does."""
    codes, errors = values.clone(), torch.empty_like(values)
    for j in range(len(values)):
        code = codes[j]
        if j:
            code.addmv_(errors[:j].T, ratio[:j, j])
        code.mul_(1 / scales[j]).round_().add_(zeros[j]).clamp_(0, max_code)
        torch.sub(code, zeros[j], out=errors[j]).mul_(scales[j]).neg_().add_(original[j])
    return codes.to(torch.uint8), errors
