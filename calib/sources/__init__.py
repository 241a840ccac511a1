"""Where calibration text comes from: one file each, `documents()` gives texts one at a time.

To add one: copy `wikitext2.py`, add a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from calib.sources import c4, stdlib, text_files, wikitext2

SOURCES: dict[str, Callable[[], Iterable[str]]] = {
    "stdlib": stdlib.documents,
    "wikitext2": wikitext2.documents,
    "c4": c4.documents,
}


def documents(calib: Sequence[str]) -> Iterable[str]:
    """Texts of one named source, or of local files and folders.

    Raises:
        ValueError: a name is empty, or as `text_files.documents`.
    """
    if not all(name.strip() for name in calib):
        raise ValueError("calibration text: a name is empty; give a file or a source")
    if len(calib) == 1 and calib[0] in SOURCES and not Path(calib[0]).exists():
        return SOURCES[calib[0]]()
    return text_files.documents([Path(name) for name in calib])
