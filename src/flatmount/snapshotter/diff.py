"""A snapshot's own changes as an OCI layer, with the ids of the image whatever the container's range is.

containerd's own diff compares two mounts: in a container with a user range every file that it looks at has another
owner than below, and what it finds changed it enters with the host's ids. The upper knows better.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, cast

from flatmount.errors import StoreError, UsageError, from_os_error
from flatmount.image.layer_tar import OPAQUE, WHITEOUT
from flatmount.plan.mapping import Mapping
from flatmount.snapshotter import book
from flatmount.snapshotter.model import Snapshot, SnapshotNotFound
from flatmount.snapshotter.trees import inverted
from flatmount.store.database import Database
from flatmount.store.disk import Disk

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CONTENT = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
# What a name stands for, without opening it: a container may put a device in its place at any moment.
_THING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OVERLAY = "trusted.overlay."
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
_CAPABILITY = "security.capability"
# linux/posix_acl_xattr.h: a header, then tag, permissions and id for each.
_ACL_HEADER = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 0x02, 0x08
# linux/capability.h: VFS_CAP_REVISION_2 and _3; the latter has the root's id behind the former.
_CAP_WORD = struct.Struct("<I")
_CAP_2, _CAP_3, _CAP_REVISIONS = 0x02000000, 0x03000000, 0xFF000000
_CAP_2_BYTES = 20

Translate = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Written:
    """A layer that was written: its `diff_id`, and what it holds."""

    diff_id: str
    size_bytes: int
    entries: int


def find_snapshot(root: str, key: str) -> tuple[Snapshot, Snapshot | None]:
    """The snapshot called `key` in the store at `root`, and its parent. A running service is not disturbed.

    Args:
        key: its name, or the last part of one as containerd makes them (NAMESPACE/NUMBER/KEY) where that is one only.

    Raises: SnapshotNotFound, UsageError, StoreError.
    """
    database = Database(os.path.join(root, "v1", "state.db"))
    try:
        with database.reading() as db:
            try:
                found = book.find(db, key)
            except SnapshotNotFound:
                matching = [one for one in book.everything(db) if one.info.name.endswith(f"/{key}")]
                if not matching:
                    raise
                if len(matching) > 1:
                    names = ", ".join(one.info.name for one in matching[:3])
                    raise UsageError(
                        f"{key!r} is the key of several snapshots: {names}", hint="give one whole"
                    ) from None
                (found,) = matching
            return found, book.find(db, found.info.parent) if found.info.parent else None
    finally:
        database.close()


def write_layer(disk: Disk, snapshot: Snapshot, parent: Snapshot | None, out: IO[bytes]) -> Written:
    """Write an uncompressed OCI layer of what `snapshot` changes on its parent to `out`.

    Owners, those in ACLs and the root of file capabilities are the image's. Whiteouts and opaque directories become the
    files that OCI names; overlayfs's own attributes are left out, and so are sockets, which no archive can hold. The
    snapshot may be in use: a file that shrinks meanwhile is filled up with zeros, and one that is removed is left out.
    A descriptor is held for each directory above the one that is read.

    Raises: MappingError, where a file belongs to nobody in the container's range; StoreError for a name that OCI keeps
    for itself, for an attribute whose name is not UTF-8, and for a snapshot that is removed meanwhile.
    """
    counted = _Counted(out)
    with tarfile.open(fileobj=cast("IO[bytes]", counted), mode="w|", format=tarfile.PAX_FORMAT) as tar:
        layer = _Layer(disk, snapshot, tar)
        try:
            layer.write(parent)
        except OSError as error:
            raise from_os_error(error, f"read snapshot {snapshot.info.name!r}:") from error
    return Written(f"sha256:{counted.digest.hexdigest()}", counted.size_bytes, layer.entries)


class _Counted:
    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size_bytes += len(data)
        self._out.write(data)
        return len(data)


class _Layer:
    def __init__(self, disk: Disk, snapshot: Snapshot, tar: tarfile.TarFile) -> None:
        self._disk = disk
        self._snapshot = snapshot
        self._tar = tar
        self._names: dict[int, str] = {}
        self._uid: Translate = int
        self._gid: Translate = int
        if snapshot.host_ids and snapshot.mapping is not None:
            back: Mapping = inverted(snapshot.mapping)
            self._uid, self._gid = back.host_uid, back.host_gid
        self.entries = 0

    def write(self, parent: Snapshot | None) -> None:
        root = os.open(self._snapshot.fs, _DIRECTORY, dir_fd=self._disk.data_fd)
        try:
            if parent is not None and self._root_changed(root, parent):
                self._add("./", os.fstat(root), root)
            self._below(root)
            # Files that are gone are left out; a whole snapshot that is being deleted is no layer.
            if not self._is_there(root):
                raise StoreError(f"snapshot {self._snapshot.info.name!r} was removed while it was read")
        finally:
            os.close(root)

    def _is_there(self, root: int) -> bool:
        try:
            status = os.stat(self._snapshot.fs, dir_fd=self._disk.data_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(root))

    def _root_changed(self, root: int, parent: Snapshot) -> bool:
        own = os.fstat(root)
        below = os.stat(parent.fs, dir_fd=self._disk.data_fd, follow_symlinks=False)
        mine = (stat.S_IMODE(own.st_mode), self._uid(own.st_uid), self._gid(own.st_gid))
        return mine != (stat.S_IMODE(below.st_mode), below.st_uid, below.st_gid)

    def _below(self, root: int) -> None:
        # Not by recursion: a container may make directories deeper than Python's stack.
        above: list[tuple[int, str, Iterator[str]]] = [(os.dup(root), "", _names(root))]
        try:
            while above:
                fd, path, names = above[-1]
                name = next(names, None)
                if name is None:
                    os.close(fd)
                    above.pop()
                    continue
                with suppress(FileNotFoundError):  # removed since it was listed
                    below = self._entry(fd, path, name)
                    if below is not None:
                        above.append((below, f"{path}{name}/", _names(below)))
        finally:
            for fd, _, _ in above:
                os.close(fd)

    def _entry(self, fd: int, path: str, name: str) -> int | None:
        """Write one entry of a directory. Returns a descriptor to go on in where it is one itself."""
        if name.startswith(WHITEOUT):
            raise StoreError(f"{path}{name} cannot be in a layer: OCI keeps names with {WHITEOUT} for itself")
        whole = f"{path}{name}"
        thing = os.open(name, _THING, dir_fd=fd)
        try:
            status = os.fstat(thing)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                self._mark(f"{path}{WHITEOUT}{name}", status)
            elif stat.S_ISDIR(status.st_mode):
                self._add(f"{whole}/", status, thing)
                if _attribute(thing, _OVERLAY + "opaque") == b"y":
                    self._mark(f"{whole}/{OPAQUE}", status)
                return os.open(_proc(thing), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            elif not stat.S_ISSOCK(status.st_mode):
                self._add(whole, status, thing)
        finally:
            os.close(thing)
        return None

    def _mark(self, path: str, status: os.stat_result) -> None:
        entry = tarfile.TarInfo(path)
        entry.mtime = int(status.st_mtime)
        self._tar.addfile(entry)
        self.entries += 1

    def _add(self, path: str, status: os.stat_result, thing: int) -> None:
        entry = tarfile.TarInfo(path)
        records: dict[str, str] = {}
        entry.pax_headers = records
        entry.mode = stat.S_IMODE(status.st_mode)
        entry.uid, entry.gid = self._uid(status.st_uid), self._gid(status.st_gid)
        entry.mtime = int(status.st_mtime)
        seconds, rest = divmod(status.st_mtime_ns, 10**9)
        if rest:
            records["mtime"] = f"{seconds}.{rest:09}"
        self.entries += 1
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            first = self._names.setdefault(status.st_ino, path)
            if first != path:
                entry.type, entry.linkname = tarfile.LNKTYPE, first
                self._tar.addfile(entry)
                return
        for name, value in self._attributes(path, thing):
            records[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
        if stat.S_ISREG(status.st_mode):
            entry.size = status.st_size
            with open(os.open(_proc(thing), _CONTENT), "rb") as file:
                self._tar.addfile(entry, _Exactly(file))
            return
        if stat.S_ISLNK(status.st_mode):
            entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=thing)
        elif stat.S_ISDIR(status.st_mode):
            entry.type = tarfile.DIRTYPE
        elif stat.S_ISFIFO(status.st_mode):
            entry.type = tarfile.FIFOTYPE
        else:
            entry.type = tarfile.CHRTYPE if stat.S_ISCHR(status.st_mode) else tarfile.BLKTYPE
            entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        self._tar.addfile(entry)

    def _attributes(self, path: str, thing: int) -> list[tuple[str, bytes]]:
        found = []
        for name in sorted(os.listxattr(_proc(thing))):
            if name.startswith(_OVERLAY):
                continue
            if not _is_utf8(name):
                raise StoreError(f"{path!r} cannot be in a layer: the name of its attribute {name!r} is not UTF-8")
            value = _attribute(thing, name)
            if value is None:
                continue
            if name in _ACLS:
                value = self._acl(value)
            elif name == _CAPABILITY:
                value = _capability(value)
            found.append((name, value))
        return found

    def _acl(self, value: bytes) -> bytes:
        entries = [_ACL_ENTRY.unpack_from(value, at) for at in range(_ACL_HEADER.size, len(value), _ACL_ENTRY.size)]
        translate: dict[int, Translate] = {_ACL_USER: self._uid, _ACL_GROUP: self._gid}
        moved = (_ACL_ENTRY.pack(tag, perm, translate.get(tag, int)(one)) for tag, perm, one in entries)
        return value[: _ACL_HEADER.size] + b"".join(moved)


class _Exactly:
    """Reads a file that may shrink meanwhile as long as it was."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(size).ljust(size, b"\0")


def _capability(value: bytes) -> bytes:
    """File capabilities as an image has them: those of the container's root, which is nobody in particular there."""
    (magic,) = _CAP_WORD.unpack_from(value)
    if magic & _CAP_REVISIONS != _CAP_3:
        return value
    return _CAP_WORD.pack(magic & ~_CAP_REVISIONS | _CAP_2) + value[_CAP_WORD.size : _CAP_2_BYTES]


def _names(directory: int) -> Iterator[str]:
    try:
        yield from sorted(os.listdir(directory))
    except FileNotFoundError:
        return  # removed while it was open


def _proc(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _is_utf8(name: str) -> bool:
    # Bytes that are not came from the kernel as lone surrogates.
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def _attribute(thing: int, name: str) -> bytes | None:
    """An attribute of what is open, which may be a link; None for none."""
    try:
        return os.getxattr(_proc(thing), name)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None
