"""The proof that a root file system serves its container: enter it as its root, read one file, write another."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flatmount.errors import FlatmountError
from flatmount.kernel import _native
from flatmount.kernel.namespaces import Namespace


@dataclass(frozen=True, slots=True)
class StartCheck:
    """What was seen inside: owner of the file that was read, its first bytes, owner of the file that was written."""

    uid: int
    gid: int
    written_uid: int
    content: bytes


def check_start(
    namespace: Namespace, root: str, read_path: str, write_path: str, *, most_bytes: int = 65536, copies: int = 0
) -> StartCheck:
    """Enter `root` as the root of its user namespace, read `read_path` and create `write_path`.

    A task that shares our memory does it, so that its cost does not grow with the process; it copies its mount
    namespace `copies` times first, as a runtime does. Paths are absolute inside; neither may be a symbolic link, and
    the second must not exist.

    Raises: FlatmountError naming the step that failed and the kernel's word for it.
    Kernel: CAP_SYS_ADMIN, CAP_SYS_CHROOT.
    """
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        step, code, uid, gid, written_uid, content = _native.check_start(
            namespace.fileno(), fd, os.fsencode(read_path), os.fsencode(write_path), most_bytes, copies
        )
    finally:
        os.close(fd)
    if step:
        raise FlatmountError(f"inside {root}, {step}: {os.strerror(code)}")
    return StartCheck(uid, gid, written_uid, content)
