"""What each setting loses: quantize with each, over calibration draws, and evaluate on texts.

    python benchmarks/accuracy.py --model FOLDER --calib calib.txt --eval wiki=a.txt code=b.txt \
        --settings rtn plain fast balanced plain+sweeps=2 --draws 3 --json results.json

A setting is "rtn", "plain" (published GPTQ), "weighted" (with searched scales), or an effort, with
fields of GPTQOptions changed after a "+". Draw d calibrates on the d-th run of consecutive windows
of the calibration text. Models are compared window by window, so the standard errors are of paired
differences. Results already in the JSON file are kept, not computed again; checkpoints of other
tools are added with `--checkpoint NAME:DRAW=FOLDER`.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accuracy_table import perplexity_increase, tables
from held_out import float_hessians, layer_error

from quant import quantize_checkpoint
from quant.config import QuantConfig
from quant.evaluate import _score
from quant.llama.tokenizer import load_tokenizer
from quant.loader import load_model
from quant.machine import peak_memory_bytes
from quant.solvers.gptq_options import EFFORTS, GPTQOptions
from quant.solvers.rtn import RTNOptions

_JUDGED = 16  # windows of the first text that judge the linears one by one
BASES: dict[str, Any] = {
    "rtn": RTNOptions(),
    "plain": GPTQOptions(scales="minmax"),
    "weighted": GPTQOptions(),
    **EFFORTS,
}


def options_of(setting: str) -> Any:
    """The solver's options that a setting like "fast+sweeps=2+target=0.5" means."""
    base, *changes = setting.split("+")
    kinds = {field.name: type(field.default) for field in fields(GPTQOptions)}
    pairs = [change.split("=") for change in changes]
    return replace(BASES[base], **{name: _value(kinds[name], text) for name, text in pairs})


def _value(kind: type, text: str) -> Any:
    return kind(int(text)) if kind is bool else kind(text)


class Reference:
    """The float model, whose last hidden states are computed once for each batch."""

    def __init__(self, folder: Path) -> None:
        loaded = load_model(folder)
        self.lm_head, self._decoder = loaded.lm_head, loaded.model
        self._states: dict[bytes, torch.Tensor] = {}

    def model(self, batch: torch.Tensor) -> torch.Tensor:
        key = batch.numpy().tobytes()
        if key not in self._states:
            self._states[key] = self._decoder(batch)
        return self._states[key]


def windows_of(tokenizer: Any, path: Path, length: int) -> torch.Tensor:
    """All whole windows (windows, length) of a text; WikiText's <unk> marks are left out."""
    ids = tokenizer.encode(path.read_text(encoding="utf-8").replace(" <unk> ", " "))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def score(model: Any, reference: Any, windows: torch.Tensor) -> dict[str, list[float]]:
    """Per window: mean negative log-likelihood, the reference's, and KL, in nats a token."""
    with torch.inference_mode():
        batches = [_score(model, reference, batch) for batch in windows.split(4)]
    rows = torch.cat(batches, dim=1).mean(-1).tolist()
    names = ("nll", "float_nll", "kl")
    return {name: [round(x, 5) for x in row] for name, row in zip(names, rows, strict=False)}


def run(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fill `results` by "setting:draw", and save it after each."""
    tokenizer, reference = load_tokenizer(args.model), Reference(args.model)
    named = [item.partition("=")[::2] for item in args.eval]
    texts = {name: windows_of(tokenizer, Path(path), args.seq_len) for name, path in named}
    calibration = windows_of(tokenizer, args.calib, args.seq_len)
    judged_on = next(iter(texts.values()))[-_JUDGED:]
    judged = functools.cache(lambda rotate: float_hessians(args.model, judged_on, rotate))
    config = QuantConfig(args.bits, args.group_size, not args.asym)
    done = results.setdefault(grid_name(args), {})
    jobs = {f"{name}:{d}": None for d in range(args.draws) for name in args.settings}
    jobs |= dict(item.split("=", 1) for item in args.checkpoint)
    for job, folder in jobs.items():
        if job in done:
            continue
        setting, _, draw = job.rpartition(":")
        facts: dict[str, Any] = {}
        options = GPTQOptions() if folder else options_of(setting)
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            if folder is None:
                folder, start = str(Path(scratch) / "out"), int(draw) * args.samples
                windows, began = calibration[start : start + args.samples], time.perf_counter()
                quantize_checkpoint(args.model, folder, windows, config, options)
                seconds = round(time.perf_counter() - began, 1)
                facts = {"seconds": seconds, "peak": peak_memory_bytes()}
            moved = getattr(options, "equalize", 0) > 0
            error = layer_error(Path(folder), judged(getattr(options, "rotate", False)), moved)
            facts["layer_error"] = float(f"{error:.4g}")
            model = load_model(folder)
            facts["texts"] = {
                text: score(model, reference, ids[: args.windows]) for text, ids in texts.items()
            }
        done[job] = facts
        args.json.write_text(json.dumps(results) + "\n", encoding="utf-8")
        increase = [f"{t} {perplexity_increase(facts['texts'][t]):+.2f} %" for t in texts]
        print(job, *increase, facts["layer_error"], f"{facts.get('seconds', 0):.0f} s", flush=True)


def grid_name(args: argparse.Namespace) -> str:
    """What all results of one table have in common."""
    group = "row" if args.group_size == -1 else f"g{args.group_size}"
    kind = "asym" if args.asym else "sym"
    tokens = f"{args.samples} x {args.seq_len}"
    return f"{args.model.name}, W{args.bits} {group} {kind}, {tokens} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--settings", nargs="*", default=["plain", "fast", "balanced"])
    parser.add_argument("--checkpoint", nargs="*", default=[], metavar="NAME:DRAW=FOLDER")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of each text")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints, removed after use")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    run(args, results)
    text = tables(results)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
