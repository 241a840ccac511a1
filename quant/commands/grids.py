"""The grids of `quantize`: from its options, and from what the linears can bear."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def common(llama: Any, config: Any, lm_head_bits: int | None, target: str | None) -> Any:
    """The grids of all linears, which the model, the format and the target runtime can have."""
    from quant.config import BITS
    from quant.geometry import check_shapes

    if lm_head_bits is not None:
        if lm_head_bits not in BITS:
            raise ValueError(
                f"--lm-head-bits {lm_head_bits}: choose one of {', '.join(map(str, BITS))}"
            )
        config = replace(config, modules=(("lm_head", replace(config, bits=lm_head_bits)),))
    check_shapes(llama, config)
    check_target(target, llama, config)
    return config


def usual_group_size(llama: Any) -> int:
    """128, or what divides every linear; says so if it is another one."""
    from quant import geometry

    size = geometry.usual_group_size(llama)
    if size != 128:
        print(f"group size 128 does not divide every linear of this model; using {size}")
    return size


def check_target(target: str | None, llama: Any, config: Any) -> None:
    """Refuse what the target runtime would not load."""
    from quant.geometry import linear_shapes
    from quant.runtimes import check_target

    if not target:
        return
    shapes = {f"model.layers.*.{name}": shape for name, shape in linear_shapes(llama).items()}
    if config.has_head:
        shapes["lm_head"] = llama.vocab_size, llama.hidden_size
    check_target(target, config, shapes)


def finer(reader: Any, llama: Any, windows: Any, config: Any, target: float, device: Any) -> Any:
    """The grids for so many bits per weight; prints what was chosen."""
    from quant.bit_choice import choose

    choice = choose(reader, llama, windows, config, target, device)
    print(choice.summary(), flush=True)
    return choice.config
