"""The tree of one layer while it is being made: what it has so far, and where a path leads in it.

Every name is resolved here, against what this layer has and the chain beneath it, and never by the kernel: a link on
the way is looked up inside the image, whatever it points to. The kernel sees single components below descriptors of
directories that this module has made, always with O_NOFOLLOW.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from typing import Final

from flatmount.errors import BadImage
from flatmount.image.tar import Kind, show
from flatmount.store.attributes import read_xattrs, set_xattrs
from flatmount.store.below import OPAQUE, Below, Found, Stack
from flatmount.store.entries import LayerEntry

_LINKS: Final = 40  # as in the kernel's path walk
_OPEN_DIRECTORIES: Final = 128
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NoDirectory(BadImage):
    """A path leads through something that is no directory, so that nothing can be at its end."""


class LayerTree:
    """Directories, whiteouts and the names of everything. `target_fd` is borrowed; paths are bytes, relative, real.

    `entries` holds all but the root, which is `root`.
    """

    def __init__(self, target_fd: int, below: Below, *, path_bytes: int, depth: int) -> None:
        self._below = below
        self._path_bytes = path_bytes
        self._depth = depth
        self._root_fd = target_fd
        self.root = LayerEntry(Kind.DIRECTORY, 0o755)
        self.entries: dict[bytes, LayerEntry] = {}
        self._children: dict[bytes, set[bytes]] = {b"": set()}
        self._stacks: dict[bytes, Stack] = {}
        self._resolved: dict[bytes, bytes] = {b"": b""}
        self._through_below = False
        self._fds: OrderedDict[bytes, int] = OrderedDict()

    def close(self) -> None:
        """Close the descriptors of directories that are still open."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def parent(self, parts: list[bytes]) -> bytes:
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
            path = join(here, part)
            entry = self.entries.get(path)
            target = None
            if entry is None:
                target = self._implicit(here, path)
            elif entry.kind is Kind.SYMLINK:
                target = entry.target
            elif entry.kind is None:
                self.remove(path)
                self.make_directory(path, LayerEntry(Kind.DIRECTORY, 0o755, opaque=True))
            elif entry.kind is not Kind.DIRECTORY:
                raise NoDirectory(f"{show(path)} on the way is a {entry.kind.value}", hint="the image is malformed")
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
        found = self.look_up(here, path)
        if found is None:
            self.make_directory(path, LayerEntry(Kind.DIRECTORY, 0o755))
            return None
        mode = found.status.st_mode
        if stat.S_ISLNK(mode):
            self._through_below = True
            return os.readlink(found.source, dir_fd=self._below.data_fd)
        if not stat.S_ISDIR(mode):
            what = f"{show(path)} on the way is no directory in a lower layer"
            raise NoDirectory(what, hint="the image is malformed")
        xattrs = read_xattrs(self._below.data_fd, found.source)
        self.make_directory(path, from_status(Kind.DIRECTORY, found.status)._replace(xattrs=xattrs))
        return None

    def look_up(self, parent: bytes, path: bytes) -> Found | None:
        """What the chain beneath has at `path`, whose parent is a directory of this layer."""
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
        return self.entries[directory] if directory else self.root

    def fd(self, path: bytes) -> int:
        """A descriptor of a directory of this layer, kept open while it is among those used last."""
        if not path:
            return self._root_fd
        fd = self._fds.get(path)
        if fd is not None:
            self._fds.move_to_end(path)
            return fd
        parent, _, name = path.rpartition(b"/")
        fd = os.open(name, _DIRECTORY, dir_fd=self.fd(parent))
        self._fds[path] = fd
        if len(self._fds) > _OPEN_DIRECTORIES:
            os.close(self._fds.popitem(last=False)[1])
        return fd

    def record(self, path: bytes, entry: LayerEntry) -> None:
        """Note what was made at `path`."""
        self.entries[path] = entry
        parent, _, name = path.rpartition(b"/")
        self._children[parent].add(name)

    def make_directory(self, path: bytes, entry: LayerEntry) -> None:
        """Private until the end: attributes of directories come last, when nothing is added any more."""
        if len(path) > self._path_bytes or path.count(b"/") >= self._depth:
            raise BadImage(
                f"a directory {path.count(b'/') + 1} levels deep, with a path of {len(path)} bytes",
                hint=f"{self._depth} levels and {self._path_bytes} bytes are possible",
            )
        parent, _, name = path.rpartition(b"/")
        os.mkdir(name, 0o700, dir_fd=self.fd(parent))
        self._children[path] = set()
        self.record(path, entry)

    def remove(self, path: bytes) -> None:
        """Take a name of this layer away again, because a later entry replaces it."""
        parent, _, name = path.rpartition(b"/")
        entry = self.entries[path]
        if entry.kind is Kind.DIRECTORY:
            for child in list(self._children[path]):
                self.remove(join(path, child))
            del self._children[path]
            self._stacks.pop(path, None)
            fd = self._fds.pop(path, None)
            if fd is not None:
                os.close(fd)
            os.rmdir(name, dir_fd=self.fd(parent))
        else:
            os.unlink(name, dir_fd=self.fd(parent))
        self._resolved = {b"": b""}
        self._children[parent].discard(name)
        del self.entries[path]

    def set_opaque(self, path: bytes) -> None:
        """Hide what lies beneath a directory, from now on."""
        if path:
            self.entries[path] = self.entries[path]._replace(opaque=True)
        else:
            self.root = self.root._replace(opaque=True)
        self._stacks.clear()

    def make_whiteout(self, parent: bytes, name: bytes) -> None:
        """Hide a name that the chain beneath has."""
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.fd(parent))
        self.record(join(parent, name), LayerEntry(None))

    def finish(self) -> None:
        """Give every directory its attributes, when nothing is added to any of them."""
        if self.root.opaque:
            self._hide_root()
        for path, entry in list(self.entries.items()):
            # A directory that is not merged shows its whiteouts to readdir, and has no use for them.
            if entry.kind is None and not self._stack(path.rpartition(b"/")[0]):
                self.remove(path)
        for path, entry in self.entries.items():
            if entry.kind is Kind.DIRECTORY:
                self._finish_directory(path, entry)
        self._finish_directory(b".", self.root)

    def _hide_root(self) -> None:
        """Overlayfs does not look for an opaque mark on a layer's root: whiteouts say the same."""
        self.root = self.root._replace(opaque=False)
        self._stacks.clear()
        for name in sorted(self._below.root_names()):
            found = self.look_up(b"", name)
            if found is None:
                continue
            entry = self.entries.get(name)
            if entry is None:
                self.make_whiteout(b"", name)
            elif entry.kind is Kind.DIRECTORY and found.is_directory:
                self.set_opaque(name)

    def _finish_directory(self, path: bytes, entry: LayerEntry) -> None:
        root = self._root_fd
        os.chown(path, entry.uid, entry.gid, dir_fd=root, follow_symlinks=False)
        os.chmod(path, entry.mode, dir_fd=root)
        set_xattrs(root, path, entry.xattrs)
        if entry.opaque:
            set_xattrs(root, path, ((os.fsencode(OPAQUE), b"y"),))
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=root, follow_symlinks=False)


def join(parent: bytes, name: bytes) -> bytes:
    """The path of `name` in `parent`, where the root is empty."""
    return parent + b"/" + name if parent else name


def from_status(kind: Kind, status: os.stat_result) -> LayerEntry:
    """An entry with the owner, mode and time of something that exists."""
    return LayerEntry(kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
