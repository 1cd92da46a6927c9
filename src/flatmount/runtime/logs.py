"""What a container wrote: one line of the log for each of its lines, "TIME STREAM F|P TEXT", as the shim keeps it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from flatmount.runtime.records import Containers, Record, State

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Line:
    """A piece of output: when it came (UTC), from "stdout" or "stderr", and whether a line end follows."""

    at: str
    stream: str
    text: bytes
    ends: bool


def read(containers: Containers, record: Record, *, follow: bool = False) -> Iterator[Line]:
    """Everything that is kept, oldest first; with `follow` also what comes until the container ended."""
    directory = containers.directory(record.id)
    with suppress(FileNotFoundError), open(f"{directory}/log.1", "rb") as older:
        yield from map(_line, older)
    if follow:
        yield from _followed(f"{directory}/log", lambda: containers.state(record) in (State.RUNNING, State.CREATING))
    else:
        with suppress(FileNotFoundError), open(f"{directory}/log", "rb") as file:
            yield from map(_line, file)


def _followed(path: str, lives: Callable[[], bool]) -> Iterator[Line]:
    rest = b""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            # Asked before reading: what was written before the end is read after it.
            going_on = lives()
            while chunk := os.read(fd, 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from map(_line, lines)
            if not going_on:
                return
            fd = _next_log(path, fd)
            time.sleep(_POLL_S)
    finally:
        os.close(fd)


def _next_log(path: str, fd: int) -> int:
    """The log that was begun when this one was full, if it was."""
    with suppress(FileNotFoundError):
        if os.stat(path).st_ino != os.fstat(fd).st_ino:
            newer = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.close(fd)
            return newer
    return fd


def _line(raw: bytes) -> Line:
    at, stream, kind, text = (*raw.rstrip(b"\n").split(b" ", 3), b"", b"", b"")[:4]
    return Line(at.decode("ascii", "replace"), stream.decode("ascii", "replace"), text, kind == b"F")
