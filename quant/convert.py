"""Any float checkpoint -> a plain Hugging Face folder, one tensor in memory at a time.

Values are moved as they are, in the dtype they have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import CheckpointReader
from quant.formats import FORMATS
from quant.llama.config import LlamaConfig
from quant.output import whole_folder
from quant.sources import meta, open_checkpoint
from quant.stream_writer import StreamWriter


def convert(source: str | Path, target: str | Path, overwrite: bool = False) -> None:
    """Write the float checkpoint `source` as a Hugging Face folder.

    Args:
        source: anything in quant.sources.
        target: folder to make; it appears whole at the end, or not at all.
        overwrite: replace `target` if it exists.

    Raises:
        ValueError: `source` is quantized, damaged, or no Llama.
        FileExistsError: `target` exists.
    """
    reader = open_float(source)
    with whole_folder(Path(target), overwrite) as folder, torch.inference_mode():
        writer = StreamWriter(folder, len(reader.names()))
        for name in reader.names():
            if not name.endswith("rotary_emb.inv_freq"):  # is computed
                writer.add(name, reader.tensor(name))
            reader.release()  # or the whole checkpoint would stay mapped
        writer.close()
        reader.copy_companions(folder)
        write_json(folder / "config.json", reader.config)


def open_float(source: str | Path) -> CheckpointReader:
    """An opened float checkpoint; ValueError for a quantized one."""
    reader = open_checkpoint(source)
    LlamaConfig.from_dict(reader.config)
    form = next((name for name, form in FORMATS.items() if form.matches(reader)), None)
    if form:
        raise ValueError(
            f"{source}: is quantized ({form}); for another format run: python cli.py export"
        )
    return reader


def verify_source(source: Path) -> list[str]:
    """Compare the files of a Meta release with the checksums in it; returns their names.

    Raises:
        ValueError: a file differs, or the source has no checksums.
    """
    if not meta.matches(source):
        raise ValueError(f"{source}: only Meta's releases come with checksums (checklist.chk)")
    return meta.verify(source)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object the way Hugging Face folders have it."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
