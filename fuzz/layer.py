"""Any bytes as a layer: read, unpacked, recorded. Nothing but the house's own errors, and nothing outside."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

from flatmount.errors import FlatmountError
from flatmount.image.tar import TarReader
from flatmount.kernel.tree import remove_tree
from flatmount.store.below import Below
from flatmount.store.unpack import Limits, unpack

_LIMITS = Limits(total_bytes=1 << 22, entries=200, file_bytes=1 << 24)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Recorded:
    """Keeps what it is told, to see that nothing of the archive is lost."""

    def __init__(self) -> None:
        self.total = 0

    def raw(self, data: bytes | memoryview) -> None:
        """See flatmount.image.tar.Recorder."""
        self.total += len(data)

    def content(self, path: bytes, stored: int) -> None:
        """See flatmount.image.tar.Recorder."""
        self.total += stored


class Arena:
    """A directory with a sentinel, a lower layer with links that lead out, and a place to unpack into."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.mkdir(f"{path}/outside")
        with open(f"{path}/outside/victim", "w", encoding="ascii") as out:
            out.write("before")
        os.makedirs(f"{path}/data/layers/1/d")
        os.symlink(f"{path}/outside", f"{path}/data/layers/1/out")
        os.symlink("../../../outside", f"{path}/data/layers/1/up")
        with open(f"{path}/data/layers/1/d/f", "w", encoding="ascii") as out:
            out.write("lower")
        self.data_fd = os.open(f"{path}/data", _DIRECTORY)
        self._number = 1
        self._before = self._state()

    def close(self) -> None:
        """Close the descriptor of the data directory."""
        os.close(self.data_fd)

    def try_layer(self, data: bytes) -> bool:
        """Whether `data` is a layer. Raises whatever is not the house's own error; AssertionError for an escape."""
        self._number += 1
        name = f"t{self._number}"
        os.mkdir(name, 0o700, dir_fd=self.data_fd)
        target = os.open(name, _DIRECTORY, dir_fd=self.data_fd)
        recorded = Recorded()
        try:
            unpack(TarReader(_in_pieces(data), recorded), target, Below(self.data_fd, ["layers/1"]), _LIMITS)
            assert recorded.total == len(data)
            return True
        except FlatmountError:
            return False
        finally:
            os.close(target)
            remove_tree(self.data_fd, name)
            assert self._state() == self._before

    def _state(self) -> object:
        victim = os.stat(f"{self.path}/outside/victim")
        lower = os.stat(f"{self.path}/data/layers/1/d/f")
        with open(f"{self.path}/outside/victim", encoding="ascii") as content:
            return (
                os.listdir(f"{self.path}/outside"),
                (victim.st_mode, victim.st_uid, victim.st_nlink, victim.st_mtime_ns, content.read()),
                (lower.st_mode, lower.st_uid, lower.st_nlink, lower.st_mtime_ns),
                sorted(os.listdir(f"{self.path}/data/layers/1")),
                sorted(os.listdir(self.path)),
            )


def _in_pieces(data: bytes) -> Callable[[int], bytes]:
    """Pieces of a size that no block and no content ends with, another one for each length."""
    stream, piece = io.BytesIO(data), 700 + len(data) % 1000
    return lambda size: stream.read(min(size, piece))


def with_checksums(data: bytes) -> bytes:
    """Blocks that look like headers get a right checksum, so that a mutation reaches what lies behind that check."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)
