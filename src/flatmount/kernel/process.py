"""Who owns what is left on disk: names that carry a process, and whether that process still lives."""

from __future__ import annotations

import os
import re

_OWNED = re.compile(r"\.(\d+)-(\d+)$")


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is none. Pids are used again, this is not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            after_name = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def owned_name(name: str) -> str:
    """`name` with this process's mark: what a later command looks at to tell whether its owner is gone."""
    pid = os.getpid()
    return f"{name}.{pid}-{start_time(pid)}"


def owner_is_gone(name: str) -> bool:
    """Whether `name` carries the mark of a process that no longer lives."""
    mark = _OWNED.search(name)
    return mark is not None and start_time(int(mark[1])) != int(mark[2])
