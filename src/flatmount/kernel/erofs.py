"""A directory tree as an EROFS image: a file that the kernel mounts read-only, with one copy of everything in it.

Written here and not by mkfs.erofs: 1.5, which Debian 12 has, cuts names of 255 bytes, gives every file the build time
where that is to be the same for equal trees, writes the holes of sparse files out, and is one more program to have.

    block 0          the superblock, 1,024 bytes in
    block 1 on       inodes, 32-byte aligned: 64 bytes, extended attributes, and the end of the content where it fits
    after them       whole blocks of content: files, and directories that are large

Uncompressed. Equal trees make equal images: nothing of the time, the machine or inode numbers is in it. The children of
a directory lie side by side, so that listing a directory reads few blocks. Holes stay holes of the image.

See: https://docs.kernel.org/filesystems/erofs.html, fs/erofs/erofs_fs.h
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from flatmount.errors import MissingFeature, StoreError

FSTYPE: Final = "erofs"
BLOCK: Final = 4096
_MAGIC: Final = 0xE0F5E1E2
_HAS_MTIME: Final = 2  # feature_compat: what an inode has is its modification time
_SUPER: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQQ16x")
_SUPER_AT: Final = 1024
_INODE: Final = struct.Struct("<HHHHQIIIIqII16x")  # the extended form: 32-bit owners, nanoseconds
_DIRENT: Final = struct.Struct("<QHBB")
_XATTRS: Final = struct.Struct("<IB7x")
_XATTR: Final = struct.Struct("<BBH")
_SLOT: Final = 32  # an inode is called by its place in these
_PLAIN, _INLINE = 1 | 0 << 1, 1 | 2 << 1  # extended; content in blocks, or its end behind the inode
_MOST_BLOCKS: Final = 0xFFFFFFFF
_PREFIXES: Final = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_CLASSES: Final = (b"user.", b"trusted.", b"security.", b"system.")  # others are the file system's own
_OTHER_FORM: Final = "the image can be flattened with --flat-format hardlink"
_DROPPED: Final = (b"trusted.overlay.", b"user.overlay.", b"security.selinux")
_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SPAN: Final = 1 << 24  # of content that is copied with one call
_FICLONERANGE: Final = 0x4020940D  # linux/fs.h
_CLONED: Final = struct.Struct("qQQQ")


@dataclass(frozen=True, slots=True)
class ErofsImage:
    """What an image came to. `size_bytes` is its length; holes in it take no room on disk."""

    directories: int
    inodes: int
    size_bytes: int


@dataclass(slots=True)
class _Inode:
    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    device: int
    stored: int  # bytes on disk
    xattrs: bytes
    nlink: int = 1
    target: bytes = b""
    blocks: list[list[tuple[bytes, int]]] = field(default_factory=list)  # of a directory: names and whose they are
    children: list[tuple[bytes, int]] = field(default_factory=list)
    at: int = 0  # bytes from the beginning of the image
    inline: bool = False
    first_block: int = 0

    @property
    def head_bytes(self) -> int:
        return _INODE.size + len(self.xattrs)

    @property
    def whole_blocks(self) -> int:
        return self.size // BLOCK if self.inline else -(-self.size // BLOCK)


def write_erofs(tree_fd: int, out_fd: int, name: str) -> ErofsImage:
    """Write the tree at the borrowed descriptor `tree_fd` as an EROFS image into the empty file `out_fd`, borrowed too.

    Types, modes, owners, nanosecond times, devices, links, extended attributes and access lists are kept; link counts
    are those within the tree, whatever else has a name elsewhere. overlayfs's own attributes and host labels are left
    out, as everywhere in the store. `name` decides the image's UUID. Nothing is synced.

    Errors: OSError with the path; StoreError for what the format cannot hold (16 TiB, attributes of 64 KiB),
    and, before anything is written, for what there is no room for.
    Kernel: none is asked; 5.4 mounts it. CAP_SYS_ADMIN to read trusted.* attributes.
    """
    inodes = _Tree(tree_fd).inodes
    data_block = _place(inodes)
    end_block = data_block
    for inode in inodes:
        inode.first_block = end_block
        end_block += 0 if _is_node(inode) else inode.whole_blocks
    if end_block > _MOST_BLOCKS:
        raise StoreError("the image is larger than the 16 TiB that EROFS can hold", hint=_OTHER_FORM)
    _require_room(tree_fd, out_fd, inodes, data_block)
    with open(out_fd, "wb", buffering=1 << 20, closefd=False) as meta:
        meta.write(bytes(_SUPER_AT) + _superblock(len(inodes), inodes[0].at, end_block, name))
        at = _SUPER_AT + _SUPER.size
        for inode in inodes:
            piece = _head(inode) + inode.xattrs + _content(tree_fd, out_fd, inode, inodes)
            meta.write(bytes(inode.at - at))
            meta.write(piece)
            at = inode.at + len(piece)
    os.ftruncate(out_fd, end_block * BLOCK)
    return ErofsImage(sum(stat.S_ISDIR(inode.mode) for inode in inodes), len(inodes), end_block * BLOCK)


def _require_room(tree_fd: int, out_fd: int, inodes: Sequence[_Inode], data_block: int) -> None:
    """Refuse what cannot fit, rather than fill the disk with it first. Holes take nothing, nor does what is shared."""
    status = os.fstatvfs(out_fd)
    free = (status.f_bavail if os.geteuid() else status.f_bfree) * status.f_frsize
    meta = data_block * BLOCK
    files = [inode for inode in inodes if stat.S_ISREG(inode.mode) and inode.size >= BLOCK]
    content = sum(min(inode.whole_blocks * BLOCK, inode.stored) for inode in files)
    # A file system that counts nothing says that it has no blocks.
    if not status.f_blocks or meta + content <= free:
        return
    if meta <= free and files and _shares(tree_fd, out_fd, files[0]):
        return
    raise StoreError(
        f"the EROFS image takes {meta + content} bytes, and its file system has {free} free",
        hint="free space there and try again; nothing half-written was kept",
    )


def _shares(tree_fd: int, out_fd: int, inode: _Inode) -> bool:
    """Whether the file system copies content by sharing blocks: tried with one that the image begins with anyway."""
    fd = os.open(inode.path, _READ, dir_fd=tree_fd)
    try:
        fcntl.ioctl(out_fd, _FICLONERANGE, _CLONED.pack(fd, 0, BLOCK, inode.first_block * BLOCK))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _is_node(inode: _Inode) -> bool:
    return not (stat.S_ISREG(inode.mode) or stat.S_ISDIR(inode.mode) or stat.S_ISLNK(inode.mode))


class _Tree:
    """Every inode below a directory: the root first, then each directory's children together."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._known: dict[tuple[int, int], int] = {}
        self.inodes = [self._inode(b".", os.fstat(fd))]
        self._walk()

    def _walk(self) -> None:
        todo = [(0, 0)]
        while todo:
            here, parent = todo.pop()
            directory = self.inodes[here]
            found = list(self._children(directory.path))
            for child_name, number in found:
                if stat.S_ISDIR(self.inodes[number].mode):
                    directory.nlink += 1
                    todo.append((number, here))
                directory.children.append((child_name, number))
            directory.nlink += 1
            directory.blocks = list(_packed(sorted([(b".", here), (b"..", parent), *found])))
            last = directory.blocks[-1]
            directory.size = (len(directory.blocks) - 1) * BLOCK + sum(_DIRENT.size + len(name) for name, _ in last)

    def _children(self, path: bytes) -> Iterator[tuple[bytes, int]]:
        fd = os.open(path, _DIRECTORY, dir_fd=self._fd)
        try:
            for name in sorted(map(os.fsencode, os.listdir(fd))):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                key = (status.st_dev, status.st_ino)
                number = self._known.get(key)
                if number is None:
                    number = len(self.inodes)
                    self.inodes.append(self._inode(name if path == b"." else path + b"/" + name, status))
                    if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
                        self._known[key] = number
                else:
                    self.inodes[number].nlink += 1
                yield name, number
        finally:
            os.close(fd)

    def _inode(self, path: bytes, status: os.stat_result) -> _Inode:
        kind = stat.S_IFMT(status.st_mode)
        return _Inode(
            path=path,
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            size=status.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else 0,
            device=status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            stored=status.st_blocks * 512,
            xattrs=_xattrs(self._fd, path),
            target=os.readlink(path, dir_fd=self._fd) if kind == stat.S_IFLNK else b"",
        )


def _packed(names: Sequence[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    """Names in their order, in as few blocks as hold them: a block's entries come first, its names behind them."""
    block: list[tuple[bytes, int]] = []
    used = 0
    for name, number in names:
        more = _DIRENT.size + len(name)
        if used + more > BLOCK:
            yield block
            block, used = [], 0
        block.append((name, number))
        used += more
    yield block


def _xattrs(fd: int, path: bytes) -> bytes:
    # A path through the descriptor reaches attributes of links and nodes, which no descriptor of theirs does.
    where = b"/proc/self/fd/%d/%b" % (fd, path)
    entries = bytearray()
    for name in sorted(map(os.fsencode, os.listxattr(where, follow_symlinks=False))):
        if name.startswith(_DROPPED) or not name.startswith(_CLASSES):
            continue
        known = next(((prefix, index) for prefix, index in _PREFIXES if name.startswith(prefix)), None)
        if known is None:
            raise StoreError(f"EROFS has no extended attributes called {os.fsdecode(name)}", hint=_OTHER_FORM)
        value = os.getxattr(where, name, follow_symlinks=False)
        rest = name.removeprefix(known[0])
        if len(value) > 0xFFFF:
            raise StoreError(f"an extended attribute of {len(value)} bytes, EROFS holds 65535", hint=_OTHER_FORM)
        entries += _XATTR.pack(len(rest), known[1], len(value)) + rest + value
        entries += bytes(-len(entries) % 4)
    if len(entries) > 4 * 0xFFFE:
        raise StoreError(f"extended attributes of {len(entries)} bytes on one file", hint=_OTHER_FORM)
    return _XATTRS.pack(0, 0) + bytes(entries) if entries else b""


def _place(inodes: Sequence[_Inode]) -> int:
    """Give each inode its place; returns the first block behind them.

    The end of a content lies behind its inode if both are in one block: the kernel wants it in one piece.
    """
    at = BLOCK
    for inode in inodes:
        tail = 0 if _is_node(inode) else inode.size % BLOCK
        at += -at % _SLOT
        if tail and inode.head_bytes + tail <= BLOCK:
            if at % BLOCK + inode.head_bytes + tail > BLOCK:
                at += -at % BLOCK
            inode.inline = True
        elif at % BLOCK + _INODE.size > BLOCK:
            at += -at % BLOCK
        inode.at = at
        at += inode.head_bytes + (tail if inode.inline else 0)
    return -(-at // BLOCK)


def _superblock(inodes: int, root_at: int, blocks: int, name: str) -> bytes:
    return _SUPER.pack(
        _MAGIC, 0, _HAS_MTIME, BLOCK.bit_length() - 1, 0, root_at // _SLOT, inodes, 0, 0, blocks, 0, 0,
        uuid.uuid5(uuid.NAMESPACE_OID, name).bytes, bytes(16), 0, 0, 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip


def _head(inode: _Inode) -> bytes:
    seconds, nanoseconds = divmod(inode.mtime_ns, 10**9)
    count = (len(inode.xattrs) - _XATTRS.size) // 4 + 1 if inode.xattrs else 0
    where = _device(inode.device) if _is_node(inode) else inode.first_block
    return _INODE.pack(
        _INLINE if inode.inline else _PLAIN, count, inode.mode, 0, inode.size, where, 0, inode.uid, inode.gid,
        seconds, nanoseconds, inode.nlink,
    )  # fmt: skip


def _device(number: int) -> int:
    major, minor = os.major(number), os.minor(number)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12  # new_encode_dev() of the kernel


def _content(tree_fd: int, out_fd: int, inode: _Inode, inodes: Sequence[_Inode]) -> bytes:
    """Write the blocks of an inode's content; returns what goes behind the inode."""
    if _is_node(inode):
        return b""
    if stat.S_ISREG(inode.mode):
        return _copy(tree_fd, out_fd, inode) if inode.size else b""
    if stat.S_ISDIR(inode.mode):
        content = b"".join(_names(block, inodes) for block in inode.blocks)[: inode.size]
    else:
        content = inode.target
    whole = inode.whole_blocks * BLOCK
    if whole:
        _write_at(out_fd, content[:whole], inode.first_block * BLOCK)
    return content[whole:]


def _names(block: Sequence[tuple[bytes, int]], inodes: Sequence[_Inode]) -> bytes:
    entries, names = bytearray(), bytearray()
    for name, number in block:
        inode = inodes[number]
        place = len(block) * _DIRENT.size + len(names)
        entries += _DIRENT.pack(inode.at // _SLOT, place, _TYPES[stat.S_IFMT(inode.mode)], 0)
        names += name
    return bytes(entries + names).ljust(BLOCK, b"\0")


def _copy(tree_fd: int, out_fd: int, inode: _Inode) -> bytes:
    fd = os.open(inode.path, _READ, dir_fd=tree_fd)
    try:
        whole = min(inode.whole_blocks * BLOCK, inode.size)
        to = inode.first_block * BLOCK
        at = 0
        while at < whole:
            # Small files have no holes worth a call.
            start, end = _extent(fd, at, whole) if whole > BLOCK << 4 else (at, whole)
            at = start
            while at < end:
                done = _copy_range(fd, out_fd, min(end - at, _SPAN), at, to + at)
                if not done:
                    raise OSError(errno.EIO, "the file is shorter than it was", os.fsdecode(inode.path))
                at += done
        return os.pread(fd, inode.size - whole, whole) if inode.inline else b""
    finally:
        os.close(fd)


def _extent(fd: int, at: int, end: int) -> tuple[int, int]:
    """The next piece of content from `at` on, empty at the end."""
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
        return min(start, end), min(os.lseek(fd, start, os.SEEK_HOLE), end)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end, end
        raise


def _copy_range(fd: int, out_fd: int, count: int, at: int, to: int) -> int:
    # Within the kernel, and on file systems that can, by sharing blocks.
    try:
        return os.copy_file_range(fd, out_fd, count, at, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    piece = os.pread(fd, min(count, 1 << 20), at)
    _write_at(out_fd, piece, to)
    return len(piece)


def _write_at(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        at += done
        view = view[done:]


def require_erofs(available: bool) -> None:
    """Refuse, in one line, a kernel that mounts no EROFS image."""
    if not available:
        raise MissingFeature(
            "this kernel mounts no EROFS images, neither from files (Linux 6.12) nor through loop devices",
            hint="leave --flat-format at hardlink, or load the modules erofs and loop; `flatmount probe` shows more",
        )
