"""Where weights come from, one file each: `matches(path)` and `Reader(path)`.

A Reader offers what `quant.checkpoint.CheckpointReader` describes, with the names, the row order
and the config.json of Hugging Face, whatever the files look like. To add one: copy `llama2c.py`,
add a line here.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from quant.checkpoint import CheckpointReader
from quant.llama.tokenizer import Tokenizer, load_tokenizer
from quant.sources import gguf, huggingface, llama2c, meta

SOURCES: dict[str, ModuleType] = {
    "huggingface": huggingface,
    "meta": meta,
    "llama2c": llama2c,
    "gguf": gguf,
}


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """A reader of whatever lies at `path`.

    Raises:
        ValueError: nothing is there, nothing that is known, or it is damaged.
    """
    path = Path(path)
    for source in SOURCES.values():
        if source.matches(path):
            return source.Reader(path)
    if path.is_file():
        raise ValueError(
            f"{path}: not a checkpoint file of a kind that is known (.gguf, llama2.c .bin); of "
            "others give the folder"
        )
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a folder with config.json and weights")
    raise ValueError(
        f"{path}: holds no checkpoint; there would be config.json and weights, or Meta's "
        "params.json and consolidated.*.pth"
    )


def source_name(path: Path) -> str:
    """Which of SOURCES lies at `path`; "huggingface" where none does."""
    return next((name for name in SOURCES if SOURCES[name].matches(path)), "huggingface")


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that belongs to the weights at `path`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    if huggingface.matches(path):
        return load_tokenizer(path)
    with TemporaryDirectory() as folder:
        open_checkpoint(path).copy_companions(Path(folder))
        try:
            return load_tokenizer(Path(folder))
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(path))) from None
