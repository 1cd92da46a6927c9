"""Processes as far as mounts go: their mount namespaces, who follows mount tables, whose container they are."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

# As kubelet, containerd, CRI-O, podman and docker name their cgroups; systemd's form has _ for - in a pod's uid.
_CONTAINER = re.compile(r"(?:^|[-/:])([0-9a-f]{64})(?:\.scope)?(?=/|$)")
_POD = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})")
_TABLE = re.compile(r"/(?:mountinfo|mounts|mountstats)$")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process belongs: its cgroup, and the container and pod that this names ("" where it names none)."""

    cgroup: str
    container: str
    pod: str

    def __str__(self) -> str:
        if self.pod:
            return f"pod {self.pod}"
        return f"container {self.container[:12]}" if self.container else self.cgroup


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `namespace` is the inode of its mount namespace, or None where it may not be read.

    `watches` counts its open descriptors of mount tables, `namespaces` are inodes of mount namespaces that it has a
    descriptor of; both None where its descriptors may not be read.
    """

    pid: int
    name: str
    place: Place
    namespace: int | None
    watches: int | None
    namespaces: tuple[int, ...] | None


def place_of(cgroup_file: str) -> Place:
    """The place that the content of /proc/PID/cgroup names: version 2's path, or the most telling of version 1's."""
    paths = [line.split(":", 2)[2] for line in cgroup_file.splitlines() if line.count(":") >= 2]
    # On a hybrid system one hierarchy may have the container and another only a slice or nothing.
    best = max(paths, key=lambda path: (bool(_CONTAINER.search(path)), bool(_POD.search(path)), len(path)), default="/")
    container, pod = _CONTAINER.search(best), _POD.search(best)
    return Place(best, container[1] if container else "", pod[1].replace("_", "-") if pod else "")


def read_place(pid: int) -> Place:
    """The place of a process; an empty one where it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
        return place_of(file.read())
    return Place("", "", "")


def name_of(pid: int) -> str:
    """What a process calls itself; "?" where it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().rstrip("\n")
    return "?"


def is_trusted(pid: int) -> bool:
    """Whether a process is root's or ours by all its user ids: anybody can take a name, or start a setuid program.

    The owner of its directory in /proc does not tell: that is root where a process may not be dumped.
    """
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        line = next((line for line in file if line.startswith("Uid:")), "")
        ids = {int(word) for word in line.split()[1:]}
        return bool(ids) and ids <= {0, os.geteuid()}
    return False


def pids() -> tuple[int, ...]:
    """Every process that can be seen."""
    return tuple(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))


def scan(*, deadline_s: float, wanted: Iterable[int] | None = None) -> tuple[tuple[Process, ...], int]:
    """Look at every process (or those `wanted`) until `deadline_s` have gone by.

    Reads a link for each descriptor of each process. Returns the processes and how many were not looked at in time.
    """
    until = time.monotonic() + deadline_s
    found: list[Process] = []
    everyone = tuple(wanted) if wanted is not None else pids()
    for index, pid in enumerate(everyone):
        if time.monotonic() > until:
            return tuple(found), len(everyone) - index
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(_look_at(pid))
    return tuple(found), 0


def _look_at(pid: int) -> Process:
    namespace = _inode(lambda: os.readlink(f"/proc/{pid}/ns/mnt"))
    watches: int | None = 0
    namespaces: list[int] = []
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    link = os.readlink(entry.path)
                    if link.startswith("mnt:["):
                        namespaces.append(int(link[5:-1]))
                    elif link.startswith("/proc/") and _TABLE.search(link):
                        watches = (watches or 0) + 1
    except PermissionError:
        watches = None
    held = None if watches is None else tuple(dict.fromkeys(namespaces))
    return Process(pid, name_of(pid), read_place(pid), namespace, watches, held)


def _inode(read: Callable[[], str]) -> int | None:
    try:
        return int(read()[5:-1])
    except PermissionError:
        return None


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process (all its threads) has used, to a hundredth of a second; None where it is gone."""
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return None
