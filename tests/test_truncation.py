"""pytest tests/test_truncation.py: a file cut at any border of a section is refused in one line.

The borders are found by other code than the readers': zipfile, the gguf package, sums of sizes.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BUNDLED, random_state
from meta_release import write_meta
from mutations import ends_well
from safetensors.torch import save_file
from test_fuzz import SMALL

from quant.loader import load_model
from quant.sources import open_tokenizer

CONFIG = {**SMALL, "vocab_size": 2048}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The smallest model with the bundled vocabulary, in one file."""
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(random_state(CONFIG), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / file, folder / file)
    return folder


def all_refused(file: Path, borders: set[int], read: Callable[[], Any]) -> None:
    """Cut the file at each border, and one byte before and behind it."""
    data = file.read_bytes()
    assert ends_well(read)
    sizes = {border + step for border in borders | {0} for step in (-1, 0, 1)}
    sizes = {size for size in sizes if 0 <= size < len(data)} | {len(data) - 1}
    assert len(sizes) > len(borders)
    for size in sorted(sizes):
        file.unlink()  # it may still be mapped
        file.write_bytes(data[:size])
        assert not ends_well(read), size


def test_safetensors(model: Path) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    ends = {start + entry["data_offsets"][1] for entry in entries.values() if "dtype" in entry}
    all_refused(file, {8, start, *ends}, lambda: load_model(model, "cpu"))


def test_meta(model: Path, tmp_path: Path) -> None:
    folder = write_meta(model, tmp_path / "meta" / "7b", 1)
    file = folder / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        borders = {member.header_offset for member in members} | {archive.start_dir}
        borders |= {member.header_offset + member.file_size for member in members}
    all_refused(file, borders, lambda: load_model(folder, "cpu"))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c(model: Path, tmp_path: Path, version: int) -> None:
    from llama2c_files import write

    file, border = tmp_path / "m.bin", 28 if version == 0 else 256
    write(model, CONFIG, version, file, group=32)
    borders = {4, 8, 28, 36, 37, 41, border}
    for tensor in random_state(CONFIG).values():  # not in the order of the file, but as many
        codes = version == 2 and tensor.dim() == 2
        count = math.prod(tensor.shape)
        border += count + count // 32 * 4 if codes else 4 * count
        borders.add(border)
    all_refused(file, borders, lambda: load_model(file, "cpu"))


def test_gguf(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_files import write

    file = tmp_path / "m.gguf"
    write(model, file, gguf.GGMLQuantizationType.Q8_0)
    reader = gguf.GGUFReader(file)
    borders = {4, 8, 16, 24, int(reader.data_offset)}
    borders |= {int(field.offset) for field in reader.fields.values()}
    borders |= {int(tensor.field.offset) for tensor in reader.tensors}
    borders |= {int(tensor.data_offset) for tensor in reader.tensors}
    del reader
    all_refused(file, borders, lambda: load_model(file, "cpu"))


def test_tokenizer_bin(model: Path, tmp_path: Path) -> None:
    """At every token."""
    from llama2c_files import write, write_vocabulary

    write(model, CONFIG, 1, tmp_path / "m.bin")
    file, place = tmp_path / "tokenizer.bin", 4
    write_vocabulary(BUNDLED / "tokenizer.model", file)
    data, borders = file.read_bytes(), {4}
    while place < len(data):
        place += 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        borders.add(place)
    assert len(borders) > 2000
    all_refused(file, set(sorted(borders)[::20]), lambda: open_tokenizer(tmp_path / "m.bin"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_small_files(model: Path, name: str) -> None:
    file = model / name
    size = file.stat().st_size
    places = set(range(1, size - 1, max(1, size // 40)))

    def read() -> None:
        load_model(model, "cpu")
        open_tokenizer(model).encode("a text")

    all_refused(file, places, read)
