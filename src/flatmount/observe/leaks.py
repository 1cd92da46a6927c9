"""Mounts and mount namespaces nobody owns any more, who still holds them, and taking them off.

Taking off is `umount2` and nothing else: no file or directory is ever removed. It is done without MNT_DETACH, so what
is still in use stays, and only to a mount that is the same one as when it was found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

from flatmount.errors import FlatmountError
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import MountEntry, parse_mountinfo, read_table
from flatmount.kernel.process import owner_is_gone
from flatmount.observe.leak_results import Cleaned, Found, Holder, Kind, Leak
from flatmount.observe.owners import owner_of, temporary_owner
from flatmount.observe.processes import Process, scan
from flatmount.plan.operations import MountPlan, Unmount, UnmountFlag

LOOKS_APART_S = 1.0
_MOST_HOLDERS = 8


def mount_key(entry: MountEntry) -> int:
    """The id that tells a mount from a later one at the same place, as well as the kernel can."""
    return entry.id if entry.unique_id is None else entry.unique_id


def suspicious(entry: MountEntry) -> Kind | None:
    """Why a mount would be a leak if it stays; None for one that may stay."""
    if any(owner_is_gone(part) for part in entry.mount_point.split("/")) and "/work/" in entry.mount_point:
        return Kind.UNFINISHED
    return Kind.TEMPORARY if temporary_owner(entry.mount_point) is not None else None


def lasting(before: Iterable[MountEntry], after: Iterable[MountEntry]) -> tuple[tuple[Kind, MountEntry], ...]:
    """Suspicious mounts that two looks at a table have in common: an assembly's own live for milliseconds."""
    seen = {mount_key(entry) for entry in before if suspicious(entry)}
    return tuple((kind, entry) for entry in after if mount_key(entry) in seen and (kind := suspicious(entry)))


def find_leaks(*, apart_s: float = LOOKS_APART_S, deadline_s: float = 5.0) -> Found:
    """Look twice, `apart_s` seconds apart, at the mount tables of the calling thread and of every other namespace.

    Changes nothing. As another user than root it sees only its own processes, and says so.
    """
    before = read_table()
    others_before = suspicious_elsewhere(scan(deadline_s=deadline_s / 2)[0])
    time.sleep(apart_s)
    return leaks_between(before, read_table(), others_before, *scan(deadline_s=deadline_s / 2))


def leaks_between(
    before: Sequence[MountEntry],
    after: Sequence[MountEntry],
    others_before: dict[int, tuple[MountEntry, ...]],
    processes: Sequence[Process],
    not_looked_at: int,
) -> Found:
    """As `find_leaks`, from two looks that somebody else took."""
    lasting_here = lasting(before, after)
    others = suspicious_elsewhere(processes)
    everyone = _members(processes)
    leaks = [
        _leak(kind, entry, True, [ns for ns, table in others.items() if _holds(table, entry)], everyone)
        for kind, entry in lasting_here
    ]
    known = {(entry.mount_point, entry.root) for _, entry in lasting_here}
    foreign: dict[tuple[str, str], tuple[Kind, MountEntry, list[int]]] = {}
    for namespace, table in others.items():
        for kind, entry in lasting(others_before.get(namespace, ()), table):
            place = (entry.mount_point, entry.root)
            if place not in known:
                foreign.setdefault(place, (kind, entry, []))[2].append(namespace)
    leaks += [_leak(kind, entry, False, where, everyone) for kind, entry, where in foreign.values()]
    leaks += _empty_namespaces(after, processes)
    unseen = []
    if any(process.watches is None for process in processes):
        unseen.append("descriptors and namespaces of other users' processes: run as root")
    if not_looked_at:
        unseen.append(f"{not_looked_at:,} processes: there was no time")
    return Found(tuple(leaks), tuple(unseen))


def own_namespace() -> int:
    """The inode of the calling thread's mount namespace."""
    return os.stat("/proc/thread-self/ns/mnt").st_ino


def suspicious_elsewhere(processes: Iterable[Process]) -> dict[int, tuple[MountEntry, ...]]:
    """Suspicious mounts in the tables of other mount namespaces, by namespace."""
    own = own_namespace()
    tables: dict[int, tuple[MountEntry, ...]] = {}
    for process in processes:
        if process.namespace in (None, own) or process.namespace in tables:
            continue
        try:
            with open(f"/proc/{process.pid}/mountinfo", "rb") as file:
                # Only lines that matter are parsed: a node may have a namespace of ten thousand mounts for each pod.
                lines = [line for line in file if _may_matter(line)]
        except OSError:
            continue
        entries = parse_mountinfo(b"".join(lines))
        assert process.namespace is not None
        tables[process.namespace] = tuple(entry for entry in entries if suspicious(entry))
    return tables


def _may_matter(line: bytes) -> bool:
    point = line.split(b" ", 5)[4]
    return b"mapped" in point or b"containerd-mount" in point or b"/runc." in point or b"/work/" in point


def _members(processes: Iterable[Process]) -> dict[int, list[Process]]:
    members: dict[int, list[Process]] = {}
    for process in processes:
        if process.namespace is not None:
            members.setdefault(process.namespace, []).append(process)
    return members


def _holds(table: Iterable[MountEntry], wanted: MountEntry) -> bool:
    return any(entry.mount_point == wanted.mount_point and entry.root == wanted.root for entry in table)


def _leak(
    kind: Kind, entry: MountEntry, here: bool, namespaces: Iterable[int], members: dict[int, list[Process]]
) -> Leak:
    holders = tuple(
        Holder("mount namespace", inside[0].pid, inside[0].name, namespace, len(inside))
        for namespace in namespaces
        if (inside := members.get(namespace))
    )
    return Leak(
        kind=kind,
        owner=owner_of(entry.mount_point),
        id=mount_key(entry),
        where=entry.mount_point,
        device=entry.device,
        root=entry.root,
        here=here,
        shared=bool(entry.peer_group),
        holders=holders[:_MOST_HOLDERS],
    )


def _empty_namespaces(table: Iterable[MountEntry], processes: Sequence[Process]) -> list[Leak]:
    """Mount namespaces without a process that a mount on a file keeps. One that a process keeps is that process's."""
    inhabited = {process.namespace for process in processes}
    found = []
    for entry in table:
        if entry.fs_type != "nsfs" or not entry.root.startswith("mnt:["):
            continue
        inode = int(entry.root[5:-1])
        if inode in inhabited:
            continue
        holders = [Holder("mount on a file", None, entry.mount_point, inode, 0)]
        holders += [
            Holder("descriptor", process.pid, process.name, inode, 1)
            for process in processes
            if process.namespaces and inode in process.namespaces
        ]
        found.append(
            Leak(
                kind=Kind.NAMESPACE,
                owner=owner_of(entry.mount_point),
                id=inode,
                where=entry.mount_point,
                device=entry.device,
                root=entry.root,
                here=True,
                shared=bool(entry.peer_group),
                holders=tuple(holders),
            )
        )
    return found


def clean(leaks: Iterable[Leak]) -> tuple[Cleaned, ...]:
    """Take off temporary and unfinished mounts of the calling thread's table, the last made first.

    Copies in other namespaces go along where the mount is shared with them; else they stay and are their namespace's.
    A namespace is never let go: whoever pinned it may want to enter it. Needs CAP_SYS_ADMIN.
    """
    wanted = [leak for leak in leaks if leak.here and leak.kind is not Kind.NAMESPACE]
    top = {entry.mount_point: mount_key(entry) for entry in read_table()}
    done = []
    for leak in sorted(wanted, key=lambda leak: leak.id, reverse=True):
        if top.get(leak.where) != leak.id:
            done.append(Cleaned(leak, "it is gone, or something else is mounted there now"))
            continue
        outcome = run_once(MountPlan((Unmount(leak.where, UnmountFlag.NOFOLLOW),), keep_going=True))
        done.append(Cleaned(leak, _word(outcome.failure)))
    return tuple(done)


def _word(failure: FlatmountError | None) -> str:
    return "" if failure is None else str(failure)
