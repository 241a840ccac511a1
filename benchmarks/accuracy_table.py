"""The results of accuracy.py as Markdown tables, one a grid."""

from __future__ import annotations

import math
import statistics
from typing import Any

Draws = dict[str, dict[str, Any]]  # what was measured, by calibration draw

_HEAD = (
    "| setting | text | perplexity over float, mean (each draw) | KL | log-likelihood lost against "
    "plain, ± 2 standard errors | held-out layer error | seconds |\n|---|---|---|---|---|---|---|"
)


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


def tables(results: dict[str, dict[str, Any]]) -> str:
    """One table a grid, with its name above it."""
    return "\n".join(f"### {grid}\n\n{table(jobs)}" for grid, jobs in results.items())


def table(jobs: dict[str, Any]) -> str:
    """One row a setting and text; `jobs` by "setting:draw"."""
    by_setting: dict[str, Draws] = {}
    for job, facts in jobs.items():
        setting, _, draw = job.rpartition(":")
        by_setting.setdefault(setting, {})[draw] = facts
    lines = [_HEAD]
    for setting, draws in by_setting.items():
        plain = by_setting.get("plain", {})
        for text in next(iter(draws.values()))["texts"]:
            lines.append(_row(setting, text, draws, {} if setting == "plain" else plain))
    return "\n".join(lines) + "\n"


def _row(setting: str, text: str, draws: Draws, plain: Draws) -> str:
    """What a setting loses on a text, beside plain GPTQ on the same draws."""
    scores = [facts["texts"][text] for facts in draws.values()]
    increases = [perplexity_increase(s) for s in scores]
    each = " ".join(f"{x:.1f}" for x in increases)
    kl = statistics.mean(v for s in scores for v in s["kl"])
    shared = [d for d in draws if d in plain]
    against = ""
    if shared:
        both = ([which[d]["texts"][text] for d in shared] for which in (draws, plain))
        against = paired(*both)
    error = statistics.mean(facts["layer_error"] for facts in draws.values())
    seconds = [facts["seconds"] for facts in draws.values() if "seconds" in facts]
    time_s = f"{statistics.mean(seconds):.0f}" if seconds else ""
    return (
        f"| {setting} | {text} | {statistics.mean(increases):+.2f} % ({each}) | {kl:.4f} | "
        f"{against} | {error:.5f} | {time_s} |"
    )
