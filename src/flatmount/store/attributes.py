"""Extended attributes of an image's files: which are kept, and how they are read and set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from flatmount.errors import BadImage
from flatmount.image.tar import show

Attributes = tuple[tuple[bytes, bytes], ...]
_CLASSES: Final = (b"user.", b"trusted.", b"security.", b"system.")
_OVERLAY: Final = (b"trusted.overlay.", b"user.overlay.")
_HOST_LABEL: Final = b"security.selinux"


def kept(xattrs: Attributes) -> Attributes:
    """Those that an image may bring: not overlayfs's private language, and no label that is the host's to give.

    Raises: BadImage for names that no file can have.
    """
    wanted = tuple((key, value) for key, value in xattrs if not key.startswith(_OVERLAY) and key != _HOST_LABEL)
    for key, _ in wanted:
        if not key.startswith(_CLASSES) or b"\0" in key:
            raise BadImage(f"an extended attribute called {show(key)}", hint="the kernel has no such attributes")
    return wanted


def set_xattrs(fd: int, path: bytes, xattrs: Iterable[tuple[bytes, bytes]]) -> None:
    """Set attributes of `path`, below the borrowed descriptor `fd`, itself and not of what it points to."""
    for key, value in xattrs:
        os.setxattr(_proc(fd, path), key, value, follow_symlinks=False)


def read_xattrs(fd: int, path: bytes) -> Attributes:
    """The attributes of `path`, below the borrowed descriptor `fd`, without overlayfs's and the host's."""
    where = _proc(fd, path)
    names = [os.fsencode(name) for name in os.listxattr(where, follow_symlinks=False)]
    wanted = [name for name in names if not name.startswith(_OVERLAY) and name != _HOST_LABEL]
    return tuple((name, os.getxattr(where, name, follow_symlinks=False)) for name in wanted)


def _proc(fd: int, path: bytes) -> bytes:
    """A path that reaches attributes of links and nodes, which no descriptor for reading or writing does."""
    return b"/proc/self/fd/%d/%b" % (fd, path)
