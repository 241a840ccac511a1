"""`dynamic` in the settings of a GPTQ checkpoint: the linears whose grid is not that of the others.

A rule is "+:" and a regular expression for the module's path, with what differs; the first that
matches holds. GPTQModel asks for each linear, vLLM for what it joins (qkv_proj, gate_up_proj): one
expression stands for both.
"""

from __future__ import annotations

import re

from quant.checkpoint import CheckpointReader
from quant.config import BITS, QuantConfig
from quant.formats.reading import stored_settings

_FUSED = (("q", "k", "v", "qkv"), ("gate", "up", "gate_up"))  # the last is their joined name


def dynamic_rules(
    modules: dict[str, QuantConfig], config: QuantConfig
) -> dict[str, dict[str, int]]:
    """The rules for linears whose grid differs from that of the checkpoint."""
    return {
        f"+:^{_pattern(name, modules)}$": {"bits": own.bits, "group_size": own.group_size}
        for name, own in modules.items()
        if own != config.common
    }


def _pattern(name: str, modules: dict[str, QuantConfig]) -> str:
    """An expression for a linear; for all that are joined with it, if their grid is the same."""
    parent, _, kind = name.rpartition(".")
    for *parts, joined in _FUSED:
        members = [f"{parent}.{part}_proj" for part in parts]
        if name in members and all(modules.get(one) == modules[name] for one in members):
            return rf"{re.escape(parent)}\.({'|'.join([*parts, joined])})_proj"
    return re.escape(name)


def check_settings(reader: CheckpointReader) -> None:
    """Refuse settings whose meaning is not known, before any tensor is read by them.

    Raises:
        ValueError: no bits, another format, or `sym` or `dynamic` are not what they must be; the
            message names file, field and value.
    """
    stored = stored_settings(reader)
    inside = bool(reader.config.get("quantization_config"))
    file = reader.path / ("config.json" if inside else "quantize_config.json")
    if "bits" not in stored:
        raise ValueError(f"{file}: the quantization settings name no bits")
    for field in ("checkpoint_format", "format"):
        if (value := stored.get(field)) not in (None, "", "gptq", "gptq_v2"):
            raise ValueError(
                f"{file}: {field} is {value!r:.40}; it must be 'gptq' or 'gptq_v2', by which the "
                "zeros are read"
            )
    if not isinstance(sym := stored.get("sym", True), bool):
        raise ValueError(f"{file}: sym is {sym!r:.40}; it must be true or false")
    rules = stored.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise ValueError(f"{file}: dynamic is {rules!r:.40}; it must be an object of rules")
    for rule in rules:
        try:
            re.compile(rule.removeprefix("+:").removeprefix("-:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{file}: dynamic has the rule {rule!r:.60}, no regular expression ({error})"
            ) from None


def grid_of(bits: int, in_features: int, groups: int, config: QuantConfig) -> QuantConfig:
    """The grid of one linear, in the words of the checkpoint's where it is the same."""
    base = config.common
    if bits == base.bits and groups == -(-in_features // base.width(in_features)):
        return base
    size = -1 if groups == 1 else -(-in_features // groups)
    return QuantConfig(bits, size, base.symmetric)


def bits_by_shape(module: str, zeros: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Bits of a linear whose packed zeros and scales have these shapes.

    Raises:
        ValueError: they fit no number of bits.
    """
    for bits in BITS:
        if len(zeros) == len(scales) == 2 and zeros[1] * 32 == bits * scales[1] > 0:
            return bits
    raise ValueError(f"{module}: qzeros {zeros} and scales {scales} fit no number of bits")
