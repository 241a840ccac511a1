"""Datasets of the Hugging Face hub, through its own library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any


def texts(source: str, instead: str, *where: str, **which: Any) -> Iterator[str]:
    """The texts of the rows of `datasets.load_dataset(*where, **which)`.

    Args:
        source: its name here.
        instead: the local file that may be given where there is no network.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from datasets import load_dataset

    for library in ("huggingface_hub", "datasets"):  # which tell of every retry
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        for row in load_dataset(*where, **which):
            yield row["text"]
    except Exception as error:  # no network shows as any of a dozen types
        raise ValueError(
            f"{source}: cannot be downloaded ({type(error).__name__}); give a local file instead, "
            f"such as {instead}"
        ) from error
