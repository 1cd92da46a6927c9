"""Files of a container's root file system, read from outside without being led outside."""

from __future__ import annotations

import errno
import os

from flatmount.kernel import _native

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def read_in_root(root_fd: int, path: str, *, most_bytes: int) -> bytes | None:
    """The content of the regular file `path` inside the borrowed directory `root_fd`; None where there is none.

    Links and `..` are followed inside only, magic links not at all; nothing is mounted, and a fifo or a device is never
    opened. The root file system need not be attached anywhere.

    Errors: OSError; EINVAL and EISDIR for what is no regular file, EFBIG for one of more than `most_bytes`.
    Kernel: openat2 (5.6).
    """
    try:
        fd = _native.open_file_in_root(root_fd, os.fsencode(path))
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    with os.fdopen(fd, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return content
