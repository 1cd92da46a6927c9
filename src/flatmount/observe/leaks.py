"""Mounts and mount namespaces nobody owns any more, who still holds them, and taking them off.

Taking off is `umount2` and nothing else: no file or directory is ever removed. It is done without MNT_DETACH, so what
is still in use stays, and only to a mount that is the same one as when it was found. What another mount namespace holds
is taken off in there, by a thread that enters it for this one call.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from flatmount.errors import FlatmountError, OperationFailed
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import MountEntry, parse_mountinfo, read_table
from flatmount.kernel.process import owner_is_gone
from flatmount.observe.leak_results import Cleaned, Copy, Found, Holder, Kind, Leak
from flatmount.observe.owners import layer_work, owner_of, temporary_owner
from flatmount.observe.processes import Process, scan
from flatmount.plan.operations import HELPER, MountPlan, OpenTree, Setns, Slot, Unmount, UnmountFlag

LOOKS_APART_S = 1.0
LAYER_WORK_S = 600.0
_MOST_HOLDERS = 8
_MOST_SCAN_S = 2.0
_SOMETHING_ELSE = "it is gone, or something else is mounted there now"


def mount_key(entry: MountEntry) -> int:
    """The id that tells a mount from a later one at the same place, as well as the kernel can."""
    return entry.id if entry.unique_id is None else entry.unique_id


def suspicious(entry: MountEntry) -> Kind | None:
    """Why a mount would be a leak if it stays; None for one that may stay."""
    if any(owner_is_gone(part) for part in entry.mount_point.split("/")) and "/work/" in entry.mount_point:
        return Kind.UNFINISHED
    if temporary_owner(entry.mount_point) is None and layer_work(entry.mount_point) is not None:
        return Kind.LAYER_WORK
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
    ages: dict[str, float | None] = {}
    lasting_here = [found for found in lasting(before, after) if _is_over(*found, ages)]
    others = suspicious_elsewhere(processes)
    everyone = _members(processes)
    not_ours = 0
    foreign: dict[tuple[str, str], list[tuple[Kind, MountEntry, Copy]]] = {}
    for namespace, table in others.items():
        for kind, entry in lasting(others_before.get(namespace, ()), table):
            if not _is_over(kind, entry, ages):
                continue
            if kind is Kind.UNFINISHED and not _numbered_as_we_are(everyone[namespace]):
                not_ours += 1
                continue
            copy = Copy(namespace, everyone[namespace][0].pid, entry.id)
            foreign.setdefault((entry.mount_point, entry.root), []).append((kind, entry, copy))
    leaks = []
    for kind, entry in lasting_here:
        copies = tuple(copy for _, _, copy in foreign.pop((entry.mount_point, entry.root), ()))
        where = [namespace for namespace, table in others.items() if _holds(table, entry)]
        leaks.append(_leak(kind, entry, True, where, everyone, copies))
    for found in foreign.values():
        kind, entry, _ = found[0]
        copies = tuple(copy for _, _, copy in found)
        leaks.append(_leak(kind, entry, False, dict.fromkeys(copy.namespace for copy in copies), everyone, copies))
    leaks += _empty_namespaces(after, processes)
    unseen = []
    if any(process.watches is None for process in processes):
        unseen.append("descriptors and namespaces of other users' processes: run as root")
    if not_ours:
        unseen.append(f"whether mounts of ours are left where processes have other pids: {not_ours:,}")
    if ageless := sum(age is None for age in ages.values()):
        unseen.append(f"since when containerd works on {ageless:,} layers: run as root where it runs")
    if not_looked_at:
        unseen.append(f"{not_looked_at:,} processes: there was no time")
    return Found(tuple(leaks), tuple(unseen))


def _is_over(kind: Kind, entry: MountEntry, ages: dict[str, float | None]) -> bool:
    """Whether a mount is left that was there at both looks: containerd may be at work on a layer for minutes."""
    directory = layer_work(entry.mount_point)
    if kind is not Kind.LAYER_WORK or directory is None:
        return True
    if directory not in ages:
        ages[directory] = _age_s(directory)
    age_s = ages[directory]
    return age_s is not None and age_s >= LAYER_WORK_S


def _age_s(directory: str) -> float | None:
    """Seconds since a mount point was made, by the directory beneath the mount; None where that cannot be seen.

    It is made for the mount and nothing is written there. Seen in a detached clone of what it is in, which has none of
    the mounts below; it takes CAP_SYS_ADMIN and changes no table.
    """
    tree = Slot("tree")
    try:
        fd = run_once(MountPlan((OpenTree(tree, os.path.dirname(directory)),), (tree,))).outputs[0]
    except FlatmountError:
        return None
    try:
        return time.time() - os.stat(os.path.basename(directory), dir_fd=fd, follow_symlinks=False).st_mtime
    except OSError:
        return None
    finally:
        os.close(fd)


def _numbered_as_we_are(members: Iterable[Process]) -> bool:
    """Whether the pids in paths that these processes made can be ours."""
    with suppress(OSError):
        own = os.stat("/proc/self/ns/pid").st_ino
        return all(os.stat(f"/proc/{process.pid}/ns/pid").st_ino == own for process in members)
    return False


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
    kind: Kind,
    entry: MountEntry,
    here: bool,
    namespaces: Iterable[int],
    members: dict[int, list[Process]],
    copies: tuple[Copy, ...],
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
        copies=copies,
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
    """Take off temporary and unfinished mounts of the calling thread's table, then their copies in other namespaces.

    The last made goes first. Nothing is taken off that is in use, or is not the topmost and the very same mount as when
    it was found. A namespace is never let go: whoever pinned it may want to enter it. What containerd works on a layer
    in is left to it: between two files the mount is not busy, and the rest would go elsewhere.

    Needs CAP_SYS_ADMIN, in other namespaces over their user namespaces; a copy that was made for a namespace with fewer
    rights is locked there, and only goes with its processes.
    """
    wanted = sorted((leak for leak in leaks if leak.removable), key=lambda leak: leak.id, reverse=True)
    done = []
    top = {entry.mount_point: mount_key(entry) for entry in read_table()}
    for leak in wanted:
        if not leak.here:
            continue
        if top.get(leak.where) != leak.id:
            done.append(Cleaned(leak, _SOMETHING_ELSE))
            continue
        outcome = run_once(MountPlan((Unmount(leak.where, UnmountFlag.NOFOLLOW),), keep_going=True))
        done.append(Cleaned(leak, "" if outcome.failure is None else str(outcome.failure)))
    places: dict[int, list[tuple[Leak, Copy]]] = {}
    for leak in wanted:
        for copy in leak.copies:
            places.setdefault(copy.namespace, []).append((leak, copy))
    for namespace, held in places.items():
        done += _clean_in(namespace, sorted(held, key=lambda pair: pair[1].id, reverse=True))
    return tuple(done)


def _clean_in(namespace: int, held: Sequence[tuple[Leak, Copy]]) -> list[Cleaned]:
    """Take off copies in another mount namespace, which is the one it was only as long as its process is in it."""
    pid = held[0][1].pid
    try:
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return [Cleaned(leak, "", namespace) for leak, _ in held] if not _inhabited(namespace) else _moved(held)
    try:
        if os.fstat(fd).st_ino != namespace:
            return _moved(held)
        table = _table_of(fd, pid)
        if table is None:
            return [Cleaned(leak, "its table can no longer be read from its root", namespace) for leak, _ in held]
        top = {entry.mount_point: entry for entry in table}
        there = {entry.id for entry in table}
        return [Cleaned(leak, _take_off(fd, leak, copy, top, there), namespace) for leak, copy in held]
    finally:
        os.close(fd)


def _inhabited(namespace: int) -> bool:
    return any(process.namespace == namespace for process in scan(deadline_s=_MOST_SCAN_S)[0])


def _moved(held: Sequence[tuple[Leak, Copy]]) -> list[Cleaned]:
    return [
        Cleaned(leak, "the process that was in its namespace is gone; look again", copy.namespace)
        for leak, copy in held
    ]


def _table_of(fd: int, pid: int) -> tuple[MountEntry, ...] | None:
    """The table of a namespace as seen from its own root, which is where one that enters it is."""
    try:
        return read_table(namespace_fd=fd)
    except FlatmountError:
        # Before Linux 6.11 only through a process, whose root may be another one than the namespace's.
        with suppress(OSError, FlatmountError):
            if os.readlink(f"/proc/{pid}/root") == "/":
                return read_table(pid=pid)
    return None


def _take_off(fd: int, leak: Leak, copy: Copy, top: dict[str, MountEntry], there: set[int]) -> str:
    if copy.id not in there:
        return ""  # it went with the one that it was a shared copy of
    found = top.get(leak.where)
    if found is None or (found.id, found.root, found.device) != (copy.id, leak.root, leak.device):
        return _SOMETHING_ELSE
    # One plan for each, which ends where it fails: an umount must never happen where the namespace was not entered.
    plan = MountPlan((Setns(HELPER), Unmount(leak.where, UnmountFlag.NOFOLLOW)))
    try:
        run_once(plan, {HELPER: fd})
    except OperationFailed as failure:
        if failure.errno == errno.EINVAL:
            return "it is locked in that namespace, and goes with the processes there"
        return str(failure)
    return ""
