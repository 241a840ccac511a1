"""QuantConfig: what a reader of a quantized file must know, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantConfig:
    """The stored grid of every linear.

    Attributes:
        bits: bits per code, one of 2, 3, 4, 8.
        group_size: input channels that share a scale and a zero, a multiple of 32; -1 is one group
            per row.
        symmetric: the zero is fixed at 2^(bits-1), else chosen per group.
        modules: (name, config) of every linear whose grid is another one, and of `lm_head` if it is
            quantized, which it otherwise is not.

    Raises:
        ValueError: bits or group_size is not one of these.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    modules: tuple[tuple[str, QuantConfig], ...] = ()

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(
                f"bits {self.bits} is not supported; choose one of {', '.join(map(str, BITS))}"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric is {self.symmetric!r}; it must be True or False")
        size = self.group_size
        if not isinstance(size, int) or (size != -1 and (size <= 0 or size % 32)):
            raise ValueError(
                f"group_size {self.group_size} is not supported; choose a multiple of 32, or -1 "
                "for rows"
            )

    def of(self, name: str) -> QuantConfig:
        """The grid of the linear called `name`."""
        return dict(self.modules).get(name, self.common)

    @property
    def common(self) -> QuantConfig:
        """The grid of the linears that `modules` does not name."""
        return replace(self, modules=())

    @property
    def has_head(self) -> bool:
        """Whether `lm_head` is quantized."""
        return any(name == "lm_head" for name, _ in self.modules)

    def settings(self) -> dict[str, Any]:
        """The attributes ready for JSON; `modules` by name, and only if there are some."""
        facts: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        facts["symmetric"] = self.symmetric
        modules = {
            name: {"bits": own.bits, "group_size": own.group_size} for name, own in self.modules
        }
        return facts | ({"modules": modules} if modules else {})

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    def width(self, in_features: int) -> int:
        """Input channels per group of a linear: group_size, or all of them for -1."""
        return in_features if self.group_size == -1 else self.group_size
