"""Watchers: processes that follow the mount table as an init system does, to see what that costs them.

    python -m flatmount.storm.watcher PARENT_PID

waits for a change of its mount table, reads and parses the whole of it again, and so on until its standard
input is readable or closed; then it writes `REREADS ENTRIES BYTES CPU_SECONDS`.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from types import TracebackType

from flatmount.kernel.mounts import die_with_parent, follow_mountinfo
from flatmount.storm.child import Child


@dataclass(frozen=True, slots=True)
class WatcherTotals:
    """What all watchers did: tables read again, entries parsed, bytes read, processor seconds for that."""

    rereads: int
    entries: int
    bytes: int
    cpu_s: float


class Watchers:
    """`count` processes that watch the calling thread's mount namespace while the context is open.

    Their processor time counts from when they are ready, so it is that of following changes alone. The thread
    that opens them has to outlive them.
    """

    __slots__ = ("_children",)

    def __init__(self, count: int) -> None:
        """Start the watchers, and wait until each follows the table. Raises: FlatmountError."""
        self._children: list[Child] = []
        try:
            self._children.extend(Child(__name__) for _ in range(count))
            for child in self._children:
                child.wait_for_output()
                child.new_lines()
        except BaseException:
            self.close()
            raise

    def stop(self) -> WatcherTotals:
        """End the watchers and add up what they did. One that had to be killed counts for nothing."""
        reports = [line.split() for child in self._children for line in child.stop()[-1:]]
        return WatcherTotals(
            rereads=sum(int(report[0]) for report in reports),
            entries=sum(int(report[1]) for report in reports),
            bytes=sum(int(report[2]) for report in reports),
            cpu_s=sum(float(report[3]) for report in reports),
        )

    def close(self) -> None:
        """End what still runs. Closing twice is fine."""
        for child in self._children:
            child.close()

    def __enter__(self) -> Watchers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    before = _cpu_s()
    print("following", flush=True)
    followed = follow_mountinfo(mountinfo, 0)
    print(followed.rereads, followed.entries, followed.bytes, f"{_cpu_s() - before:.6f}", flush=True)


if __name__ == "__main__":
    main()
