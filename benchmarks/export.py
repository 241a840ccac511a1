"""python benchmarks/export.py [--layers 2 ...] [--to FORMAT ...]: memory and speed of export.

Makes a random 4-bit checkpoint of the geometry of Llama 2 7B, copies it for the speed of the disk,
and exports it in a process of its own per format. Speed is of the larger of what is read and what
is written; everything is on the disk (fsync) when the clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from quant.config import QuantConfig
from quant.export import TARGETS, export
from quant.formats import autogptq
from quant.geometry import linear_shapes
from quant.grid import Grid, QuantizedTensor
from quant.llama.config import LlamaConfig
from quant.machine import peak_memory_bytes

BUNDLED = Path(__file__).parents[1] / "quant" / "bundled"
GEOMETRY = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint; returns its bytes."""
    folder.mkdir()
    config = {**GEOMETRY, "num_hidden_layers": layers}
    writer = autogptq.Writer(folder, QuantConfig(4, 128), {})
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        writer.add_plain(name, torch.randn(32000, 4096).half())
    writer.add_plain("model.norm.weight", torch.ones(4096).half())
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.add_plain(f"{prefix}{name}.weight", torch.ones(4096).half())
        for name, (out, width) in linear_shapes(LlamaConfig.from_dict(config)).items():
            codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
            grid = Grid(torch.rand(out, width // 128).half().float(), _zeros(out, width), 4)
            writer.add_quantized(prefix + name, QuantizedTensor(codes, grid))
        writer.flush()
    writer.close(config)
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    return size_of(folder)


def _zeros(out: int, width: int) -> torch.Tensor:
    return torch.full((out, width // 128), 8, dtype=torch.uint8)


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    return sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size


def copy_seconds(folder: Path, target: Path) -> float:
    """Time of a plain copy."""
    start = time.perf_counter()
    shutil.copytree(folder, target)
    for file in target.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - start


def one(source: Path, target: Path, to: str) -> None:
    """Export, and print seconds and peak memory."""
    export(source, target, to)  # imports, and pages of the source that are in memory already
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    seconds = export(source, target, to).seconds
    print(json.dumps({"seconds": seconds, "peak_mb": (peak_memory_bytes() or 0) / 1e6}))


def main() -> None:
    """Run the benchmark, or one export of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, action="append")
    parser.add_argument("--to", choices=TARGETS, action="append")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(Path(args.one[0]), Path(args.one[1]), args.one[2])
    for layers in args.layers or [2, 6]:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            source, target = Path(scratch) / "source", Path(scratch) / "target"
            size = make(source, layers)
            speed = size / copy_seconds(source, target) / 1e9
            shutil.rmtree(target)
            print(f"{layers} layers, {size / 1e9:.2f} GB; copy {speed:.2f} GB/s", flush=True)
            for to in args.to or TARGETS:
                command = [sys.executable, __file__, "--one", source, target, to]
                told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                moved = max(size, size_of(target)) / 1e9 / told["seconds"]
                print(
                    f"  {to:20}{told['seconds']:6.1f} s {moved:6.2f} GB/s "
                    f"{moved / speed:6.2f} of a copy, peak {told['peak_mb']:.0f} MB",
                    flush=True,
                )
                shutil.rmtree(target) if target.is_dir() else target.unlink()


if __name__ == "__main__":
    main()
