"""Waiting for what comes in its own time, with a deadline that no busy machine misses."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 60.0
_ACCEPTS = 1 << 16  # __SO_ACCEPTCON


def until(holds: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Wait until it is true."""
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def listens(path: Path) -> bool:
    """Whether somebody listens on a socket, without a connection to it: for a moment it is there and refuses all."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name == [str(path)] and int(flags, 16) & _ACCEPTS:
            return True
    return False


def until_named(pid: int, name: str) -> None:
    """Wait until a process has the name of the program that it is to execute.

    Popen returns a moment before: the kernel closes descriptors first and changes the name then.
    """
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == f"{name}\n")
