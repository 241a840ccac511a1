"""Bytes and seconds as people read them."""

from __future__ import annotations

from math import ceil


def size(count: float) -> str:
    """Bytes as MB or GB (decimal)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def at_least(count: float) -> str:
    """The smallest size that is no less, as `parse_size` takes it and people write it."""
    return f"{ceil(count / 1e7) / 100:.2f}GB" if count >= 1e9 else f"{ceil(count / 1e6)}MB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def parse_size(text: str) -> int:
    """Bytes of "16GB" or "800MB".

    Raises:
        ValueError: it is not such a size.
    """
    units = {"GB": 1e9, "MB": 1e6}
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"size {text!r} is not understood; write 16GB or 800MB") from None
    if size <= 0:
        raise ValueError(f"size {text!r} must be above zero")
    return size
