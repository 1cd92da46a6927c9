"""The one parser of trace events as the kernel prints them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"\s*(?P<comm>.*)-(?P<tid>\d+)\s+(?:\(\s*(?P<tgid>\d+|-+)\)\s+)?\[\d+\]\s+(?:[^\s:]+\s+)?"
    r"(?P<s>\d+)\.(?P<us>\d{6}): (?P<name>\w+)(?P<rest>.*)"
)
_ARGUMENT = re.compile(r"(\w+): (?:0x)?([0-9a-f]+)")
_WORD = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True, slots=True)
class Event:
    """One event as the kernel printed it.

    `comm` is the name that the thread had at its last switch, `process` None where the kernel forgot it.
    `time_ns` is of CLOCK_MONOTONIC, to the microsecond. `text` is what follows the name.
    """

    comm: str
    thread: int
    process: int | None
    time_ns: int
    name: str
    text: str

    def arguments(self) -> dict[str, int]:
        """Arguments of a system call, which the kernel prints in hexadecimal."""
        return {key: int(value, 16) for key, value in _ARGUMENT.findall(self.text)}

    def words(self) -> dict[str, str]:
        """The `name=value` pairs of another event."""
        return dict(_WORD.findall(self.text))

    @property
    def returned(self) -> int | None:
        """What a system call returned, negative for an errno; None for an event that is no return."""
        if not self.text.startswith(" -> "):
            return None
        value = int(self.text[4:], 16)
        return value - (1 << 64) if value >> 63 else value


def parse_event(line: str) -> Event | None:
    """The event of one line of `trace` or `trace_pipe`; None for a comment, a stack, a note of lost events.

    See: Documentation/trace/ftrace.rst, "Output format".
    """
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    process = match["tgid"]
    return Event(
        comm=match["comm"],
        thread=int(match["tid"]),
        process=int(process) if process and process.isdigit() else None,
        time_ns=int(match["s"]) * 1_000_000_000 + int(match["us"]) * 1000,
        name=match["name"],
        text=match["rest"],
    )
