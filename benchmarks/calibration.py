"""What number, length and kind of calibration windows do: quantize with each, and evaluate.

    python benchmarks/calibration.py --model FOLDER --calib prose=calib.txt code=code.txt \
        --jobs prose:16 prose:128x1024 code:128 --eval prose=a.txt code=b.txt --json results.json

A job takes the first so many windows of its text, of `--seq-len` tokens or of those that it names,
and is judged on windows of `--seq-len`. Results already in the JSON file are kept. The
table gives the increase of perplexity over the float model on each text, twice the standard error
of its logarithm over windows, and the KL divergence.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from accuracy import Reference, options_of, score, windows_of

from quant import load_quantized, quantize_checkpoint
from quant.config import QuantConfig
from quant.llama.tokenizer import load_tokenizer


def run(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fill `results` by "text:windows", and save it after each."""
    tokenizer, reference = load_tokenizer(args.model), Reference(args.model)
    texts = {
        name: windows_of(tokenizer, Path(path), args.seq_len)[: args.windows]
        for name, path in args.eval
    }
    config = QuantConfig(args.bits, args.group_size)
    for job in args.jobs:
        if job in results:
            continue
        name, _, size = job.partition(":")
        count, _, length = size.partition("x")
        text = windows_of(tokenizer, Path(dict(args.calib)[name]), int(length or args.seq_len))
        windows, began = text[: int(count)], time.perf_counter()
        if len(windows) < int(count):
            raise SystemExit(f"{job}: the text holds {len(windows)} windows")
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            folder = Path(scratch) / "out"
            quantize_checkpoint(args.model, folder, windows, config, options_of(args.setting))
            seconds, model = time.perf_counter() - began, load_quantized(folder)[0]
            scores = {text: score(model, reference, ids) for text, ids in texts.items()}
        results[job] = {"seconds": round(seconds, 1), "texts": scores}
        args.json.write_text(json.dumps(results) + "\n", encoding="utf-8")
        print(row(job, results[job]), flush=True)


def row(job: str, result: dict[str, Any]) -> str:
    """One line of the Markdown table."""
    cells = [job.partition(":")[0], job.partition(":")[2]]
    for scores in result["texts"].values():
        pairs = zip(scores["nll"], scores["float_nll"], strict=True)
        difference = [mine - float_ for mine, float_ in pairs]
        error = statistics.stdev(difference) / math.sqrt(len(difference))
        increase = math.expm1(statistics.mean(difference))
        cells.append(f"{100 * increase:+.2f} % ± {200 * error:.2f}")
        cells.append(f"{statistics.mean(scores['kl']):.4f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )

    def named(text: str) -> tuple[str, str]:
        name, _, path = text.partition("=")
        return name, path

    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", nargs="+", type=named, required=True, metavar="NAME=FILE")
    parser.add_argument("--jobs", nargs="+", required=True, metavar="NAME:WINDOWS[xTOKENS]")
    parser.add_argument("--eval", nargs="+", type=named, required=True, metavar="NAME=FILE")
    parser.add_argument("--setting", default="fast")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows of each text")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints, removed after use")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    run(args, results)
    print("| text | windows | " + " | ".join(f"{name} | KL" for name, _ in args.eval) + " |")
    print("|---|---|" + "---|---|" * len(args.eval))
    print("\n".join(row(job, results[job]) for job in args.jobs))


if __name__ == "__main__":
    main()
