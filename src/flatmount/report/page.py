"""What all pages share: one document that loads nothing, its sections and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def section(head: str, text: str, body: str) -> str:
    """A part of a page: its head, a line that says how to read it, and what it shows."""
    return f"<section><h2>{escape(head)}</h2><p>{escape(text)}</p><figure>{body}</figure></section>"


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
