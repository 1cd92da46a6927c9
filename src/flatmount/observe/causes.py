"""Who makes mount calls on this machine right now, by process, from the kernel's system call events."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from flatmount.observe.mount_calls import CALLS
from flatmount.observe.tracefs import TraceInstance

# Only the beginning of a call is recorded: its end costs as much and says whether it failed, which few do.
_EVENTS = tuple(call for call in CALLS if call not in ("unshare", "fspick", "fsconfig"))
_CALL = re.compile(r"\s*(.*)-(\d+)\s+(?:\(\s*(\d+|-+)\)\s+)?\[\d+\].*? sys_(\w+)\((.*)")
_FLAGS = re.compile(r"flags: (?:0x)?([0-9a-f]+)")
_KEEPS_TABLE = 0x20 | 0x1E0000  # MS_REMOUNT, and changes of propagation


@dataclass(slots=True)
class Calls:
    """Mount calls by (process, call) since the object was made or last drained. Not every call succeeds.

    `names` has what each process was called last, also those that are gone.
    """

    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """Add one line as the kernel printed it. Cheap: `watch` may see a thousand a second."""
        match = _CALL.match(line)
        if match is None:
            return
        comm, thread, group, name, arguments = match.groups()
        if name == "mount":
            flags = _FLAGS.search(arguments)
            if flags and int(flags[1], 16) & _KEEPS_TABLE:
                return
        process = int(group if group and group.isdigit() else thread)
        self.counts[process, name] += 1
        self.names[process] = comm

    def drain(self) -> Counter[tuple[int, str]]:
        """What was counted, and begin again."""
        counts, self.counts = self.counts, Counter()
        return counts


def watch_calls(instance: TraceInstance, *, only: Collection[str] = _EVENTS) -> None:
    """Switch on the events that `Calls` reads (or `only` some), for every process of the machine."""
    for call in only:
        instance.enable(f"syscalls/sys_enter_{call}")
