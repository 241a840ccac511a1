"""The few pieces of HTML that the report page is made of; text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def section(title: str, content: str) -> str:
    """A headed part of the page; `content` is HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def table(names: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """A table that scrolls where it is wider than the page; the first cell names its row.

    Args:
        names: of the columns.
        rows: cells as text.
        words: cells are text to read, not numbers to compare.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    kind = ' class="words"' if words else ""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="table: {escape(names[0])}">'
        f"<table{kind}><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """HTML that is shown when asked for."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def figures(charts: Iterable[tuple[str, str]]) -> str:
    """Charts beside each other where there is room: (title, SVG) pairs."""
    items = "".join(f"<figure><h3>{escape(title)}</h3>{svg}</figure>\n" for title, svg in charts)
    return f'<div class="charts">\n{items}</div>'


def soft(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="soft">{escape(text)}</p>'
