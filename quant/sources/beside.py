"""Tokenizer files that lie beside a weight file."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_beside(path: Path, folder: Path) -> bool:
    """Copy tokenizer.model or tokenizer.json from beside `path`; whether there was one."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if path.with_name(name).is_file():
            shutil.copyfile(path.with_name(name), folder / name)
            return True
    return False
