"""What all pages share: one document that loads nothing, its sections and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from flatmount.report.style import style_sheet

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Cell = str
Row = Sequence[Cell]


def document(title: str, series: tuple[str, ...], sections: Iterable[str]) -> str:
    """The whole HTML document. `series` are the names that have colours, in the order of their `style_of` index."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{style_sheet(series)}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in sections if part)
        + "\n</body>\n</html>\n"
    )


def header(kicker: str, title: str, outcome: str) -> str:
    """The head of a page: where and when in small print, what it is, and what it says in one sentence."""
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="outcome">{escape(outcome)}</p></header>'
    )


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """The few figures that a reader takes along, each with what it is; nothing for none."""
    drawn = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in shown)
    return f'<div class="tiles">{drawn}</div>' if drawn else ""


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Which line is whose: classes of the style sheet with their names."""
    drawn = "".join(
        f'<li class="{style}"><svg viewBox="0 0 30 10" aria-hidden="true"><path class="line" d="M0 5H30"/></svg>'
        f"{escape(name)}</li>"
        for style, name in entries
    )
    return f'<ul class="legend">{drawn}</ul>'


def facts(lists: Mapping[str, Iterable[tuple[str, str]]]) -> str:
    """Lists of names with values, side by side where there is room."""
    drawn = "".join(
        f"<div><h2>{escape(head)}</h2><dl>"
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries)
        + "</dl></div>"
        for head, entries in lists.items()
    )
    return f'<section class="facts">{drawn}</section>'


def section(head: str, text: str, body: str) -> str:
    """A part of a page: its head, a line that says how to read it, and what it shows."""
    said = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(head)}</h2>{said}<figure>{body}</figure></section>"


def scroll(chart: str) -> str:
    """What may be wider than a narrow screen."""
    return f'<div class="scroll">{chart}</div>'


def plain_table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A table. Heads are NAME|UNIT; cells are HTML."""
    top = "".join(f'<th scope="col">{_head(head)}</th>' for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(head: str) -> str:
    name, _, unit = head.partition("|")
    return escape(name) + (f"<small>{escape(unit)}</small>" if unit else "")
