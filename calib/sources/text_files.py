"""Local text: .txt (and other plain text) as it is, .jsonl and .parquet by their `text` field,
folders of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

_SUFFIXES = (".txt", ".md", ".raw", ".py", ".jsonl", ".parquet")


def documents(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of all files, in the order given; a folder's files by name.

    Raises:
        ValueError: a path does not exist, has an unknown ending, no text, or is not readable.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
            if not files:
                raise ValueError(f"{path}: no text files; looked for {', '.join(_SUFFIXES)}")
        elif path.is_file():
            files = [path]
        else:
            raise ValueError(
                f"{path}: no such file; give a text file, or one of the sources stdlib, "
                "wikitext2, c4"
            )
        for file in files:
            yield from _read(file)


def _read(file: Path) -> Iterator[str]:
    if file.suffix == ".jsonl":
        yield from _read_jsonl(file)
    elif file.suffix == ".parquet":
        yield from _read_parquet(file)
    elif file.suffix in _SUFFIXES:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"{file}: is empty")
        yield text
    else:
        raise ValueError(
            f"{file}: ending {file.suffix!r} is not supported; use one of {', '.join(_SUFFIXES)}"
        )


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{file}:{number}: expected a JSON object with a "text" field'
                ) from None
            yield text


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        for batch in table.iter_batches(columns=["text"], batch_size=64):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (pyarrow.ArrowException, IndexError, KeyError):
        raise ValueError(f'{file}: not a parquet file with a "text" column') from None
