"""Uppers in the store that belong to no mount any more: which there are, and their removal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from flatmount.errors import from_os_error
from flatmount.kernel.mounts import TableSource, read_table
from flatmount.kernel.tree import remove_tree
from flatmount.rootfs.records import Records
from flatmount.rootfs.uppers import UPPER_RECORD
from flatmount.store import Store

_UPPERDIR = re.compile(r"(?:^|,)upperdir=((?:[^,\\]|\\.)*)")


Names = Callable[[], Iterable[str]]


class Why(Enum):
    """Why an upper is there although nothing is mounted with it."""

    EPHEMERAL = "its mount was ephemeral and is gone"
    KEPT = "kept when its mount was taken off"
    UNKNOWN = "no mount was ever recorded for it"


@dataclass(frozen=True, slots=True)
class IdleUpper:
    """An upper that no record, lease or mount speaks of. `size_bytes` are its files' blocks."""

    name: str
    why: Why
    entries: int
    size_bytes: int


def idle_uppers(store: Store, records: Records, containers: Names = tuple) -> tuple[IdleUpper, ...]:
    """Uppers that are not in use: no record of a mount, no lease, and no overlay in any mount namespace has them.

    `containers` gives the names of containers, whose uppers are called the same; asked after the uppers are listed, as
    a container has its record first. Mount namespaces are seen through the processes in /proc.
    """
    place = os.path.join(store.data, "uppers")
    names = sorted(os.listdir(place))
    if not names:
        return ()
    used = _spoken_for(store, records, containers) | mounted_uppers()
    return tuple(_idle(place, name) for name in names if name not in used)


def _spoken_for(store: Store, records: Records, containers: Names) -> set[str]:
    """The uppers of mounts and containers that have a record or a lease."""
    used = {record.upper for record in records.all() if record.root == store.root} | set(containers())
    return used | {held.holder.partition(":")[2].partition("@")[0] for held in store.holders()}


def remove_uppers(
    store: Store, records: Records, uppers: Iterable[IdleUpper], containers: Names = tuple
) -> tuple[int, int]:
    """Remove those of `uppers` that are still idle; returns entries and bytes. Never through a mount.

    Each is looked at and put out of sight under the records' lock, which a mount's claim takes: who claims it before
    keeps it, who comes after finds none.

    Raises: FlatmountError where one cannot be removed; it is out of sight then, and the next command tries again.
    """
    entries = size_bytes = 0
    # What has been mounted since has a record or a lease.
    mounted = mounted_uppers()
    trash = os.path.join(store.data, "trash")
    for upper in uppers:
        try:
            with records.locked():
                if upper.name in mounted or upper.name in _spoken_for(store, records, containers):
                    continue
                os.rename(os.path.join(store.data, "uppers", upper.name), os.path.join(trash, f"upper-{upper.name}"))
            fd = os.open(trash, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                gone = remove_tree(fd, f"upper-{upper.name}")
            finally:
                os.close(fd)
        except FileNotFoundError:
            continue  # another one removed it
        except OSError as error:
            raise from_os_error(error, f"remove the upper {upper.name}") from error
        entries += gone.entries
        size_bytes += gone.size_bytes
    return entries, size_bytes


def mounted_uppers() -> set[str]:
    """The names of uppers of every overlay in any mount namespace that a process is in."""
    found: set[str] = set()
    seen: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            table = read_table(pid=int(pid), source=TableSource.MOUNTINFO)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        seen.add(namespace)
        for entry in table:
            if entry.fs_type != "overlay":
                continue
            upper = _UPPERDIR.search(entry.options)
            if upper is not None:
                found.update(upper[1].split("/")[-2:-1])
            found.add(entry.source.removeprefix("flatmount-"))
    return found


def _idle(place: str, name: str) -> IdleUpper:
    path = os.path.join(place, name)
    try:
        with open(os.path.join(path, UPPER_RECORD), encoding="utf-8") as file:
            why = Why.EPHEMERAL if json.load(file).get("ephemeral") else Why.KEPT
    except (OSError, ValueError, AttributeError):
        why = Why.UNKNOWN
    entries, size_bytes = 1, 0
    for here, directories, files in os.walk(path):
        entries += len(directories) + len(files)
        size_bytes += sum(os.lstat(os.path.join(here, name)).st_blocks * 512 for name in files)
    return IdleUpper(name, why, entries, size_bytes)
