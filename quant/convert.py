"""Any float checkpoint -> a plain Hugging Face folder, two tensors in memory at a time.

Values are moved as they are, in the dtype they have. On the way tokens can be added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from quant.added_tokens import NewTokens, add_to_tokenizer, grow
from quant.checkpoint import CheckpointReader, llama_config, read_json
from quant.formats import FORMATS
from quant.layer_reader import check_headers
from quant.output import refuse_overlap, whole_folder
from quant.sources import meta, open_checkpoint
from quant.stream_writer import StreamWriter


def convert(
    source: str | Path,
    target: str | Path,
    overwrite: bool = False,
    new: NewTokens = NewTokens(),  # noqa: B008 - frozen
) -> None:
    """Write the float checkpoint `source` as a Hugging Face folder.

    Args:
        source: anything in quant.sources.
        target: folder to make; it appears whole at the end, or not at all.
        overwrite: replace `target` if it exists.
        new: tokens to add; embedding and head grow by a row for each.

    Raises:
        ValueError: `source` is quantized, damaged, or no Llama; or a token cannot be added.
        FileExistsError: `target` exists and is not to be, or cannot be, replaced.
    """
    reader = open_float(source)
    refuse_overlap(source, target)
    with whole_folder(Path(target), overwrite) as folder, torch.inference_mode():
        reader.copy_companions(folder)
        config = _with_tokens(folder, reader.config, new)
        writer = StreamWriter(folder, len(reader.names()))
        try:
            for name in reader.names():
                tensor = reader.tensor(name)
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    tensor = grow(tensor, config["vocab_size"], new.rows)
                if not name.endswith("rotary_emb.inv_freq"):  # is computed
                    writer.add(name, tensor)
                reader.release()  # or the whole checkpoint would stay mapped
        finally:
            writer.flush()
        writer.close()
        write_json(folder / "config.json", config)


def _with_tokens(folder: Path, config: dict[str, Any], new: NewTokens) -> dict[str, Any]:
    """config.json with the new tokens, after adding them to the tokenizer files of the folder."""
    if not new.tokens and new.pad is None:
        return config
    ids, pad_id = add_to_tokenizer(folder, new)
    rows = max([config["vocab_size"], *(index + 1 for index in ids.values())])
    config = {**config, "vocab_size": rows}
    if pad_id is not None:
        config["pad_token_id"] = pad_id
        file = folder / "generation_config.json"
        generation = read_json(file) if file.is_file() else {}
        write_json(file, {**generation, "pad_token_id": pad_id})
    return config


def open_float(source: str | Path) -> CheckpointReader:
    """An opened float checkpoint; ValueError for a quantized one."""
    reader = open_checkpoint(source)
    llama = llama_config(reader)
    form = next((name for name, form in FORMATS.items() if form.matches(reader)), None)
    if form:
        raise ValueError(
            f"{source}: is quantized ({form}); for another format run: python cli.py export"
        )
    check_headers(reader, llama)
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
