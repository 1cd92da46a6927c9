"""One layer onto disk, in overlayfs's form.

| in the archive                          | on disk                                                        |
| --------------------------------------- | -------------------------------------------------------------- |
| `.wh.NAME`, NAME exists beneath         | char 0:0; NAME in this layer stays, a directory becomes opaque |
| `.wh.NAME`, NAME does not exist beneath | nothing                                                        |
| `.wh..wh..opq`, wherever it comes       | trusted.overlay.opaque=y on the directory                      |
| a parent that this layer does not have  | the directory beneath with its attributes, or root's with 0755 |
| a hard link into a lower layer          | a hard link into that layer's tree                             |

See: https://github.com/opencontainers/image-spec/blob/main/layer.md
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from flatmount.errors import BadImage, FlatmountError, StoreError, from_os_error
from flatmount.image.tar import Entry, Kind, TarReader, show
from flatmount.kernel.tree import create_file
from flatmount.store.attributes import Attributes, kept, read_xattrs, set_xattrs
from flatmount.store.below import Below, Found
from flatmount.store.entries import LayerEntry
from flatmount.store.layer_tree import LayerTree, NoDirectory, from_status, join
from flatmount.store.model import Owners, RootAttributes, merge

_WHITEOUT: Final = b".wh."
_META: Final = b".wh..wh."  # AUFS's own files begin like this; only the opaque marker means something
_OPAQUE: Final = b".wh..wh..opq"
_LAST_ID: Final = 2**32 - 2
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SMALL_BYTES: Final = 1 << 20  # held in memory at once
_STORE_ERRORS: Final = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EACCES,
    }
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Where an archive stops being a layer.

    `depth` keeps the tree walkable with one descriptor for each level.
    """

    total_bytes: int
    entries: int = 2_000_000
    depth: int = 250
    path_bytes: int = 4000
    file_bytes: int = 1 << 40


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a layer turned out to be.

    `dependent`: on another chain the same archive might unpack to another tree. `complete`: every content of
    the archive is in the tree, and none was replaced by a later entry of the same name.
    """

    entries: dict[bytes, LayerEntry]
    root: RootAttributes | None
    owners: Owners
    files: int
    size_bytes: int
    dropped_xattrs: int
    dependent: bool
    complete: bool


def unpack(reader: TarReader, target_fd: int, below: Below, limits: Limits) -> Unpacked:
    """Write the layer that `reader` gives into the empty directory `target_fd`, which stays the caller's.

    Nothing is synced, and a failure leaves what is there so far.

    Raises: BadImage for an entry that no layer may have, StoreError where the file system does not take it;
    both name the entry.
    """
    unpacker = _Unpacker(target_fd, below, limits)
    try:
        return unpacker.run(reader)
    finally:
        unpacker.close()


class _Unpacker:
    def __init__(self, target_fd: int, below: Below, limits: Limits) -> None:
        self._below = below
        self._limits = limits
        self._tree = LayerTree(target_fd, below, path_bytes=limits.path_bytes, depth=limits.depth)
        self._root_given = False
        self._groups = 0
        self._size_bytes = 0
        self._dropped = 0
        self._complete = True
        self._identity = (os.geteuid(), os.getegid())

    def close(self) -> None:
        self._tree.close()

    def run(self, reader: TarReader) -> Unpacked:
        stored = 0
        for count, entry in enumerate(reader, 1):
            stored += entry.stored
            if count > self._limits.entries:
                raise BadImage(f"more than {self._limits.entries} entries", hint="this is no ordinary layer")
            if stored > self._limits.total_bytes:
                raise StoreError(
                    f"more than the {self._limits.total_bytes} bytes that are free in the store",
                    hint="free space there and try again; nothing was stored",
                )
            try:
                self._apply(entry, reader)
            except OSError as error:
                raise _explain(error, f"entry {show(entry.name)}") from error
            except FlatmountError as error:
                raise type(error)(f"entry {show(entry.name)}: {error}", hint=error.hint) from error
        try:
            self._tree.finish()
        except OSError as error:
            raise _explain(error, "the layer's directories") from error
        return self._result()

    def _parts(self, name: bytes, what: str) -> list[bytes]:
        if not name:
            raise BadImage(f"an empty {what}", hint="the image is malformed")
        if b"\0" in name:
            raise BadImage(f"a {what} with a NUL byte", hint="the image is malformed or hostile")
        if len(name) > self._limits.path_bytes:
            raise BadImage(f"a {what} of {len(name)} bytes", hint=f"{self._limits.path_bytes} are possible")
        parts = [part for part in name.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise BadImage(f"'..' in the {what} {show(name)}", hint="the image is malformed or hostile")
        return parts

    def _apply(self, entry: Entry, reader: TarReader) -> None:
        parts = self._parts(entry.name, "name")
        if not 0 <= entry.uid <= _LAST_ID or not 0 <= entry.gid <= _LAST_ID:
            raise BadImage(f"owner {entry.uid}:{entry.gid}", hint=f"ids end at {_LAST_ID}")
        if not parts:
            self._take_root(entry)
            return
        if _WHITEOUT in entry.name:
            if any(part.startswith(_META) for part in parts) and parts[-1] != _OPAQUE:
                return
            if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
                raise BadImage("an entry beneath a whiteout", hint="the image is malformed or hostile")
            if parts[-1].startswith(_WHITEOUT):
                self._hide(parts)
                return
        self._place(entry, self._tree.parent(parts[:-1]), parts[-1], reader)

    def _take_root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise BadImage(f"the root directory as a {entry.kind.value}", hint="the image is malformed or hostile")
        self._tree.root = self._directory_entry(entry)._replace(opaque=self._tree.root.opaque)
        self._root_given = True

    def _hide(self, parts: list[bytes]) -> None:
        """A whiteout or an opaque marker. Beneath what is no directory there is nothing to hide: umoci writes a
        whiteout for each file of a directory that became a file."""
        try:
            parent = self._tree.parent(parts[:-1])
        except NoDirectory:
            return
        if parts[-1] == _OPAQUE:
            self._tree.set_opaque(parent)
        else:
            self._white_out(parent, parts[-1].removeprefix(_WHITEOUT))

    def _white_out(self, parent: bytes, name: bytes) -> None:
        if name in (b"", b".", b".."):
            raise BadImage("a whiteout of no name", hint="the image is malformed or hostile")
        path = join(parent, name)
        entry = self._tree.entries.get(path)
        if entry is None:
            if self._tree.look_up(parent, path) is not None:
                self._tree.make_whiteout(parent, name)
        elif entry.kind is Kind.DIRECTORY:
            self._tree.set_opaque(path)

    def _place(self, entry: Entry, parent: bytes, name: bytes, reader: TarReader) -> None:
        path = join(parent, name)
        old = self._tree.entries.get(path)
        if old is not None:
            if entry.kind is Kind.DIRECTORY and old.kind is Kind.DIRECTORY:
                self._tree.entries[path] = self._directory_entry(entry)._replace(opaque=old.opaque)
                return
            if entry.kind is Kind.LINK and self._link_target(entry)[1] == path:
                return
            self._complete &= old.kind not in (Kind.FILE, Kind.DIRECTORY)
            self._tree.remove(path)
        if entry.kind is Kind.DIRECTORY:
            # What it replaces had hidden the lower directory of this name, if there is one.
            self._tree.make_directory(path, self._directory_entry(entry)._replace(opaque=old is not None))
        elif entry.kind is Kind.LINK:
            self._make_link(entry, parent, name)
        elif entry.kind is Kind.FILE:
            self._tree.record(path, self._make_file(entry, parent, name, reader))
        else:
            self._tree.record(path, self._make_special(entry, self._tree.fd(parent), name))

    def _directory_entry(self, entry: Entry) -> LayerEntry:
        return LayerEntry(
            Kind.DIRECTORY, entry.mode, entry.uid, entry.gid, entry.mtime_ns, xattrs=self._kept_xattrs(entry)
        )

    def _make_file(self, entry: Entry, parent: bytes, name: bytes, reader: TarReader) -> LayerEntry:
        if entry.size > self._limits.file_bytes:
            raise BadImage(f"a file of {entry.size} bytes", hint=f"{self._limits.file_bytes} are possible")
        xattrs = self._kept_xattrs(entry)
        self._size_bytes += entry.size
        if entry.extents is None and entry.stored <= _SMALL_BYTES and not xattrs:
            reader.claim(join(parent, name))
            data = reader.content()
            owner = (entry.uid, entry.gid)
            create_file(self._tree.fd(parent), name, data, owner=owner, mode=entry.mode, mtime_ns=entry.mtime_ns)
            return _file_entry(entry, hashlib.sha256(data).hexdigest())
        digest = hashlib.sha256()
        file = os.open(name, _CREATE, 0o600, dir_fd=self._tree.fd(parent))
        reader.claim(join(parent, name))
        try:
            if entry.extents is None:
                for piece in reader.data():
                    digest.update(piece)
                    _write(file, piece)
            else:
                os.ftruncate(file, entry.size)
                _write_extents(file, entry, reader.data(), digest.update)
            # Owner before mode and capability: changing the owner clears both.
            if (entry.uid, entry.gid) != self._identity:
                os.chown(file, entry.uid, entry.gid)
            if entry.mode != 0o600:
                os.chmod(file, entry.mode)
            for key, value in xattrs:
                os.setxattr(file, key, value)
            os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(file)
        return _file_entry(entry, digest.hexdigest(), xattrs)

    def _make_special(self, entry: Entry, fd: int, name: bytes) -> LayerEntry:
        xattrs = self._kept_xattrs(entry)
        device = None
        if entry.kind is Kind.SYMLINK:
            if not entry.target or b"\0" in entry.target or len(entry.target) >= 4096:
                raise BadImage("a symbolic link without a usable target", hint="the image is malformed")
            os.symlink(entry.target, name, dir_fd=fd)
        elif entry.kind is Kind.FIFO:
            os.mkfifo(name, 0o600, dir_fd=fd)
        else:
            device = (entry.major, entry.minor)
            if entry.kind is Kind.CHAR and device == (0, 0):
                raise BadImage("a character device 0:0, which is overlayfs's whiteout", hint="the image is hostile")
            if entry.major >= 1 << 12 or entry.minor >= 1 << 20:
                raise BadImage(f"device {entry.major}:{entry.minor}", hint="the kernel has no such numbers")
            kind = stat.S_IFCHR if entry.kind is Kind.CHAR else stat.S_IFBLK
            os.mknod(name, kind | 0o600, os.makedev(*device), dir_fd=fd)
        os.chown(name, entry.uid, entry.gid, dir_fd=fd, follow_symlinks=False)
        mode = entry.mode
        if entry.kind is Kind.SYMLINK:
            mode = 0o777
        else:
            os.chmod(name, mode, dir_fd=fd)
        set_xattrs(fd, name, xattrs)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=fd, follow_symlinks=False)
        return LayerEntry(
            entry.kind,
            mode,
            entry.uid,
            entry.gid,
            entry.mtime_ns,
            target=entry.target if entry.kind is Kind.SYMLINK else b"",
            device=device,
            xattrs=xattrs,
        )

    def _link_target(self, entry: Entry) -> tuple[bytes, bytes]:
        """Parent and path of what a hard link points to; like link(2), without following the last component."""
        parts = self._parts(entry.target, "link target")
        if not parts or any(part.startswith(_WHITEOUT) for part in parts):
            raise BadImage(f"a hard link to {show(entry.target)}", hint="the image is malformed or hostile")
        parent = self._tree.parent(parts[:-1])
        return parent, join(parent, parts[-1])

    def _make_link(self, entry: Entry, parent: bytes, name: bytes) -> None:
        target_parent, target = self._link_target(entry)
        source = self._tree.entries.get(target)
        path = join(parent, name)
        wrong = BadImage(f"a hard link to {show(entry.target)}, which is no file", hint="the image is malformed")
        if source is not None:
            if source.kind in (None, Kind.DIRECTORY):
                raise wrong
            if source.group is None:
                self._groups += 1
                source = self._tree.entries[target] = source._replace(group=self._groups)
            # A descriptor of our own: opening the other parent may close the tree's, and its number mean another.
            from_fd = os.dup(self._tree.fd(target_parent))
            try:
                self._link(from_fd, target.rpartition(b"/")[2], parent, name)
            finally:
                os.close(from_fd)
            self._tree.record(path, source)
            return
        found = self._tree.look_up(target_parent, target)
        if found is None or found.is_directory:
            raise wrong
        self._link(self._below.data_fd, found.source, parent, name)
        self._tree.record(path, self._linked_below(found))

    def _link(self, from_fd: int, source: bytes, parent: bytes, name: bytes) -> None:
        to_fd = self._tree.fd(parent)
        os.link(source, name, src_dir_fd=from_fd, dst_dir_fd=to_fd, follow_symlinks=False)

    def _linked_below(self, found: Found) -> LayerEntry:
        mode = found.status.st_mode
        entry = from_status(_KINDS[stat.S_IFMT(mode)], found.status)._replace(
            below=found.source.split(b"/", 2)[2], xattrs=read_xattrs(self._below.data_fd, found.source)
        )
        if stat.S_ISLNK(mode):
            return entry._replace(target=os.readlink(found.source, dir_fd=self._below.data_fd))
        if stat.S_ISREG(mode):
            return entry._replace(size=found.status.st_size)
        if stat.S_ISFIFO(mode):
            return entry
        return entry._replace(device=(os.major(found.status.st_rdev), os.minor(found.status.st_rdev)))

    def _kept_xattrs(self, entry: Entry) -> Attributes:
        wanted = kept(entry.xattrs)
        self._dropped += len(entry.xattrs) - len(wanted)
        return wanted

    def _result(self) -> Unpacked:
        real = [entry for entry in self._tree.entries.values() if entry.kind is not None]
        uids, gids = {entry.uid for entry in real}, {entry.gid for entry in real}
        root = None
        if self._root_given:
            root = RootAttributes(
                self._tree.root.mode, self._tree.root.uid, self._tree.root.gid, self._tree.root.mtime_ns
            )
            uids.add(root.uid)
            gids.add(root.gid)
        return Unpacked(
            entries=dict(sorted(self._tree.entries.items())),
            root=root,
            owners=Owners(_spans(uids), _spans(gids)),
            files=sum(entry.kind is not Kind.DIRECTORY for entry in real),
            size_bytes=self._size_bytes,
            dropped_xattrs=self._dropped,
            dependent=self._below.consulted,
            complete=self._complete,
        )


_KINDS: Final = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
}


def _file_entry(entry: Entry, digest: str, xattrs: Attributes = ()) -> LayerEntry:
    return LayerEntry(
        Kind.FILE,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
        entry.size,
        digest,
        xattrs=xattrs,
        extents=entry.extents,
    )


def _spans(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return merge((id_, id_) for id_ in ids)


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _write_extents(fd: int, entry: Entry, pieces: Iterator[memoryview], digest: Callable[[memoryview], object]) -> None:
    piece = memoryview(b"")
    for extent in entry.extents or ():
        at, end = extent.offset, extent.offset + extent.length
        while at < end:
            piece = piece or next(pieces)
            part = piece[: end - at]
            digest(part)
            at += _pwrite(fd, part, at)
            piece = piece[len(part) :]


def _pwrite(fd: int, data: memoryview, at: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
    return done


def _explain(error: OSError, where: str) -> FlatmountError:
    """Is it the image's fault or the store's?"""
    if error.errno in _STORE_ERRORS:
        told = from_os_error(OSError(error.errno, error.strerror), f"{where}: write")
        return StoreError(str(told), hint=told.hint)
    if error.errno == errno.EPERM:
        return StoreError(f"{where}: {error.strerror} [EPERM]", hint="run as root: an image has owners and devices")
    if error.errno == errno.EOPNOTSUPP:
        return StoreError(
            f"{where}: the store's file system does not take its extended attributes [EOPNOTSUPP]",
            hint="keep the store on another file system: ext4, xfs, btrfs, or a tmpfs of Linux 6.6",
        )
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return BadImage(f"{where}: {error.strerror} [{name}]", hint="the image is malformed or hostile")
