"""Space that is kept so that a store on a full disk can still be read and emptied.

SQLite needs a little room for every change, and even to open a book that nobody else has open: its -shm and -wal
files. ROOT/v1/reserve/ holds a few files of blocks that are given back to the file system for that long.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

_FILES: Final = 4  # so many inodes: a file system can be out of those as well
_FILE_BYTES: Final = 256 << 10
_LOW_BYTES: Final = 512 << 10
_LOW_INODES: Final = 4
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# It is not taken from a disk that is as good as full: what needs room now is more important.
_ROOMY_BYTES: Final = 4 << 20
_ROOMY_INODES: Final = 64


class Reserve:
    """The reserve of the store whose `v1` is `base`. Every method may fail in silence: it is a help, not a promise."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._directory = os.path.join(base, "reserve")

    def keep(self, *, again: bool = False) -> bool:
        """Make what is missing of it, if the file system has room; `again`, also if it has only just that.

        Returns whether all of it is there.
        """
        with contextlib.suppress(OSError):
            if self._whole():
                return True
            if not (again or self.is_roomy()):
                return False
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            for path in self._paths():
                _fill(path)
            return True
        return False

    def is_low(self) -> bool:
        """Whether the file system is as good as full."""
        with contextlib.suppress(OSError):
            found = os.statvfs(self._base)
            if _has(found, found.f_bavail, found.f_favail, _LOW_BYTES, _LOW_INODES):
                return False
            if os.geteuid() or not _has(found, found.f_bfree, found.f_ffree, _LOW_BYTES, _LOW_INODES):
                return True
            # The rest is root's, or nobody's: ext4 counts as free up to 16 MiB that it keeps for itself.
            return not self._has_room()
        return True

    def is_roomy(self) -> bool:
        """Whether there is room for what can wait: not counting what is kept for root or for the file system."""
        with contextlib.suppress(OSError):
            found = os.statvfs(self._base)
            return _has(found, found.f_bavail, found.f_favail, _ROOMY_BYTES, _ROOMY_INODES)
        return False

    def release_if_low(self) -> bool:
        """Give it back if the file system is as good as full; whether there was any."""
        return self.is_low() and self.release()

    def release(self) -> bool:
        """Give it back; whether there was any."""
        released = False
        for path in self._paths():
            with contextlib.suppress(OSError):
                os.unlink(path)
                released = True
        return released

    def _paths(self) -> list[str]:
        return [os.path.join(self._directory, str(number)) for number in range(_FILES)]

    def _has_room(self) -> bool:
        try:
            fd = os.open(self._base, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            return error.errno not in _FULL
        try:
            os.posix_fallocate(fd, 0, _LOW_BYTES)
        except OSError as error:
            return error.errno not in _FULL
        finally:
            os.close(fd)
        return True

    def _whole(self) -> bool:
        try:
            return all(os.lstat(path).st_size == _FILE_BYTES for path in self._paths())
        except FileNotFoundError:
            return False


def _has(found: os.statvfs_result, blocks: int, inodes: int, wanted_bytes: int, wanted_inodes: int) -> bool:
    # File systems that make inodes as they need them say that there are none at all.
    return blocks * found.f_frsize >= wanted_bytes and (inodes >= wanted_inodes or not found.f_files)


def _fill(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _FILE_BYTES)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
