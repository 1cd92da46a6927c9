"""Blobs that came in part: named files that outlive their process, so that the next attempt goes on with them.

    DIRECTORY/sha256-HEX    the beginning of the blob with this digest, and nothing says yet that it is the right one

Whoever writes one holds flock(2) on it, exclusively. What it becomes is settled by the digest of the whole, once that
has come; a beginning that a power cut spoiled is found by that, dropped, and fetched again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
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
    found = []
    for name in sorted(_names(directory)):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        with _idle(directory, name) as status:
            if status is not None:
                found.append(Partial(f"{match[1]}:{match[2]}", status.st_size, status.st_mtime))
    return tuple(found)


def collect_partials(directory: str, *, older_than_s: float = 0.0) -> tuple[Partial, ...]:
    """Delete what `partials` finds, as far as it was last written more than `older_than_s` ago; returns that.

    Raises: OSError.
    """
    gone = []
    for partial in partials(directory):
        if older_than_s and time.time() - partial.mtime_s <= older_than_s:
            continue
        name = partial.digest.replace(":", "-")
        with _idle(directory, name) as status:
            if status is not None:
                os.unlink(os.path.join(directory, name))
                gone.append(partial)
    return tuple(gone)


def strangers(directory: str) -> list[str]:
    """Names in `directory` that are none of a blob's."""
    return [name for name in _names(directory) if _NAME.fullmatch(name) is None]


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _idle(directory: str, name: str) -> Iterator[os.stat_result | None]:
    """The file's status while it is locked; None where somebody writes it, it is gone, or it is no plain file."""
    try:
        fd = os.open(os.path.join(directory, name), _FLAGS)
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
