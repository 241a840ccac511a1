"""A checkpoint -> another format, tensor by tensor: one is made while the one before is written.

Codes, scales and zeros move as integers and float16 numbers and are never rounded again: where the
target holds the grid the export is exact, where it does not the writer refuses, or says what it
rounded. What is read comes from FORMATS, or is a float checkpoint; what can be written is TARGETS.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import CheckpointReader, coarse_linear, llama_config
from quant.config import QuantConfig
from quant.formats import FORMATS, autogptq, compressed_tensors, float_folder, gguf
from quant.formats.gguf_vocabulary import vocabulary
from quant.grid import QuantizedTensor
from quant.layer_reader import check_headers
from quant.llama.config import LlamaConfig
from quant.output import refuse_overlap, whole_file, whole_folder
from quant.report import FILE_NAME as REPORT
from quant.sources import open_checkpoint
from quant.stream_writer import StreamWriter


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its reader, geometry, format (None for float) and stored grid."""

    reader: CheckpointReader
    llama: LlamaConfig
    form: ModuleType | None
    config: QuantConfig | None

    @classmethod
    def open(cls, path: Path) -> Source:
        """Open a float or quantized checkpoint.

        Raises:
            ValueError: not a Llama checkpoint, or damaged.
        """
        reader = open_checkpoint(path)
        form = next((form for form in FORMATS.values() if form.matches(reader)), None)
        config = form.quant_config(reader) if form else None
        llama = llama_config(reader)
        if form is None:
            check_headers(reader, llama)
        return cls(reader, llama, form, config)

    @property
    def name(self) -> str:
        """What to call the model: the name of its folder or file."""
        return self.reader.path.resolve().stem

    def entries(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Every tensor by name, quantized ones by their module; the file is closed after each, or
        the whole checkpoint would stay mapped.
        """
        reader = self.reader
        plain = ((name, reader.tensor(name)) for name in reader.names())
        skipped = {"lm_head.weight"} if self.llama.tie_word_embeddings else set()
        for name, value in self.form.read(reader) if self.form else plain:
            if name in skipped or name.endswith("rotary_emb.inv_freq"):  # repeats, or is computed
                continue
            yield name, value
            reader.release()

    def grid(self, target: str) -> QuantConfig:
        """The stored grid.

        Raises:
            ValueError: the checkpoint is a float one, or one whose blocks are not moved as codes.
        """
        if coarse := coarse_linear(self.reader):
            raise ValueError(
                f"{self.reader.path}: codes are not moved from its blocks ({coarse}) to {target}; "
                "export to float16, or quantize the float checkpoint it was made from"
            )
        if self.config is None:
            raise ValueError(
                f"{self.reader.path}: is not quantized, so there are no codes to move to {target}; "
                "run: python cli.py quantize"
            )
        return self.config

    def stream(self, folder: Path) -> StreamWriter:
        """Shards in `folder`, with room for the names of at most five tensors per linear."""
        return StreamWriter(folder, 50 * self.llama.num_hidden_layers + 4)

    def settings(self) -> dict[str, Any]:
        """The solver's settings, where the report of the run is still there."""
        try:
            return json.loads((self.reader.path / REPORT).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}


MakeWriter = Callable[[Source, Path, str], Any]  # source, what to make, type of gguf's head


@dataclass(frozen=True)
class Exported:
    """What an export did: bytes written, seconds, and a line on each thing that was not exact."""

    size_bytes: int
    seconds: float
    notes: tuple[str, ...]


def export(
    source: str | Path, target: str | Path, to: str, overwrite: bool = False, head: str = "f16"
) -> Exported:
    """Write the checkpoint `source` as `target` in another format.

    Args:
        source: folder of a quantized or float checkpoint.
        target: folder to make, or file for gguf; it appears whole at the end, or not at all.
        to: one of TARGETS.
        overwrite: replace `target` if it exists.
        head: type of embedding and head in gguf, "f16" or "q8_0".

    Raises:
        ValueError: the target cannot hold the grid of a tensor, which is named; no such target, or
            a file for gguf not called so; or `source` is damaged.
        FileExistsError: `target` exists and is not to be, or cannot be, replaced.
    """
    _check(to, head, Path(target))
    refuse_overlap(source, target)
    start, opened = time.perf_counter(), Source.open(Path(source))
    whole = whole_file if to == "gguf" else whole_folder
    with whole(Path(target), overwrite) as place, torch.inference_mode():
        writer = TARGETS[to](opened, place, head)
        try:
            for name, value in opened.entries():
                if isinstance(value, QuantizedTensor):
                    writer.add_quantized(name, value)
                else:
                    writer.add_plain(name, value)
        finally:
            writer.flush()
        writer.close(opened.reader.config)
        if place.is_dir():
            _copy_companions(opened.reader, place)
        files = place.iterdir() if place.is_dir() else [place]
        size_bytes = sum(file.stat().st_size for file in files)
    notes = tuple(writer.notes()) if hasattr(writer, "notes") else ()
    return Exported(size_bytes, time.perf_counter() - start, notes)


def _check(to: str, head: str, target: Path) -> None:
    """Refuse what no writer can make."""
    if to not in TARGETS:
        raise ValueError(f"cannot export to {to!r}; there are {', '.join(TARGETS)}")
    if head != "f16" and to != "gguf":
        raise ValueError(f"--head {head} is for gguf; {to} keeps embedding and head as they are")
    if to == "gguf" and target.suffix != ".gguf":
        raise ValueError(f"{target}: no reader takes it for gguf; give a name that ends in .gguf")


def _copy_companions(reader: CheckpointReader, folder: Path) -> None:
    """The tokenizer's files, and the report, which names the float model for `eval`."""
    reader.copy_companions(folder)
    if (reader.path / REPORT).is_file():
        shutil.copyfile(reader.path / REPORT, folder / REPORT)


def _gptq(version: int) -> MakeWriter:
    """A writer of that version of the GPTQ format."""
    name = "autogptq" if version == 1 else "gptq_v2"

    def make(source: Source, folder: Path, head: str) -> autogptq.Writer:
        config = source.grid(name)
        return autogptq.Writer(folder, config, source.settings(), source.stream(folder), version)

    return make


def _compressed_tensors(source: Source, folder: Path, head: str) -> compressed_tensors.Writer:
    config = source.grid("compressed-tensors")
    return compressed_tensors.Writer(folder, config, source.settings(), source.stream(folder))


def _gguf(source: Source, file: Path, head: str) -> gguf.Writer:
    with TemporaryDirectory() as folder:  # where every source puts its tokenizer the same way
        source.reader.copy_companions(Path(folder))
        try:
            keys = vocabulary(Path(folder), source.llama.vocab_size)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(source.reader.path))) from None
    return gguf.Writer(file, source.llama, {"general.name": source.name, **keys}, head)


def _float(dtype: torch.dtype) -> MakeWriter:
    """A writer of plain Llama folders in that dtype."""
    return lambda source, folder, head: float_folder.Writer(folder, dtype, source.stream(folder))


TARGETS: dict[str, MakeWriter] = {
    "autogptq": _gptq(1),
    "gptq_v2": _gptq(2),
    "compressed-tensors": _compressed_tensors,
    "gguf": _gguf,
    "float16": _float(torch.float16),
    "bfloat16": _float(torch.bfloat16),
    "float32": _float(torch.float32),
}
