"""The parts of the report page that are charts: errors, codes and scales, time and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from quant.code_counts import BINS_PER_OCTAVE, CodeCounts
from quant.report import LinearReport, Report
from quant.report_page.charts import Axis, Series, bar_chart, legend, line_chart, pair_chart
from quant.report_page.markup import figures, folded, section, soft, table
from quant.units import duration, size

Kinds = dict[str, list[tuple[str, LinearReport]]]  # of each kind of linear, (layer, report)
OURS, PLAIN = "this checkpoint", "round-to-nearest"


def by_kind(linears: Iterable[LinearReport]) -> Kinds:
    """Linears by their place within a layer, as q_proj; the layer of one outside is ""."""
    kinds: Kinds = {}
    for linear in linears:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", linear.name)
        layer, kind = found.groups() if found else ("", linear.name)
        kinds.setdefault(kind.rpartition(".")[2], []).append((layer, linear))
    return kinds


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / max(1, len(values))


def errors(kinds: Kinds) -> str:
    """Error by kind of linear, and by layer for each kind; round-to-nearest beside it."""
    ours = [mean([linear.relative_error for _, linear in pairs]) for pairs in kinds.values()]
    plain = [mean([linear.rtn_relative_error for _, linear in pairs]) for pairs in kinds.values()]
    told = "; ".join(
        f"{kind} {a:.3g}, {PLAIN} {b:.3g}" for kind, a, b in zip(kinds, ours, plain, strict=True)
    )
    label = f"Mean relative error by kind of linear: {told}"
    pair = Series(OURS, ours), Series(PLAIN, plain, "plain")
    axis = Axis.logarithmic([*ours, *plain])
    charts = [("every kind, mean over layers", pair_chart(label, list(kinds), *pair, axis))]
    axis = Axis.logarithmic(
        [
            error
            for pairs in kinds.values()
            for _, linear in pairs
            for error in (linear.relative_error, linear.rtn_relative_error)
        ]
    )
    charts += [(kind, _by_layer(kind, pairs, axis)) for kind, pairs in kinds.items() if pairs[0][0]]
    intro = soft(
        "The share of a linear's output energy that is lost on the calibration data, "
        "tr(E H Eᵀ) / tr(W H Wᵀ). The axes are logarithmic; by layer they are all the same."
    ) + legend([("ours", OURS), ("plain", PLAIN)])
    return section(
        "Error by layer and kind of linear", intro + figures(charts) + _error_table(kinds)
    )


def _by_layer(kind: str, pairs: list[tuple[str, LinearReport]], axis: Axis) -> str:
    """Lines over the layers for one kind of linear."""
    ours = [linear.relative_error for _, linear in pairs]
    plain = [linear.rtn_relative_error for _, linear in pairs]
    label = (
        f"Relative error of {kind} by layer: mean {mean(ours):.3g}, largest {max(ours):.3g}; "
        f"{PLAIN} mean {mean(plain):.3g}, largest {max(plain):.3g}; all in the table below"
    )
    series = Series(PLAIN, plain, "plain"), Series(OURS, ours)
    return line_chart(label, [layer for layer, _ in pairs], series, axis, "layer")


def _error_table(kinds: Kinds) -> str:
    """Every linear, in the order of the model."""
    linears = sorted(
        (int(layer or 1 << 30), i, linear)
        for i, pairs in enumerate(kinds.values())
        for layer, linear in pairs
    )
    rows = [
        (
            linear.name.removeprefix("model.layers."),
            f"{linear.relative_error:.3e}",
            f"{linear.rtn_relative_error:.3e}",
            _times(linear),
            f"{linear.damp:g}",
            str(linear.tokens),
        )
        for _, _, linear in linears
    ]
    names = ("layer and linear", "relative error", PLAIN, "times better", "damping", "tokens")
    return folded(f"All {len(rows)} linears as a table", table(names, rows))


def _times(linear: LinearReport) -> str:
    """How many times less is lost than by round-to-nearest."""
    if not linear.relative_error:
        return "no loss"
    return f"{linear.rtn_relative_error / linear.relative_error:.2f}"


def codes(kinds: Kinds) -> str:
    """Histograms of codes and scales; nothing where they were not counted."""
    counts = {}
    for kind, pairs in kinds.items():
        if parts := [linear.counts for _, linear in pairs if linear.counts]:
            counts[kind] = CodeCounts.total(parts)
    if not counts:
        return ""
    whole = CodeCounts.total(counts.values())
    used = _shares(whole.codes)
    charts = [
        _histogram("codes", used, [str(code) for code in range(len(used))], "code"),
        _scales_chart(whole),
    ]
    names = ("linear", "entropy, bits", "lowest code", "highest code")
    rows = [
        (
            kind,
            f"{_information(one.codes):.2f}",
            f"{_shares(one.codes)[0]:.2%}",
            f"{_shares(one.codes)[-1]:.2%}",
            f"2^{_power(one.first)} to 2^{_power(one.first + len(one.scales))}",
            str(one.negative_scales),
        )
        for kind, one in counts.items()
    ]
    tables = table((*names, "scales", "scales below zero"), rows)
    return section(
        "Codes and scales", figures(charts) + folded("By kind of linear as a table", tables)
    )


def _scales_chart(counts: CodeCounts) -> tuple[str, str]:
    """The histogram of scales, marked at whole powers of 2."""
    bins = range(counts.first, counts.first + len(counts.scales))
    octaves = next(step for step in (1, 2, 4, 8) if len(bins) <= 9 * step * BINS_PER_OCTAVE)
    shown = [_power(bin_) if bin_ % (octaves * BINS_PER_OCTAVE) == 0 else "" for bin_ in bins]
    names = [_power(bin_) for bin_ in bins]
    return _histogram("scales by size", _shares(counts.scales), names, "size, power of 2", shown)


def _histogram(
    title: str, shares: list[float], names: list[str], x: str, shown: Sequence[str] = ()
) -> tuple[str, str]:
    """Title and chart of shares that add up to 1."""
    most = max(range(len(shares)), key=shares.__getitem__)
    label = f"Histogram of {title}: from {names[0]} to {names[-1]}, most often {names[most]} "
    label += f"with {shares[most]:.1%}"
    axis = Axis.linear(shares, "{:.0%}".format)
    return title, bar_chart(label, names, shares, axis, x, shown)


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / max(1, sum(counts)) for count in counts]


def _information(counts: Sequence[int]) -> float:
    """The entropy of a histogram in bits."""
    return -sum(share * math.log2(share) for share in _shares(counts) if share)


def _power(bin_: int) -> str:
    """The power of 2 at which a bin of scales begins."""
    return f"{bin_ / BINS_PER_OCTAVE:g}"


def cost(report: Report) -> str:
    """Time and memory: layer by layer, and in all beside the forecast."""
    forecast = report.forecast or {}
    memory = report.peak_memory_bytes
    rows = [
        ("time", _or_none(forecast.get("seconds"), duration), duration(report.seconds)),
        ("peak memory", _or_none(forecast.get("peak_memory_bytes"), size), _or_none(memory, size)),
    ]
    content = table(("", "forecast", "measured"), rows)
    if report.layers:
        content = figures(_over_the_run(report)) + content + _layer_table(report)
        if forecast:
            content = legend([("ours", "measured"), ("limit", "forecast")]) + content
    if sum(layer["seconds"] for layer in report.layers) > report.seconds:
        content = content + soft(
            "The run was continued: the total is of its last part, the layers finished earlier "
            "are as they were measured then."
        )
    return section("Time and memory", content)


def _over_the_run(report: Report) -> list[tuple[str, str]]:
    """A chart of time and one of memory over the layers."""
    names = [layer["name"] for layer in report.layers]
    times = [layer["seconds"] for layer in report.layers]
    label = f"Seconds by layer: {sum(times):.3g} in all, {max(times):.3g} at most"
    axis = Axis.linear(times, lambda value: f"{value:g} s")
    charts = [("time of each layer", bar_chart(label, names, times, axis, "layer"))]
    peaks = [layer["peak_memory_bytes"] for layer in report.layers]
    if None in peaks:
        return charts
    limit = (report.forecast or {}).get("peak_memory_bytes", 0)
    label = f"Peak memory until the end of each layer: {size(peaks[0])} after the first, "
    label += f"{size(peaks[-1])} after the last" + (f", forecast {size(limit)}" if limit else "")
    axis = Axis.linear([*peaks, limit], size)
    lines = [Series("peak", peaks)]
    if limit:
        lines.append(Series("forecast", [limit] * len(peaks), "limit"))
    charts.append(("peak memory so far", line_chart(label, names, lines, axis, "layer")))
    return charts


def _layer_table(report: Report) -> str:
    rows = [
        (layer["name"], f"{layer['seconds']:.2f}", _or_none(layer["peak_memory_bytes"], size))
        for layer in report.layers
    ]
    return folded("Each layer as a table", table(("layer", "seconds", "peak memory so far"), rows))


def _or_none(value: float | None, show: object) -> str:
    return "unknown" if value is None else show(value)  # type: ignore[operator]
