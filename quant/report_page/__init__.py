"""quantize_report.html: the report of a checkpoint as a page to look at.

One file without scripts, links or anything to load: its style and charts stand in it. Everything
comes from quantize_report.json, so that the page can be made again at any time, as `eval` does when
it has added what it measured. Beside the charts are tables of their numbers.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from quant.durable import write_file
from quant.report import FILE_NAME as REPORT
from quant.report import Report
from quant.report_page.figures import by_kind, codes, cost, errors, mean
from quant.report_page.markup import section, soft, table
from quant.units import duration, size

FILE_NAME = "quantize_report.html"
_STYLE = Path(__file__).parent / "style.css"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, nothing runs
_COMPARED = (  # name, key of quant.evaluate.Comparison, format
    ("float", "perplexity", ".4f"),
    ("quantized / float", "ratio", ".4f"),
    ("difference", "nll_difference", ".5f"),
    ("KL, mean", "kl_mean", ".5f"),
    ("KL, 99th percentile", "kl_99th_percentile", ".5f"),
    ("same first token", "top1_agreement", ".2%"),
)


def write_page(folder: Path) -> Path:
    """Write quantize_report.html into a checkpoint with a report; returns its path.

    Raises:
        ValueError: the folder has no report, or it is not one of ours.
        OSError: the page cannot be written.
    """
    report = Report.read(folder)
    try:
        text = _page(report)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / REPORT}: damaged ({error!r})") from None
    write_file(folder / FILE_NAME, lambda file: _write(file, text))
    return folder / FILE_NAME


def add_evaluation(folder: Path, measured: dict[str, Any]) -> Path | None:
    """Put what `eval` measured into a checkpoint's report, and make its page anew.

    Args:
        folder: the checkpoint.
        measured: `EvalResult.as_dict()`, with data, sha256, bos and precision.

    Returns:
        The page; None where there is no report, as in a float checkpoint.

    Raises:
        ValueError: the report is not one of ours.
        OSError: it cannot be written.
    """
    if not (folder / REPORT).is_file():
        return None
    Report.read(folder).with_evaluation(measured).write(folder)
    return write_page(folder)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _page(report: Report) -> str:
    """The whole page."""
    name = Path(report.output).name
    kinds = by_kind(report.linears)
    body = [
        f"<header>\n<h1>{escape(name)}</h1>\n{soft(_told(report))}\n</header>",
        "<main>",
        _tiles(report),
        _quality(report, name),
        errors(kinds),
        codes(kinds),
        _notes(report),
        cost(report),
        _settings(report),
        "</main>",
    ]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}: quantization report</title>",
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>"]
    return "\n".join([*lines, *filter(None, body), "</body>", "</html>"]) + "\n"


def _told(report: Report) -> str:
    """What was done, in a line."""
    settings = report.settings
    size = settings["group_size"]
    group = "one group per row" if size == -1 else f"groups of {size}"
    kind = "symmetric" if settings["symmetric"] else "asymmetric"
    base = Path(report.model).name
    return f"{base}, {settings['bits']} bits, {group}, {kind}, by {settings['solver']}"


def _tiles(report: Report) -> str:
    """The run in a few numbers."""
    ours = mean([linear.relative_error for linear in report.linears])
    plain = mean([linear.rtn_relative_error for linear in report.linears])
    tiles = [("mean relative error", f"{ours:.3g}", f"round-to-nearest {plain:.3g}")]
    if report.evaluations:
        last = report.evaluations[-1]
        reference = last["reference"]
        beside = f"float {reference['perplexity']:.4g}" if reference else "float not evaluated"
        tiles.append(("perplexity", f"{last['perplexity']:.4g}", beside))
    forecast = report.forecast
    planned = f"forecast {duration(forecast['seconds'])}" if forecast else ""
    tiles.append(("time", duration(report.seconds), planned))
    if report.peak_memory_bytes is not None:
        planned = f"forecast {size(forecast['peak_memory_bytes'])}" if forecast else ""
        tiles.append(("peak memory", size(report.peak_memory_bytes), planned))
    tiles.append(("notes", str(len(report.warnings)), f"on {len(report.linears)} linears"))
    items = "\n".join(
        f"<div><dt>{escape(name)}</dt>"
        f"<dd>{escape(value)} <small>{escape(beside)}</small></dd></div>"
        for name, value, beside in tiles
    )
    return f'<dl class="tiles">\n{items}\n</dl>'


def _quality(report: Report, name: str) -> str:
    """What `eval` measured."""
    if not report.evaluations:
        command = f"<code>{escape(f'python cli.py eval --ppl --model {name}')}</code>"
        return section("Quality", f"<p>Not evaluated yet; {command} adds it here.</p>")
    intro = soft(
        "Perplexity by the GPTQ paper's protocol. Against the float model: the difference of the "
        "mean log-likelihood with its standard error over windows, KL in nats a token, and how "
        "often both put the same token first."
    )
    columns = [_measured(measured) for measured in report.evaluations]
    texts = [f"{Path(str(one['data'])).name}, {one['precision']}" for one in report.evaluations]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return section("Quality", intro + table(("", *texts), rows))


def _measured(measured: dict[str, Any]) -> dict[str, str]:
    """The numbers of one evaluation by name."""
    reference = measured["reference"]
    cells = {
        "windows": f"{measured['windows']} of {measured['window']} tokens",
        "perplexity": f"{measured['perplexity']:.4f}",
    }
    for name, key, form in _COMPARED:
        cells[name] = format(reference[key], form) if reference else "not evaluated"
    if reference:
        cells["difference"] += f" ± {reference['nll_difference_standard_error']:.5f}"
    return cells


def _notes(report: Report) -> str:
    """Damping that had to be raised, dead inputs, linears that lost to round-to-nearest."""
    rows = [
        (linear.name, line.removeprefix(f"{linear.name}: "), f"{linear.damp:g}")
        for linear in report.linears
        for line in linear.warnings
    ]
    if not rows:
        damp = report.settings.get("damp")
        asked = (
            "" if damp is None else f" Every Hessian was factored with the damping asked, {damp:g}."
        )
        return section("Notes", f"<p>Nothing to note.{escape(asked)}</p>")
    return section("Notes", table(("linear", "note", "damping used"), rows, words=True))


def _settings(report: Report) -> str:
    """Settings, data and versions."""
    facts = {"base model": Path(report.model).name, **report.settings}
    modules = facts.pop("modules", {})
    facts |= {name: f"{o['bits']} bits, groups of {o['group_size']}" for name, o in modules.items()}
    facts |= {f"calibration: {key}": value for key, value in report.calibration.items()}
    facts |= {f"version of {key}": value for key, value in report.versions.items()}
    rows = [(_label(key), _word(value)) for key, value in facts.items()]
    return section("Settings", table(("setting", "value"), rows, words=True))


def _label(key: str) -> str:
    """A setting's name; that of a linear stays as it is."""
    return key if "." in key or key == "lm_head" else key.replace("_", " ")


def _word(value: Any) -> str:
    """A setting as a reader says it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
