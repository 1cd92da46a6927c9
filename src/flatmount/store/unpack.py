"""One layer onto disk, in overlayfs's form.

Every name is resolved here, against what this layer has so far and the chain beneath it, and never by the
kernel: a link on the way is looked up inside the image, whatever it points to. The kernel sees single
components below descriptors of directories that this module has made, always with O_NOFOLLOW.

| in the archive                          | on disk
|
| --------------------------------------- |
------------------------------------------------------------------------- |
| `.wh.NAME`, NAME exists beneath         | char 0:0 called NAME; with NAME in this layer, that stays and is
opaque   |
| `.wh.NAME`, NAME does not exist beneath | nothing
|
| `.wh..wh..opq`, at any place            | trusted.overlay.opaque=y on the directory                        |
| a parent that this layer does not have  | the directory beneath with its attributes, or root's with mode
0755       |
| a hard link into a lower layer          | a hard link into that layer's tree
|

See: https://github.com/opencontainers/image-spec/blob/main/layer.md
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from flatmount.errors import BadImage, FlatmountError, StoreError, from_os_error
from flatmount.image.tar import Entry, Kind, TarReader, show
from flatmount.store.below import OPAQUE, Below, Found, Stack
from flatmount.store.entries import LayerEntry
from flatmount.store.model import Owners, RootAttributes, merge

_WHITEOUT: Final = b".wh."
_META: Final = b".wh..wh."  # AUFS's own files begin like this; only the opaque marker means something
_OPAQUE: Final = b".wh..wh..opq"
_LINKS: Final = 40  # as in the kernel's path walk
_OPEN_DIRECTORIES: Final = 128
_LAST_ID: Final = 2**32 - 2
_OVERLAY: Final = (b"trusted.overlay.", b"user.overlay.")
_ATTRIBUTE_CLASSES: Final = (b"user.", b"trusted.", b"security.", b"system.")
_HOST_LABEL: Final = b"security.selinux"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
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

    `dependent`: on another chain the same archive might unpack to another tree.
    """

    entries: dict[bytes, LayerEntry]
    root: RootAttributes | None
    owners: Owners
    files: int
    size_bytes: int
    dropped_xattrs: int
    dependent: bool


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
        self._root_fd = target_fd
        self._root = LayerEntry(Kind.DIRECTORY, 0o755)
        self._root_given = False
        self._entries: dict[bytes, LayerEntry] = {}
        self._children: dict[bytes, set[bytes]] = {b"": set()}
        self._stacks: dict[bytes, Stack] = {}
        self._resolved: dict[bytes, bytes] = {b"": b""}
        self._through_below = False
        self._fds: OrderedDict[bytes, int] = OrderedDict()
        self._groups = 0
        self._size_bytes = 0
        self._dropped = 0
        self._identity = (os.geteuid(), os.getegid())

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

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
            self._finish()
        except OSError as error:
            raise _explain(error, "the layer's directories") from error
        return self._result()

    # Names.

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

    def _parent(self, parts: list[bytes]) -> bytes:
        """The directory that `parts` lead to, inside the image, made where this layer does not have it."""
        asked = b"/".join(parts)
        known = self._resolved.get(asked)
        if known is None:
            self._through_below = False
            known = self._walk(parts)
            # A link of a lower layer can be replaced by this layer at any moment, and nothing would be
            # removed for it.
            if not self._through_below:
                self._resolved[asked] = known
        return known

    def _walk(self, parts: list[bytes]) -> bytes:
        here, links = b"", 0
        todo = parts[::-1]
        while todo:
            part = todo.pop()
            if not part or part == b".":
                continue
            if part == b"..":
                here = here.rpartition(b"/")[0]
                continue
            path = _join(here, part)
            entry = self._entries.get(path)
            target = None
            if entry is None:
                target = self._implicit(here, path)
            elif entry.kind is Kind.SYMLINK:
                target = entry.target
            elif entry.kind is None:
                self._remove(path)
                self._make_directory(path, LayerEntry(Kind.DIRECTORY, 0o755, opaque=True))
            elif entry.kind is not Kind.DIRECTORY:
                raise BadImage(f"{show(path)} on the way is a {entry.kind.value}", hint="the image is malformed")
            if target is None:
                here = path
                continue
            links += 1
            if links > _LINKS:
                raise BadImage(
                    f"more than {_LINKS} symbolic links on the way", hint="the image is malformed or hostile"
                )
            here = b"" if target.startswith(b"/") else here
            todo.extend(reversed(target.split(b"/")))
        return here

    def _implicit(self, here: bytes, path: bytes) -> bytes | None:
        """Make a directory that the archive takes for granted; or the target of the link that the chain has."""
        found = self._look_up(here, path)
        if found is None:
            self._make_directory(path, LayerEntry(Kind.DIRECTORY, 0o755))
            return None
        mode = found.status.st_mode
        if stat.S_ISLNK(mode):
            self._through_below = True
            return os.readlink(found.source, dir_fd=self._below.data_fd)
        if not stat.S_ISDIR(mode):
            raise BadImage(f"{show(path)} on the way is no directory in a lower layer", hint="the image is malformed")
        xattrs = _read_xattrs(self._below.data_fd, found.source)
        self._make_directory(path, _from_status(Kind.DIRECTORY, found.status)._replace(xattrs=xattrs))
        return None

    def _look_up(self, parent: bytes, path: bytes) -> Found | None:
        return self._below.look_up(self._stack(parent), path)

    def _stack(self, path: bytes) -> Stack:
        """Which lower layers this directory is merged with."""
        stack = self._stacks.get(path)
        if stack is None:
            if self._entry(path).opaque:
                stack = ()
            elif not path:
                stack = self._below.root
            else:
                stack = self._below.stack(self._stack(path.rpartition(b"/")[0]), path)
            self._stacks[path] = stack
        return stack

    def _entry(self, directory: bytes) -> LayerEntry:
        return self._entries[directory] if directory else self._root

    # The tree.

    def _fd(self, path: bytes) -> int:
        """A descriptor of a directory of this layer, kept open while it is among those used last."""
        if not path:
            return self._root_fd
        fd = self._fds.get(path)
        if fd is not None:
            self._fds.move_to_end(path)
            return fd
        parent, _, name = path.rpartition(b"/")
        fd = os.open(name, _DIRECTORY, dir_fd=self._fd(parent))
        self._fds[path] = fd
        if len(self._fds) > _OPEN_DIRECTORIES:
            os.close(self._fds.popitem(last=False)[1])
        return fd

    def _record(self, path: bytes, entry: LayerEntry) -> None:
        self._entries[path] = entry
        parent, _, name = path.rpartition(b"/")
        self._children[parent].add(name)

    def _make_directory(self, path: bytes, entry: LayerEntry) -> None:
        """Private until the end: attributes of directories come last, when nothing is added any more."""
        if len(path) > self._limits.path_bytes or path.count(b"/") >= self._limits.depth:
            raise BadImage(
                f"a directory {path.count(b'/') + 1} levels deep, with a path of {len(path)} bytes",
                hint=f"{self._limits.depth} levels and {self._limits.path_bytes} bytes are possible",
            )
        parent, _, name = path.rpartition(b"/")
        os.mkdir(name, 0o700, dir_fd=self._fd(parent))
        self._children[path] = set()
        self._record(path, entry)

    def _remove(self, path: bytes) -> None:
        """Take a name of this layer away again, because a later entry replaces it."""
        parent, _, name = path.rpartition(b"/")
        entry = self._entries[path]
        if entry.kind is Kind.DIRECTORY:
            for child in list(self._children[path]):
                self._remove(_join(path, child))
            del self._children[path]
            self._stacks.pop(path, None)
            fd = self._fds.pop(path, None)
            if fd is not None:
                os.close(fd)
            os.rmdir(name, dir_fd=self._fd(parent))
        else:
            os.unlink(name, dir_fd=self._fd(parent))
        self._resolved = {b"": b""}
        self._children[parent].discard(name)
        del self._entries[path]

    # Entries.

    def _apply(self, entry: Entry, reader: TarReader) -> None:
        parts = self._parts(entry.name, "name")
        if not 0 <= entry.uid <= _LAST_ID or not 0 <= entry.gid <= _LAST_ID:
            raise BadImage(f"owner {entry.uid}:{entry.gid}", hint=f"ids end at {_LAST_ID}")
        if not parts:
            self._take_root(entry)
            return
        if any(part.startswith(_META) for part in parts) and parts[-1] != _OPAQUE:
            return
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
            raise BadImage("an entry beneath a whiteout", hint="the image is malformed or hostile")
        parent = self._parent(parts[:-1])
        if parts[-1] == _OPAQUE:
            self._set_opaque(parent)
        elif parts[-1].startswith(_WHITEOUT):
            self._white_out(parent, parts[-1].removeprefix(_WHITEOUT))
        else:
            self._place(entry, parent, parts[-1], reader)

    def _take_root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise BadImage(f"the root directory as a {entry.kind.value}", hint="the image is malformed or hostile")
        self._root = self._directory_entry(entry)._replace(opaque=self._root.opaque)
        self._root_given = True

    def _set_opaque(self, path: bytes) -> None:
        if path:
            self._entries[path] = self._entries[path]._replace(opaque=True)
        else:
            self._root = self._root._replace(opaque=True)
        self._stacks.clear()

    def _white_out(self, parent: bytes, name: bytes) -> None:
        if name in (b"", b".", b".."):
            raise BadImage("a whiteout of no name", hint="the image is malformed or hostile")
        path = _join(parent, name)
        entry = self._entries.get(path)
        if entry is None:
            if self._look_up(parent, path) is not None:
                self._make_whiteout(parent, name)
        elif entry.kind is Kind.DIRECTORY:
            self._set_opaque(path)

    def _make_whiteout(self, parent: bytes, name: bytes) -> None:
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=self._fd(parent))
        self._record(_join(parent, name), LayerEntry(None))

    def _place(self, entry: Entry, parent: bytes, name: bytes, reader: TarReader) -> None:
        path = _join(parent, name)
        old = self._entries.get(path)
        if old is not None:
            if entry.kind is Kind.DIRECTORY and old.kind is Kind.DIRECTORY:
                self._entries[path] = self._directory_entry(entry)._replace(opaque=old.opaque)
                return
            if entry.kind is Kind.LINK and self._link_target(entry)[1] == path:
                return
            self._remove(path)
        if entry.kind is Kind.DIRECTORY:
            # What it replaces had hidden the lower directory of this name, if there is one.
            self._make_directory(path, self._directory_entry(entry)._replace(opaque=old is not None))
        elif entry.kind is Kind.LINK:
            self._make_link(entry, parent, name)
        elif entry.kind is Kind.FILE:
            self._record(path, self._make_file(entry, self._fd(parent), name, reader))
        else:
            self._record(path, self._make_special(entry, self._fd(parent), name))

    def _directory_entry(self, entry: Entry) -> LayerEntry:
        return LayerEntry(
            Kind.DIRECTORY, entry.mode, entry.uid, entry.gid, entry.mtime_ns, xattrs=self._kept_xattrs(entry)
        )

    def _make_file(self, entry: Entry, fd: int, name: bytes, reader: TarReader) -> LayerEntry:
        if entry.size > self._limits.file_bytes:
            raise BadImage(f"a file of {entry.size} bytes", hint=f"{self._limits.file_bytes} are possible")
        xattrs = self._kept_xattrs(entry)
        digest = hashlib.sha256()
        file = os.open(name, _CREATE, 0o600, dir_fd=fd)
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
        self._size_bytes += entry.size
        return LayerEntry(
            Kind.FILE,
            entry.mode,
            entry.uid,
            entry.gid,
            entry.mtime_ns,
            entry.size,
            digest.hexdigest(),
            xattrs=xattrs,
            extents=entry.extents,
        )

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
        _set_xattrs(fd, name, xattrs)
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
        parent = self._parent(parts[:-1])
        return parent, _join(parent, parts[-1])

    def _make_link(self, entry: Entry, parent: bytes, name: bytes) -> None:
        target_parent, target = self._link_target(entry)
        source = self._entries.get(target)
        path = _join(parent, name)
        wrong = BadImage(f"a hard link to {show(entry.target)}, which is no file", hint="the image is malformed")
        if source is not None:
            if source.kind in (None, Kind.DIRECTORY):
                raise wrong
            if source.group is None:
                self._groups += 1
                source = self._entries[target] = source._replace(group=self._groups)
            self._link(self._fd(target_parent), target.rpartition(b"/")[2], parent, name)
            self._record(path, source)
            return
        found = self._look_up(target_parent, target)
        if found is None or found.is_directory:
            raise wrong
        self._link(self._below.data_fd, found.source, parent, name)
        self._record(path, self._linked_below(found))

    def _link(self, from_fd: int, source: bytes, parent: bytes, name: bytes) -> None:
        to_fd = self._fd(parent)
        os.link(source, name, src_dir_fd=from_fd, dst_dir_fd=to_fd, follow_symlinks=False)

    def _linked_below(self, found: Found) -> LayerEntry:
        mode = found.status.st_mode
        entry = _from_status(_KINDS[stat.S_IFMT(mode)], found.status)._replace(
            below=found.source.split(b"/", 2)[2], xattrs=_read_xattrs(self._below.data_fd, found.source)
        )
        if stat.S_ISLNK(mode):
            return entry._replace(target=os.readlink(found.source, dir_fd=self._below.data_fd))
        if stat.S_ISREG(mode):
            return entry._replace(size=found.status.st_size)
        if stat.S_ISFIFO(mode):
            return entry
        return entry._replace(device=(os.major(found.status.st_rdev), os.minor(found.status.st_rdev)))

    def _kept_xattrs(self, entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
        """An image must not speak overlayfs's private language, and the host's labels are the host's."""
        kept = tuple((key, value) for key, value in entry.xattrs if not key.startswith(_OVERLAY) and key != _HOST_LABEL)
        self._dropped += len(entry.xattrs) - len(kept)
        for key, _ in kept:
            if not key.startswith(_ATTRIBUTE_CLASSES) or b"\0" in key:
                raise BadImage(f"an extended attribute called {show(key)}", hint="the kernel has no such attributes")
        return kept

    # The end.

    def _finish(self) -> None:
        if self._root.opaque:
            self._hide_root()
        for path, entry in list(self._entries.items()):
            # A directory that is not merged shows its whiteouts to readdir, and has no use for them.
            if entry.kind is None and not self._stack(path.rpartition(b"/")[0]):
                self._remove(path)
        for path, entry in self._entries.items():
            if entry.kind is Kind.DIRECTORY:
                self._finish_directory(path, entry)
        self._finish_directory(b".", self._root)

    def _hide_root(self) -> None:
        """Overlayfs does not look for an opaque mark on a layer's root: whiteouts say the same."""
        self._root = self._root._replace(opaque=False)
        self._stacks.clear()
        for name in sorted(self._below.root_names()):
            found = self._look_up(b"", name)
            if found is None:
                continue
            entry = self._entries.get(name)
            if entry is None:
                self._make_whiteout(b"", name)
            elif entry.kind is Kind.DIRECTORY and found.is_directory:
                self._set_opaque(name)

    def _finish_directory(self, path: bytes, entry: LayerEntry) -> None:
        root = self._root_fd
        os.chown(path, entry.uid, entry.gid, dir_fd=root, follow_symlinks=False)
        os.chmod(path, entry.mode, dir_fd=root)
        _set_xattrs(root, path, entry.xattrs)
        if entry.opaque:
            _set_xattrs(root, path, ((os.fsencode(OPAQUE), b"y"),))
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=root, follow_symlinks=False)

    def _result(self) -> Unpacked:
        real = [entry for entry in self._entries.values() if entry.kind is not None]
        uids, gids = {entry.uid for entry in real}, {entry.gid for entry in real}
        root = None
        if self._root_given:
            root = RootAttributes(self._root.mode, self._root.uid, self._root.gid, self._root.mtime_ns)
            uids.add(root.uid)
            gids.add(root.gid)
        return Unpacked(
            entries=dict(sorted(self._entries.items())),
            root=root,
            owners=Owners(_spans(uids), _spans(gids)),
            files=sum(entry.kind is not Kind.DIRECTORY for entry in real),
            size_bytes=self._size_bytes,
            dropped_xattrs=self._dropped,
            dependent=self._below.consulted,
        )


_KINDS: Final = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
}


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _spans(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return merge((id_, id_) for id_ in ids)


def _from_status(kind: Kind, status: os.stat_result) -> LayerEntry:
    return LayerEntry(kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)


def _proc(fd: int, path: bytes) -> bytes:
    """A path that reaches attributes of links and nodes, which no descriptor for reading or writing does."""
    return b"/proc/self/fd/%d/%b" % (fd, path)


def _set_xattrs(fd: int, path: bytes, xattrs: Iterable[tuple[bytes, bytes]]) -> None:
    for key, value in xattrs:
        os.setxattr(_proc(fd, path), key, value, follow_symlinks=False)


def _read_xattrs(fd: int, path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    where = _proc(fd, path)
    names = [os.fsencode(name) for name in os.listxattr(where, follow_symlinks=False)]
    return tuple(
        (name, os.getxattr(where, name, follow_symlinks=False))
        for name in names
        if not name.startswith(_OVERLAY) and name != _HOST_LABEL
    )


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
