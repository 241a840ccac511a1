"""What each setting loses: quantize with each, over calibration draws, and evaluate on texts.

    python benchmarks/accuracy.py --model FOLDER --calib calib.txt --eval wiki=a.txt code=b.txt \
        --settings rtn plain fast balanced --draws 3 --json results.json --markdown table.md

Draw d calibrates on the d-th run of consecutive windows of the calibration text. Models are
compared window by window, so the standard errors are of paired differences. Results already in the
JSON file are kept, not computed again; checkpoints of other tools are added with
`--checkpoint NAME:DRAW=FOLDER`.
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

import torch

from quant import load_quantized, quantize_checkpoint
from quant.config import QuantConfig
from quant.evaluate import _score
from quant.llama.tokenizer import load_tokenizer
from quant.loader import load_model
from quant.report import peak_memory_bytes
from quant.solvers.gptq import EFFORTS, GPTQOptions
from quant.solvers.rtn import RTNOptions

SETTINGS: dict[str, Any] = {
    "rtn": RTNOptions(),
    "plain": GPTQOptions(scales="minmax"),
    "fast": EFFORTS["fast"],
    "balanced": EFFORTS["balanced"],
    "signed": GPTQOptions(scales="signed"),
    "minmax+target": GPTQOptions(scales="minmax", target=0.5),
    "target=1": GPTQOptions(target=1.0),
}


def windows_of(tokenizer: Any, path: Path, length: int) -> torch.Tensor:
    """All whole windows (windows, length) of a text; WikiText's <unk> marks are left out."""
    ids = tokenizer.encode(path.read_text(encoding="utf-8").replace(" <unk> ", " "))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def score(model: Any, reference: Any, windows: torch.Tensor) -> dict[str, list[float]]:
    """Per window: mean negative log-likelihood, the reference's, and KL, in nats a token."""
    with torch.inference_mode():
        batches = [_score(model, reference, batch) for batch in windows.split(4)]
    nll, float_nll, kl, _ = torch.cat(batches, dim=1).mean(-1)
    return {"nll": nll.tolist(), "float_nll": float_nll.tolist(), "kl": kl.tolist()}


def run(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fill `results` by "setting:draw", and save it after each."""
    tokenizer, reference = load_tokenizer(args.model), load_model(args.model)
    texts = {}
    for text in args.eval:
        name, _, path = text.partition("=")
        texts[name] = windows_of(tokenizer, Path(path), args.seq_len)[: args.windows]
    calibration = windows_of(tokenizer, args.calib, args.seq_len)
    config = QuantConfig(args.bits, args.group_size, not args.asym)
    jobs = {f"{name}:{d}": None for d in range(args.draws) for name in args.settings}
    jobs |= dict(item.split("=", 1) for item in args.checkpoint)
    for job, folder in jobs.items():
        if job in results:
            continue
        setting, _, draw = job.rpartition(":")
        facts: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            if folder is None:
                folder, start = str(Path(scratch) / "out"), int(draw) * args.samples
                windows, began = calibration[start : start + args.samples], time.perf_counter()
                quantize_checkpoint(args.model, folder, windows, config, SETTINGS[setting])
                facts = {"seconds": time.perf_counter() - began, "peak": peak_memory_bytes()}
            model = load_quantized(folder)[0]
            facts |= {text: score(model, reference, ids) for text, ids in texts.items()}
        results[job] = facts
        args.json.write_text(json.dumps(results) + "\n", encoding="utf-8")
        increase = [f"{text} {perplexity_increase(facts[text]):+.2f} %" for text in texts]
        print(job, *increase, f"{facts.get('seconds', 0):.0f} s", flush=True)


def perplexity_increase(scores: dict[str, list[float]]) -> float:
    """Percent of perplexity over the float model's."""
    difference = statistics.mean(scores["nll"]) - statistics.mean(scores["float_nll"])
    return 100 * (math.exp(difference) - 1)


def paired(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Mean difference of the log-likelihood and twice its standard error, over all windows."""
    pairs = [
        a - b
        for m, o in zip(mine, other, strict=True)
        for a, b in zip(m["nll"], o["nll"], strict=True)
    ]
    windows = len(mine[0]["nll"])
    per_window = [statistics.mean(pairs[i::windows]) for i in range(windows)]  # over the draws
    error = statistics.stdev(per_window) / math.sqrt(windows) if windows > 1 else math.nan
    return f"{statistics.mean(pairs):+.4f} ± {2 * error:.4f}"


def table(results: dict[str, Any], texts: list[str]) -> str:
    """A Markdown table: one row a setting and text."""
    lines = [
        "| setting | text | draws | perplexity over float | each draw | KL | log-likelihood lost "
        "against plain, ± 2 standard errors | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_setting: dict[str, dict[str, Any]] = {}
    for job, facts in results.items():
        setting, _, draw = job.rpartition(":")
        by_setting.setdefault(setting, {})[draw] = facts
    for setting, draws in by_setting.items():
        plain = by_setting.get("plain", {})
        for text in texts:
            scores = [facts[text] for facts in draws.values()]
            increases = [perplexity_increase(s) for s in scores]
            shared = [d for d in draws if d in plain]
            against = ""
            if shared and setting != "plain":
                against = paired([draws[d][text] for d in shared], [plain[d][text] for d in shared])
            kl = statistics.mean(v for s in scores for v in s["kl"])
            seconds = [facts["seconds"] for facts in draws.values() if "seconds" in facts]
            each = " ".join(f"{x:.1f}" for x in increases)
            time_s = f"{statistics.mean(seconds):.0f}" if seconds else ""
            lines.append(
                f"| {setting} | {text} | {len(draws)} | {statistics.mean(increases):+.2f} % | "
                f"{each} | {kl:.4f} | {against} | {time_s} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument(
        "--settings", nargs="*", choices=SETTINGS, default=["plain", "fast", "balanced"]
    )
    parser.add_argument("--checkpoint", nargs="*", default=[], metavar="NAME:DRAW=FOLDER")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of each text")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    run(args, results)
    text = table(results, [item.partition("=")[0] for item in args.eval])
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
