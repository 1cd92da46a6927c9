"""Mount calls for tests, and a thread with a mount namespace of its own to make them in."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

CLONE_NEWNS = 0x00020000
MS_BIND = 1 << 12
MS_MOVE = 1 << 13
MS_REC = 1 << 14
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2

_OPEN_TREE, _MOVE_MOUNT = 428, 429
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD = 1, 4, -100

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def mount(source: str, target: str, fs_type: str = "", flags: int = 0, options: str = "") -> None:
    encoded = [os.fsencode(word) or None for word in (source, target, fs_type)]
    _checked(_libc.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(options) or None), f"mount {target}")


def umount(target: str, flags: int = 0) -> None:
    _checked(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def detached_clone(path: str) -> int:
    """A descriptor of a detached copy of the mount at `path`; the caller's to close."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _checked(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), f"open_tree {path}")


def attach(tree_fd: int, target: str) -> None:
    encoded = os.fsencode(target)
    result = _libc.syscall(_MOVE_MOUNT, tree_fd, b"", _AT_FDCWD, encoded, _MOVE_MOUNT_F_EMPTY_PATH)
    _checked(result, f"move_mount {target}")


def in_own_namespace(test: Callable[P, None]) -> Callable[P, None]:
    """Runs a test in a thread with a private copy of the mount namespace, which ends with the thread."""

    @functools.wraps(test)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        raised: list[BaseException] = []

        def body() -> None:
            try:
                _checked(_libc.unshare(CLONE_NEWNS), "unshare")
                mount("none", "/", flags=MS_REC | MS_PRIVATE)
                test(*args, **kwargs)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return wrapper
