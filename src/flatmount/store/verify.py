"""Trees on disk held against what was unpacked: a layer against its entries, a flat tree against its layers.

Nothing is changed here. A difference is one line of text that names the path; a tree without differences gives none.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flatmount.image.tar import Kind, show
from flatmount.store.attributes import read_xattrs
from flatmount.store.below import OPAQUE
from flatmount.store.entries import LayerEntry
from flatmount.store.model import RootAttributes

Entries = Mapping[bytes, LayerEntry]

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK: Final = 1 << 20
_FORMATS: Final = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FIFO: stat.S_IFIFO,
}
# Times outside of what ext4 can hold are clamped when they are set; there a difference says nothing.
_FIRST_NS: Final = -(1 << 31) * 10**9
_END_NS: Final = ((1 << 34) - (1 << 31)) * 10**9


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """A layer's tree and what it should be. `tree` and `below` (layers beneath it) are relative to the data directory.

    `content`: read every file and compare its digest.
    """

    tree: str
    entries: Entries
    root: RootAttributes | None
    below: tuple[str, ...]
    content: bool


def layer_differences(data_fd: int, check: LayerCheck) -> Iterator[str]:
    """How the layer's tree differs from its entries. `data_fd` is borrowed."""
    base = os.fsencode(check.tree)
    try:
        disk = dict(walk(data_fd, base))
    except FileNotFoundError:
        yield "its tree is missing"
        return
    for path in sorted(check.entries.keys() - disk.keys()):
        yield f"{show(path)} is missing"
    for path in sorted(disk.keys() - check.entries.keys() - {b""}):
        yield f"{show(path)} does not belong there"
    if check.root is not None:
        yield from _root_differences(disk[b""], check.root)
    inodes: dict[int, int | None] = {}
    digested: set[int] = set()
    for path, entry in check.entries.items():
        status = disk.get(path)
        if status is None:
            continue
        told = list(_entry_differences(data_fd, base, path, entry, status))
        if not told and entry.kind not in (None, Kind.DIRECTORY):
            if entry.below is not None:
                if not _is_one_of(data_fd, check.below, entry.below, status):
                    told.append("is not the lower layer's file that it was linked to")
            elif inodes.setdefault(status.st_ino, entry.group) != entry.group or (
                entry.group is None and status.st_ino in digested
            ):
                told.append("is linked to a file that it has nothing to do with")
            if not told and check.content and entry.digest and status.st_ino not in digested:
                told.extend(_content_differences(data_fd, base + b"/" + path, entry))
            digested.add(status.st_ino)
        yield from (f"{show(path)} {what}" for what in told)
    yield from _torn_groups(check.entries, disk)


def walk(data_fd: int, base: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every path below `base`, itself as the empty path; no link is followed and no mount is entered."""
    top = os.stat(base, dir_fd=data_fd, follow_symlinks=False)
    yield b"", top
    todo = [b""]
    while todo:
        here = todo.pop()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(base + b"/" + here if here else base, flags, dir_fd=data_fd)
        try:
            for name in map(os.fsencode, os.listdir(fd)):
                path = here + b"/" + name if here else name
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                yield path, status
                if stat.S_ISDIR(status.st_mode) and status.st_dev == top.st_dev:
                    todo.append(path)
        finally:
            os.close(fd)


def _entry_differences(
    data_fd: int, base: bytes, path: bytes, entry: LayerEntry, status: os.stat_result
) -> Iterator[str]:
    where = base + b"/" + path
    if entry.kind is None:
        if not (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0):
            yield "is no whiteout any more"
        return
    if stat.S_IFMT(status.st_mode) != _FORMATS[entry.kind]:
        yield f"is no {entry.kind.value} any more"
        return
    xattrs = read_xattrs(data_fd, where)
    # With an access list the group's bits of the mode are the list's mask.
    masked = any(key == b"system.posix_acl_access" for key, _ in entry.xattrs)
    if (stat.S_IMODE(status.st_mode) ^ entry.mode) & (0o7707 if masked else 0o7777):
        yield f"has mode {stat.S_IMODE(status.st_mode):04o} instead of {entry.mode:04o}"
    if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
        yield f"belongs to {status.st_uid}:{status.st_gid} instead of {entry.uid}:{entry.gid}"
    if _FIRST_NS <= entry.mtime_ns < _END_NS and status.st_mtime_ns != entry.mtime_ns:
        yield "has another modification time"
    if sorted(xattrs) != sorted(entry.xattrs):
        yield "has other extended attributes"
    if entry.kind is Kind.FILE and status.st_size != entry.size:
        yield f"has {status.st_size} bytes instead of {entry.size}"
    if entry.kind is Kind.SYMLINK and os.readlink(where, dir_fd=data_fd) != entry.target:
        yield "points elsewhere"
    if entry.device is not None and status.st_rdev != os.makedev(*entry.device):
        yield "is another device"
    if entry.kind is Kind.DIRECTORY and _is_opaque(data_fd, where) != entry.opaque:
        yield "is opaque no longer" if entry.opaque else "has become opaque"


def _root_differences(status: os.stat_result, root: RootAttributes) -> Iterator[str]:
    found = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
    if found != (root.mode, root.uid, root.gid):
        yield f"its root has mode {found[0]:04o} and owner {found[1]}:{found[2]}"


def _is_opaque(data_fd: int, where: bytes) -> bool:
    try:
        return os.getxattr(b"/proc/self/fd/%d/%b" % (data_fd, where), OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _is_one_of(data_fd: int, trees: Iterable[str], path: bytes, status: os.stat_result) -> bool:
    for tree in trees:
        try:
            found = os.stat(os.fsencode(tree) + b"/" + path, dir_fd=data_fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
            return True
    return False


def _content_differences(data_fd: int, where: bytes, entry: LayerEntry) -> Iterator[str]:
    try:
        fd = os.open(where, _READ, dir_fd=data_fd)
        try:
            if _digest(fd, entry) != entry.digest:
                yield "has other content"
        finally:
            os.close(fd)
    except OSError as error:
        yield f"cannot be read: {error.strerror}"


def _digest(fd: int, entry: LayerEntry) -> str:
    """The sha256 of what the archive stored: of a sparse file its extents alone, in order."""
    digest = hashlib.sha256()
    spans = ((0, entry.size),) if entry.extents is None else entry.extents
    for offset, length in spans:
        at, end = offset, offset + length
        while at < end and (data := os.pread(fd, min(_CHUNK, end - at), at)):
            digest.update(data)
            at += len(data)
    return digest.hexdigest()


def _torn_groups(entries: Entries, disk: Mapping[bytes, os.stat_result]) -> Iterator[str]:
    first: dict[int, int] = {}
    for path, entry in entries.items():
        if entry.group is not None and path in disk:
            inode = disk[path].st_ino
            if first.setdefault(entry.group, inode) != inode:
                yield f"{show(path)} is no longer the same file as its other names"


@dataclass(slots=True)
class _Node:
    """A name of the merged tree: who decided it, and for a directory what is in it."""

    tree: str
    entry: LayerEntry
    children: dict[bytes, _Node] = field(default_factory=dict)


def flat_differences(data_fd: int, flat: str, layers: Sequence[tuple[str, Entries]]) -> Iterator[str]:
    """How the flat tree at `flat` differs from its layers, which come bottom to top with their entries.

    A name must be a link to the topmost layer's file, or (past the file system's limit of links) a copy of it.
    """
    base = os.fsencode(flat)
    try:
        disk = dict(walk(data_fd, base))
    except FileNotFoundError:
        yield "its tree is missing"
        return
    expected = dict(_paths(_merge(layers), b""))
    for path in sorted(expected.keys() - disk.keys()):
        yield f"{show(path)} is missing"
    for path in sorted(disk.keys() - expected.keys() - {b""}):
        yield f"{show(path)} does not belong there"
    for path, node in expected.items():
        status = disk.get(path)
        if status is None:
            continue
        entry = node.entry._replace(opaque=False)
        if entry.kind is not Kind.DIRECTORY and _is_one_of(data_fd, (node.tree,), path, status):
            continue
        for what in _entry_differences(data_fd, base, path, entry, status):
            yield f"{show(path)} {what}"
        if entry.kind is Kind.FILE and entry.digest:
            for what in _content_differences(data_fd, base + b"/" + path, entry):
                yield f"{show(path)} {what}"


def _merge(layers: Sequence[tuple[str, Entries]]) -> dict[bytes, _Node]:
    """All layers as one tree, by overlayfs's rules."""
    root: dict[bytes, _Node] = {}
    for tree, entries in layers:
        for path in sorted(entries):
            entry = entries[path]
            *parents, name = path.split(b"/")
            here = root
            for parent in parents:
                here = here[parent].children
            old = here.pop(name, None)
            if entry.kind is None:
                continue
            node = here[name] = _Node(tree, entry)
            merged = old is not None and old.entry.kind is Kind.DIRECTORY and entry.kind is Kind.DIRECTORY
            if merged and old is not None and not entry.opaque:
                node.children = old.children
    return root


def _paths(children: Mapping[bytes, _Node], parent: bytes) -> Iterator[tuple[bytes, _Node]]:
    todo = [(parent, children)]
    while todo:
        here, names = todo.pop()
        for name, node in names.items():
            path = here + b"/" + name if here else name
            yield path, node
            if node.children:
                todo.append((path, node.children))
