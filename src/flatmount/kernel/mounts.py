"""The mount table of a mount namespace, and the kernel's own count of what was attached and detached.

Two sources give the same entries. `listmount` and `statmount` (6.8; complete from 6.13 on) have ids that are
never used again and take a namespace; `/proc/PID/mountinfo` is there everywhere and costs forty
times as much to count. Which one is used is found by trying it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum, IntFlag
from functools import cache
from types import TracebackType

from flatmount.errors import FlatmountError, MissingFeature, OperationFailed, from_os_error
from flatmount.kernel import _native


class TableSource(Enum):
    """Where the mount table is read from."""

    STATMOUNT = "statmount"
    MOUNTINFO = "mountinfo"


class MountAttributes(IntFlag):
    """Attributes of one mount (not of its file system), with the kernel's values of `MOUNT_ATTR_*`."""

    READ_ONLY = 0x1
    NO_SUID = 0x2
    NO_DEV = 0x4
    NO_EXEC = 0x8
    NO_ATIME = 0x10
    STRICT_ATIME = 0x20
    NO_DIR_ATIME = 0x80
    ID_MAPPED = 0x100000
    NO_SYMLINK_FOLLOW = 0x200000


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One mount as seen from the root directory of the reader, or of the namespace that was named.

    `id` and `parent_id` are those of mountinfo, which the kernel uses again after an unmount. `unique_id` and
    `parent_unique_id` are never used again, and None where the source is mountinfo. `device` is MAJOR:MINOR
    of the file system, `options` what the file system itself says of its options, comma separated and escaped
    as in mountinfo, without the words that every file system has (`rw`, `sync`, …). `peer_group` and `master`
    are 0 where the mount is in no peer group and no slave of one. Names that are not UTF-8 carry surrogate
    escapes.
    """

    id: int
    parent_id: int
    unique_id: int | None
    parent_unique_id: int | None
    device: str
    root: str
    mount_point: str
    fs_type: str
    source: str
    attributes: MountAttributes
    options: str
    peer_group: int
    master: int
    unbindable: bool

    @property
    def propagation(self) -> str:
        """`private`, `shared`, `slave`, `slave,shared` or `unbindable`, as findmnt(8) names them."""
        words = [word for word, holds in (("slave", self.master), ("shared", self.peer_group)) if holds]
        return ",".join(words) or ("unbindable" if self.unbindable else "private")


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Mounts attached to and detached from a namespace. One that was moved within it counts on both sides."""

    attached: int
    detached: int


@cache
def table_source() -> TableSource:
    """The source that `read_table` uses unless told otherwise, found by trying it once.

    `statmount` is taken where it gives every field of an entry: the name of the source came last, with 6.13.
    """
    try:
        fields = _native.statmount_fields()
    except OSError:
        return TableSource.MOUNTINFO
    return TableSource.STATMOUNT if fields & _NEEDED_FIELDS == _NEEDED_FIELDS else TableSource.MOUNTINFO


def mount_count(*, namespace_fd: int | None = None, pid: int | None = None, source: TableSource | None = None) -> int:
    """How many mounts there are in the calling thread's namespace, in `namespace_fd`'s or in the process's.

    Holds the kernel's namespace lock for reading, 50 us for 1,000 mounts through `listmount`, 2 ms through
    mountinfo. `namespace_fd` stays the caller's.

    Raises: MissingFeature for a namespace descriptor where the kernel has no `listmount` for one, and where
    `source` names one that is missing.
    Kernel: `listmount` 6.8, of another namespace 6.11; else mountinfo. CAP_SYS_ADMIN over another namespace.
    """
    namespace = _listable(namespace_fd, pid, source)
    if namespace is not None:
        return _native.count_mounts(namespace)
    return _mountinfo(namespace_fd, pid).count(b"\n")


def mount_ids(
    *, namespace_fd: int | None = None, pid: int | None = None, source: TableSource | None = None
) -> tuple[int, ...]:
    """Ids of all mounts: unique ones in the order they were made, or, from mountinfo, those of mountinfo.

    Arguments, errors and kernels as for `mount_count`.
    """
    namespace = _listable(namespace_fd, pid, source)
    if namespace is not None:
        return tuple(_native.list_mounts(namespace))
    lines = _mountinfo(namespace_fd, pid).split(b"\n")
    return tuple(int(line.split(b" ", 1)[0]) for line in lines if line)


def read_table(
    *, namespace_fd: int | None = None, pid: int | None = None, source: TableSource | None = None
) -> tuple[MountEntry, ...]:
    """The whole mount table: of the calling thread's namespace, of `namespace_fd`'s, or of the process's.

    Not a snapshot from either source: a mount that comes or goes meanwhile may be in it or not. With
    `namespace_fd` or through `statmount` with `pid` the table starts at the namespace's root, from mountinfo
    at the process's. About 10 ms for 1,000 mounts. `namespace_fd` stays the caller's.

    Raises: MissingFeature for a namespace descriptor where only mountinfo is to be had.
    Kernel: `statmount` 6.8, here from 6.13 on; else mountinfo. See: statmount(2), proc_pid_mountinfo(5).
    """
    if (source or table_source()) is TableSource.STATMOUNT:
        namespace = _listable(namespace_fd, pid, source)
        if namespace is not None:
            return tuple(_from_statmount(record) for record in _native.stat_mounts(namespace))
    return parse_mountinfo(_mountinfo(namespace_fd, pid))


def parse_mountinfo(text: bytes) -> tuple[MountEntry, ...]:
    """The entries of a mountinfo file. See: proc_pid_mountinfo(5)."""
    return tuple(_from_mountinfo_line(line) for line in text.split(b"\n") if line)


class MountEvents:
    """The kernel's own count of the mounts that were attached to one namespace and detached from it.

    A context manager around a fanotify queue without a limit; nothing is lost however late `counts` is
    called, at about 100 bytes of kernel memory for each event that waits. Counting starts when the object is
    made.

    Detached trees count when they are attached and not while they are made or closed. A mount that was moved
    within the namespace counts as attached and as detached.

    Kernel: fanotify with FAN_REPORT_MNT, 6.15; CAP_SYS_ADMIN over the namespace. See: fanotify_init(2).
    """

    __slots__ = ("_attached", "_detached", "_queue")

    def __init__(self, namespace_fd: int | None = None) -> None:
        """Start counting in the namespace of `namespace_fd` (stays the caller's), or the calling thread's.

        Raises: MissingFeature where the kernel has no such events; FlatmountError where it refuses them.
        """
        self._attached = 0
        self._detached = 0
        own = _open_of_process(None, "ns/mnt") if namespace_fd is None else -1
        try:
            self._queue = _native.open_mount_events(own if namespace_fd is None else namespace_fd)
        except PermissionError as error:
            raise FlatmountError(
                f"count mount events: {error.strerror}",
                hint="run as root: it needs CAP_SYS_ADMIN over the namespace",
            ) from error
        except OSError as error:
            raise MissingFeature(
                f"count mount events: {error.strerror}", hint="it takes Linux 6.15 with fanotify"
            ) from error
        finally:
            if own >= 0:
                os.close(own)

    def counts(self) -> EventCounts:
        """Everything attached and detached since the object was made, by calls that returned before this one.

        Raises: OperationFailed where the kernel dropped events (out of memory): the counts are then
        worthless.
        """
        try:
            attached, detached = _native.drain_mount_events(self._queue)
        except OSError as error:
            raise OperationFailed(
                "read", "the queue of mount events", error.errno or 0, position=0, total=1, hint="count again"
            ) from error
        self._attached += attached
        self._detached += detached
        return EventCounts(self._attached, self._detached)

    def close(self) -> None:
        """Stop counting. Closing twice is fine."""
        if self._queue >= 0:
            os.close(self._queue)
            self._queue = -1

    def __enter__(self) -> MountEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def follow_mountinfo(mountinfo_fd: int, stop_fd: int) -> FollowedTable:
    """Re-read and parse mountinfo at each change of its namespace, until `stop_fd` is readable or hung up.

    Does what an init system does with every change that it is told of, without a limit to its rate, and
    reports what that was. Blocks outside the interpreter's lock. Changes count from when the file was opened;
    both descriptors stay the caller's.

    Raises: OSError from poll or read. See: proc_pid_mountinfo(5) on POLLERR and POLLPRI.
    """
    return FollowedTable(*_native.follow_mountinfo(mountinfo_fd, stop_fd))


@dataclass(frozen=True, slots=True)
class FollowedTable:
    """What following a mount table took: times it was read again, entries parsed and bytes read for that."""

    rereads: int
    entries: int
    bytes: int


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends, or at once if `parent_pid` is no longer that.

    The parent is the *thread* that started it: a process that a worker thread started dies with that worker.
    See: PR_SET_PDEATHSIG(2const).
    """
    _native.die_with_parent(parent_pid)


# STATMOUNT_SB_BASIC, MNT_BASIC, MNT_ROOT, MNT_POINT, FS_TYPE, SB_SOURCE: without one of them mountinfo knows
# more.
_NEEDED_FIELDS = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x200

_MS_UNBINDABLE = 1 << 17
_KNOWN_ATTRIBUTES = MountAttributes(sum(MountAttributes))
_ATTRIBUTE_WORDS = {
    "ro": MountAttributes.READ_ONLY,
    "nosuid": MountAttributes.NO_SUID,
    "nodev": MountAttributes.NO_DEV,
    "noexec": MountAttributes.NO_EXEC,
    "noatime": MountAttributes.NO_ATIME,
    "nodiratime": MountAttributes.NO_DIR_ATIME,
    "idmapped": MountAttributes.ID_MAPPED,
    "nosymfollow": MountAttributes.NO_SYMLINK_FOLLOW,
}
_GENERIC_OPTIONS = frozenset(("rw", "ro", "sync", "dirsync", "mand", "lazytime"))
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


def _listable(namespace_fd: int | None, pid: int | None, source: TableSource | None) -> int | None:
    """The namespace as `listmount` takes it (0: our own), or None where mountinfo has to do."""
    if source is TableSource.STATMOUNT and not _listmount_works():
        raise MissingFeature("listmount", hint="it takes Linux 6.8; mountinfo serves everywhere")
    if source is TableSource.MOUNTINFO or not _listmount_works():
        return None
    if namespace_fd is None and pid is None:
        return 0
    opened = _open_of_process(pid, "ns/mnt") if namespace_fd is None else -1
    try:
        return _native.mount_namespace_id(opened if namespace_fd is None else namespace_fd)
    except OSError:
        return None  # before 6.11, or not a mount namespace
    finally:
        if opened >= 0:
            os.close(opened)


@cache
def _listmount_works() -> bool:
    try:
        return _native.count_mounts(0) > 0
    except OSError:
        return False


def _mountinfo(namespace_fd: int | None, pid: int | None) -> bytes:
    if namespace_fd is not None:
        raise MissingFeature(
            "the mount table of a namespace that is given as a descriptor",
            hint="it takes a descriptor of a mount namespace and Linux 6.11 (6.13 for whole entries); "
            "else name a process in it",
        )
    with open(_open_of_process(pid, "mountinfo"), "rb", buffering=0) as file:
        return file.read()


def _open_of_process(pid: int | None, name: str) -> int:
    path = f"/proc/{'thread-self' if pid is None else pid}/{name}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, "read the mount table from") from error


def _from_statmount(record: _native.StatmountRecord) -> MountEntry:
    (
        unique_id,
        parent_unique_id,
        mount_id,
        parent_id,
        attributes,
        propagation,
        peer_group,
        master,
        major,
        minor,
        root,
        mount_point,
        fs_type,
        fs_subtype,
        source,
        options,
    ) = record
    return MountEntry(
        id=mount_id,
        parent_id=parent_id,
        unique_id=unique_id,
        parent_unique_id=parent_unique_id,
        device=f"{major}:{minor}",
        root=os.fsdecode(root),
        mount_point=os.fsdecode(mount_point),
        fs_type=os.fsdecode(fs_type + b"." + fs_subtype if fs_subtype else fs_type),
        source=os.fsdecode(source),
        attributes=_attributes(attributes),
        options=os.fsdecode(options),
        peer_group=peer_group,
        master=master,
        unbindable=bool(propagation & _MS_UNBINDABLE),
    )


def _from_mountinfo_line(line: bytes) -> MountEntry:
    # Optional fields are of any number and end with a lone "-"; what the file system prints comes last.
    fields = line.split(b" ")
    separator = fields.index(b"-", 6)
    tags = dict(tag.partition(b":")[::2] for tag in fields[6:separator])
    own_options = os.fsdecode(b" ".join(fields[separator + 3 :])).split(",")
    return MountEntry(
        id=int(fields[0]),
        parent_id=int(fields[1]),
        unique_id=None,
        parent_unique_id=None,
        device=os.fsdecode(fields[2]),
        root=_unescaped(fields[3]),
        mount_point=_unescaped(fields[4]),
        fs_type=_unescaped(fields[separator + 1]),
        source=_unescaped(fields[separator + 2]),
        attributes=_attributes_of_words(fields[5]),
        options=",".join(word for word in own_options if word not in _GENERIC_OPTIONS),
        peer_group=int(tags.get(b"shared", 0)),
        master=int(tags.get(b"master", 0)),
        unbindable=b"unbindable" in tags,
    )


# Tables repeat a handful of combinations thousands of times, and building a flag costs as much as a whole
# entry.
@cache
def _attributes(bits: int) -> MountAttributes:
    return MountAttributes(bits) & _KNOWN_ATTRIBUTES


@cache
def _attributes_of_words(field: bytes) -> MountAttributes:
    words = set(os.fsdecode(field).split(","))
    bits = MountAttributes(0) if words & {"noatime", "relatime"} else MountAttributes.STRICT_ATIME
    for word in words:
        bits |= _ATTRIBUTE_WORDS.get(word, MountAttributes(0))
    return bits


def _unescaped(field: bytes) -> str:
    if b"\\" in field:
        field = _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field)
    return os.fsdecode(field)
