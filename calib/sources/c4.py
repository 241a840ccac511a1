"""C4: the first English training shard, as the GPTQ paper calibrates on, through Hugging Face
`datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator


def documents() -> Iterator[str]:
    """Documents of shard 0, streamed.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from datasets import load_dataset

    file = "en/c4-train.00000-of-01024.json.gz"
    try:
        rows = load_dataset("allenai/c4", data_files={"train": file}, split="train", streaming=True)
        yield from (row["text"] for row in rows)
    except Exception as error:  # no network shows as any of a dozen types
        raise ValueError(
            f"c4: cannot be downloaded ({type(error).__name__}); give a local .jsonl, .parquet "
            "or .txt file instead"
        ) from error
