"""EROFS images as files of the store: what their content is known by."""

from __future__ import annotations

import errno
import hashlib
import os
from typing import Final

_PIECE: Final = 1 << 20


def digest_of(fd: int) -> str:
    """A sha256 of the file behind the borrowed descriptor, the same whether its zeros are holes or written out.

    Every piece of 1 MiB that is not all zeros goes in with its place, and the length: holes of terabytes cost nothing.
    """
    digest = hashlib.sha256()
    end, at = os.fstat(fd).st_size, 0
    while (at := _next_data(fd, at, end)) < end:
        piece = os.pread(fd, _PIECE, at)
        if piece.count(0) != len(piece):
            digest.update(at.to_bytes(8, "little"))
            digest.update(piece)
        at += len(piece)
    digest.update(end.to_bytes(8, "little"))
    return digest.hexdigest()


def _next_data(fd: int, at: int, end: int) -> int:
    """The beginning of the first piece from `at` on that has anything written in it."""
    try:
        return max(at, os.lseek(fd, at, os.SEEK_DATA) // _PIECE * _PIECE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        raise
