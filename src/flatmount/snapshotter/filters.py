"""containerd's filter expressions: which snapshots a List wants.

A filter is a comma list of selectors, all of which must hold; of several filters one must. A selector is a field path
(`name`, `parent`, `kind`, `labels.KEY`), alone for "is present" or with `==`, `!=` or `~=` and a value. Parts of a path
and values may stand in double quotes with Go's escapes; the value of `~=`, a regular expression, also in `/` or `|`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flatmount.snapshotter.model import Info, InvalidRequest

Predicate = Callable[[Info], bool]

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,]+")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(r"\\(?:([abfnrtv\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3}))")
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class _Selector:
    path: tuple[str, ...]
    operator: str
    value: str
    pattern: re.Pattern[str] | None

    def __call__(self, info: Info) -> bool:
        found = _field(info, self.path)
        match self.operator:
            case "==":
                return found == self.value
            case "!=":
                return (found or "") != self.value
            case "~=":
                return self.pattern is not None and self.pattern.search(found or "") is not None
            case _:
                return found is not None


def parse_filters(filters: Iterable[str]) -> Predicate:
    """What holds for a snapshot that any of `filters` wants; none at all, or an empty one, wants every snapshot.

    Raises: InvalidRequest, with the place in the expression.
    """
    alternatives = [_Parser(text).selectors() if text else [] for text in filters]
    if not alternatives:
        return lambda info: True
    return lambda info: any(all(selector(info) for selector in selectors) for selectors in alternatives)


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    match path:
        case ("name", *_):
            return info.name
        case ("parent", *_):
            return info.parent
        case ("kind", *_):
            return info.kind.name.lower()
        case ("labels", *key):
            return info.labels.get(".".join(key))
    return None


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> list[_Selector]:
        found = [self._selector()]
        while self._take(","):
            found.append(self._selector())
        if self._at < len(self._text):
            raise self._wrong("unexpected input")
        return found

    def _selector(self) -> _Selector:
        path = [self._part()]
        while self._take("."):
            path.append(self._part())
        self._skip()
        operator = self._match(_OPERATOR)
        if operator is None:
            return _Selector(tuple(path), "", "", None)
        if operator not in ("==", "!=", "~="):
            raise self._wrong(f"unsupported operator {operator!r}")
        value = self._value(any_quote=operator == "~=")
        try:
            pattern = re.compile(value) if operator == "~=" else None
        except re.error:
            # A pattern that cannot be compiled matches nothing, as in containerd.
            pattern = None
        return _Selector(tuple(path), operator, value, pattern)

    def _part(self) -> str:
        self._skip()
        if self._next() == '"':
            return self._quoted('"')
        field = self._match(_FIELD)
        if field is None:
            raise self._wrong("expected a field or a quoted one")
        return field

    def _value(self, *, any_quote: bool) -> str:
        self._skip()
        quote = self._next()
        if quote == '"' or (any_quote and quote and quote in "/|"):
            return self._quoted(quote)
        value = self._match(_VALUE)
        if value is None or quote in "/|":
            raise self._wrong("expected a value or a quoted one")
        return value

    def _quoted(self, quote: str) -> str:
        self._at += 1
        parts: list[str] = []
        while (char := self._next()) != quote:
            if char in ("", "\n"):
                raise self._wrong("quoted literal not terminated")
            if char == "\\" and self._text[self._at + 1 : self._at + 2] == quote:
                parts.append(quote)
                self._at += 2
            elif char == "\\":
                parts.append(self._escape())
            else:
                parts.append(char)
                self._at += 1
        self._at += 1
        return "".join(parts)

    def _escape(self) -> str:
        found = _ESCAPE.match(self._text, self._at)
        if found is None:
            raise self._wrong("unknown escape")
        self._at = found.end()
        simple, *numbers, octal = found.groups()
        if simple is not None:
            return _SIMPLE[simple]
        code = int(octal, 8) if octal is not None else int(next(n for n in numbers if n is not None), 16)
        if code > 0x10FFFF:
            raise self._wrong("no such character")
        return chr(code)

    def _take(self, char: str) -> bool:
        self._skip()
        if self._next() != char:
            return False
        self._at += 1
        return True

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found is not None else self._at

    def _wrong(self, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"filter {self._text[:200]!r}: {what} at character {self._at + 1}",
            hint='write it as FIELD==VALUE, with "double quotes" around what is not a word',
        )
