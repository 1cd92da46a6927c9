"""Blobs that came in part: named files that outlive their process, so that the next attempt goes on with them.

    DIRECTORY/sha256-HEX    the beginning of the blob with this digest, and nothing says yet that it is the right one

Whoever writes one holds flock(2) on it, exclusively. What it becomes is settled by the digest of the whole, once that
has come; a beginning that a power cut spoiled is found by that, dropped, and fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from flatmount.image import digest as digests

KEPT_S: Final = 86_400  # after a day nobody comes back for it
_NAME = re.compile(r"(sha256|sha512)-([0-9a-f]{64,128})")
_ATTEMPTS: Final = 8
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Partial:
    """The beginning of blob `digest` that an attempt left; `size_bytes` of it, last written at `mtime_s`."""

    digest: str
    size_bytes: int
    mtime_s: float


def open_partial(directory: str, digest: str, size_bytes: int) -> tuple[int, int] | None:
    """A descriptor, which the caller closes, for the kept beginning of a blob of `size_bytes`, and its length.

    Made empty where nothing was kept; None while somebody else writes it. Closing ends the lock.
    Raises: OSError, where no file can be made in `directory`.
    """
    path = _path(directory, digest)
    for _ in range(_ATTEMPTS):
        fd = os.open(path, _FLAGS | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if not status.st_nlink:  # dropped between the two calls
                os.close(fd)
                continue
            if status.st_size > size_bytes:
                os.ftruncate(fd, 0)
            return fd, status.st_size if status.st_size <= size_bytes else 0
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
    return None


def drop_partial(directory: str, digest: str) -> None:
    """Take the kept beginning of a blob away. Who still writes it goes on with a file that has no name any more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(directory, digest))


def partials(directory: str) -> tuple[Partial, ...]:
    """What earlier attempts left in `directory` and nobody writes now, by digest; the place itself may be missing."""
    return _each(directory, lambda place, name, status: True)


def collect_partials(directory: str, *, older_than_s: float = 0.0) -> tuple[Partial, ...]:
    """Delete what `partials` finds, as far as it was last written more than `older_than_s` ago; returns that.

    Raises: OSError.
    """

    def collect(place: int, name: str, status: os.stat_result) -> bool:
        if older_than_s and time.time() - status.st_mtime <= older_than_s:
            return False
        os.unlink(name, dir_fd=place)
        return True

    return _each(directory, collect)


def strangers(directory: str) -> list[str]:
    """Names in `directory` that are none of a blob's."""
    with _opened(directory) as place:
        return [] if place is None else [name for name in os.listdir(place) if _NAME.fullmatch(name) is None]


def _each(directory: str, wanted: Callable[[int, str, os.stat_result], bool]) -> tuple[Partial, ...]:
    """Those that nobody writes and that are `wanted`, which is asked while the file is locked."""
    found = []
    with _opened(directory) as place:
        for name in [] if place is None else sorted(os.listdir(place)):
            match = _NAME.fullmatch(name)
            if match is None or place is None:
                continue
            with _idle(place, name) as status:
                if status is not None and wanted(place, name, status):
                    found.append(Partial(f"{match[1]}:{match[2]}", status.st_size, status.st_mtime))
    return tuple(found)


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int | None]:
    """The directory itself; None where there is none, or a link or a mount in its place, which is nobody's."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        yield None
        return
    try:
        above = os.open("..", os.O_PATH | os.O_CLOEXEC, dir_fd=fd)
        try:
            yield fd if _mount(fd) == _mount(above) else None
        finally:
            os.close(above)
    finally:
        os.close(fd)


def _mount(fd: int) -> str:
    """The mount that a descriptor is on: file systems alone do not tell a bind mount. See proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as told:
        return next(line for line in told if line.startswith("mnt_id:"))


@contextlib.contextmanager
def _idle(place: int, name: str) -> Iterator[os.stat_result | None]:
    """The file's status while it is locked; None where somebody writes it, it is gone, or it is no plain file."""
    try:
        fd = os.open(name, _FLAGS, dir_fd=place)
    except OSError:
        yield None
        return
    try:
        status: os.stat_result | None = os.fstat(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            status = None
        yield status if status is not None and stat.S_ISREG(status.st_mode) and status.st_nlink else None
    finally:
        os.close(fd)


def _path(directory: str, digest: str) -> str:
    return os.path.join(directory, f"{digests.algorithm(digest)}-{digests.hexadecimal(digest)}")
