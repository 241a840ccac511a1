"""C4: the first English training shard, as the GPTQ paper calibrates on."""

from __future__ import annotations

from collections.abc import Iterator

from calib.sources.downloads import texts

_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz"}


def documents() -> Iterator[str]:
    """Documents of shard 0, streamed.

    Raises:
        ValueError: it cannot be downloaded.
    """
    instead = "a .jsonl, .parquet or .txt file"
    yield from texts("c4", instead, "allenai/c4", data_files=_SHARD, split="train", streaming=True)
