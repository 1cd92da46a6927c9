"""What containers have while they run, and must not have left: processes, namespaces, control groups, mounts, files.

Other people's containers may run on the machine meanwhile. So what is looked at is a family: everything that descends
from the test's own process, which for that time takes in whoever loses his parent.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flatmount.kernel.mounts import mount_count, read_table
from tests.e2e.conftest import CommandLine

KINDS = ("mnt", "user", "net", "pid", "ipc", "uts", "cgroup")
_PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def subreaper() -> Iterator[None]:
    """Orphans among our descendants become our children, instead of the first process's."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it ended meanwhile
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return [one for child in found for one in (child, *descendants(child))]


@dataclass
class Family:
    """Our descendants, and everything of theirs that `look` ever saw. `own` is what we have ourselves."""

    own: set[str] = field(default_factory=set)
    namespaces: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    most: int = 0

    def look(self) -> list[int]:
        """Remember what the family has now; returns who it is."""
        self.own = namespaces_of(os.getpid())
        members = descendants(os.getpid())
        self.most = max(self.most, len(members))
        for pid in members:
            self.namespaces |= namespaces_of(pid) - self.own
            with suppress(OSError):
                for row in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                    path = row.split(":", 2)[2]
                    if path.startswith("/flatmount/"):
                        self.groups.add(path)
        return members

    def kinds(self) -> set[str]:
        """Which kinds of namespaces of its own the family was seen to have."""
        return {name.partition(":")[0] for name in self.namespaces}


def namespaces_of(pid: int) -> set[str]:
    """Namespaces that a process is in or has a descriptor of, as `kind:[inode]`."""
    found: set[str] = set()
    for directory in ("ns", "fd"):
        with suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/{directory}"):
                with suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/{directory}/{name}")
                    if target.partition(":[")[0] in KINDS:
                        found.add(target)
    return found


def groups_left(groups: set[str]) -> list[str]:
    """Control groups of these paths that are still there, in any hierarchy."""
    hierarchies = ["/sys/fs/cgroup", *(entry.path for entry in os.scandir("/sys/fs/cgroup") if entry.is_dir())]
    return [base + path for path in groups for base in hierarchies if os.path.isdir(base + path)]


def files_of(*places: Path) -> set[str]:
    """Every path below the places."""
    return {
        os.path.join(directory, name)
        for place in places
        for directory, names, files in os.walk(place)
        for name in (*names, *files)
    }


@dataclass(frozen=True)
class Standing:
    """What there is outside of processes: to be compared before and after."""

    mounts: int
    pinned: frozenset[str]
    files: frozenset[str]
    own_descriptors: int
    own_namespaces: frozenset[str]

    @classmethod
    def of(cls, line: CommandLine, *places: Path) -> Standing:
        table = read_table()
        kept = files_of(line.run_directory, line.root / "v1/data", *places)
        return cls(
            mounts=mount_count(),
            pinned=frozenset(entry.mount_point for entry in table if entry.fs_type == "nsfs"),
            files=frozenset(kept),
            own_descriptors=len(os.listdir("/proc/self/fd")),
            own_namespaces=frozenset(namespaces_of(os.getpid())),
        )
