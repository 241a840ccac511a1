"""`--target-bpw`: finer grids where they save most, for so many bits per weight on average.

From the grid that `--bits` and `--group-size` name, linears that share an input go to smaller
groups or more bits, in the order of what a stored bit saves of the expected KL divergence
(quant.sensitivity), until the target is reached. Only grids on the lower convex hull of bits and
loss are steps, so each saves less per bit than the one before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader
from quant.config import BITS, QuantConfig
from quant.geometry import USUAL_GROUPS, bits_per_weight, linear_shapes
from quant.llama.config import LlamaConfig
from quant.sensitivity import Sensitivity, sensitivities


@dataclass(frozen=True)
class Choice:
    """The grids that were chosen.

    Attributes:
        config: with `modules` for every linear whose grid is finer than the common one.
        bits: stored bits per weight of the linears, with scales and zeros.
        loss, before: the expected KL per token of the choice, and of the common grid everywhere.
    """

    config: QuantConfig
    bits: float
    loss: float
    before: float

    def summary(self) -> str:
        """One line for the user."""
        grids = Counter(f"{own.bits} bits g{own.group_size}" for _, own in self.config.modules)
        finer = ", ".join(f"{count} linears to {grid}" for grid, count in sorted(grids.items()))
        return (
            f"{self.bits:.3f} bits per weight: {finer or 'no linear is finer'}; expected KL "
            f"{self.before:.4f} -> {self.loss:.4f}"
        )


def candidates(llama: LlamaConfig, config: QuantConfig) -> list[QuantConfig]:
    """The common grid, and the finer ones that every linear can have: smaller groups of the same
    bits, and the next more bits in the same groups.
    """
    common = config.common
    widths = {width for _, width in linear_shapes(llama).values()}
    finer = [
        replace(common, group_size=size)
        for size in USUAL_GROUPS
        if all(width % size == 0 and size < common.width(width) for width in widths)
    ]
    more = [bits for bits in BITS if bits > common.bits][:1]
    return [common, *finer, *(replace(common, bits=bits) for bits in more)]


def choose(
    reader: CheckpointReader,
    llama: LlamaConfig,
    windows: Tensor,
    config: QuantConfig,
    target: float,
    device: torch.device,
) -> Choice:
    """The grids for at most `target` bits per weight of the linears in the layers.

    Args:
        windows: (windows, tokens) int64 calibration ids.
        config: the common grid; of its `modules` only a quantized head stays as it is.

    Raises:
        ValueError: the common grid takes more than that, or every grid less.
    """
    grids = candidates(llama, config)
    shapes = linear_shapes(llama).values()
    taken = [_bits(shapes, grid) / _weights(shapes) for grid in grids]
    least, most = taken[0], max(taken)
    if not target <= most:  # nor is NaN
        raise ValueError(
            f"--target-bpw {target:g}: is more than the finest grid takes, {most:.3f} per weight; "
            "give a smaller one, or start from more --bits"
        )
    if target < least:
        raise ValueError(
            f"--target-bpw {target:g}: {config.bits} bits with --group-size {config.group_size} "
            f"take {least:.3f} per weight; give a larger target, or a coarser grid to start from"
        )
    found = sensitivities(reader, llama, windows, grids, device)
    pairs = list(zip(found, allocate(found, grids, target), strict=True))
    modules = [(name, grids[at]) for unit, at in reversed(pairs) if at for name in unit.names]
    bits = sum(_bits(unit.shapes, grids[at]) for unit, at in pairs)
    bits /= sum(_weights(unit.shapes) for unit in found)
    loss = sum(unit.losses[at] for unit, at in pairs)
    before = sum(unit.losses[0] for unit in found)
    whole = replace(config, modules=(*config.modules, *modules))
    return Choice(whole, bits, loss, before)


def allocate(found: list[Sensitivity], grids: list[QuantConfig], target: float) -> list[int]:
    """The index of the grid of each unit: steps are taken by what they save per bit, as long as the
    mean stays within the target; what does not fit is passed over, and its unit stays.
    """
    chosen = [0] * len(found)
    total = sum(_bits(unit.shapes, grids[0]) for unit in found)
    room = target * sum(_weights(unit.shapes) for unit in found) - total
    steps = [(*step, at) for at, unit in enumerate(found) for step in _steps(unit, grids)]
    closed = set()
    for _, bits, grid, at in sorted(steps, key=lambda step: -step[0]):
        if at in closed or bits > room:
            closed.add(at)
            continue
        chosen[at] = grid
        room -= bits
    return chosen


def _steps(unit: Sensitivity, grids: list[QuantConfig]) -> Iterator[tuple[float, float, int]]:
    """(loss saved per bit, bits more, grid) along the lower convex hull, steepest first."""
    at, bits = 0, _bits(unit.shapes, grids[0])
    while True:
        rates = [
            ((unit.losses[at] - loss) / more, more, grid)
            for grid, loss in enumerate(unit.losses)
            if (more := _bits(unit.shapes, grids[grid]) - bits) > 0 and loss < unit.losses[at]
        ]
        if not rates:
            return
        best = max(rates)
        yield best
        at, bits = best[2], bits + best[1]


def _bits(shapes: Iterable[tuple[int, int]], grid: QuantConfig) -> float:
    """Stored bits of linears (out, in)."""
    return sum(rows * width * bits_per_weight(grid, width) for rows, width in shapes)


def _weights(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(rows * width for rows, width in shapes)
