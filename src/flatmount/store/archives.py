"""A layer's archive without its files' content: with the tree it gives the archive again, byte for byte.

Headers, padding and whatever else lies between contents is kept as it came (some 60 bytes an entry, compressed);
contents are taken from the layer's tree. So an exported layer has the `diff_id` it was imported with, and no
compressed blob has to be kept.

A zstd-compressed sequence of records: a kind (`r` raw, `f` file), a length of 8 bytes, and the bytes themselves or,
for a file, a length of 2 bytes and the path whose content comes here.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Final

import zstandard

from flatmount.errors import StoreError
from flatmount.image import digest as digests
from flatmount.store.entries import LayerEntry

_RECORD: Final = struct.Struct("<cQ")
_LENGTH: Final = struct.Struct("<H")
_RAW: Final = b"r"
_FILE: Final = b"f"
_CHUNK: Final = 1 << 18
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ArchiveRecorder:
    """Writes the records of one archive to the borrowed descriptor `fd`. Nothing is synced."""

    def __init__(self, fd: int) -> None:
        self._file = open(fd, "wb", closefd=False)  # noqa: SIM115 - closed by close()
        self._packed = zstandard.ZstdCompressor(level=3).stream_writer(self._file, closefd=False)
        self._raw = bytearray()
        self._records = bytearray()

    def raw(self, data: bytes | memoryview) -> None:
        """Bytes of the archive that belong to no kept file."""
        self._raw += data
        if len(self._raw) >= _CHUNK:
            self._flush()

    def content(self, path: bytes, stored: int) -> None:
        """The next `stored` bytes of the archive are what is in the layer's file `path`."""
        self._end_raw()
        self._records += _RECORD.pack(_FILE, stored) + _LENGTH.pack(len(path)) + path
        if len(self._records) >= _CHUNK:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._packed.flush(zstandard.FLUSH_FRAME)
        self._file.close()

    def _end_raw(self) -> None:
        if self._raw:
            self._records += _RECORD.pack(_RAW, len(self._raw)) + self._raw
            self._raw.clear()

    def _flush(self) -> None:
        self._end_raw()
        self._packed.write(self._records)
        self._records.clear()


def archive(fd: int, tree_fd: int, entries: Mapping[bytes, LayerEntry], diff_id: str) -> Iterator[bytes]:
    """The archive of the layer whose records `fd` holds and whose tree is `tree_fd`, both borrowed, in pieces.

    Raises: StoreError at its end, when the layer is not what it was: its bytes do not have `diff_id`.
    """
    digest = hashlib.new(digests.algorithm(diff_id))
    try:
        for piece in _pieces(fd, tree_fd, entries):
            digest.update(piece)
            yield piece
    except (ValueError, KeyError, OSError, struct.error, zstandard.ZstdError) as error:
        raise _damaged(diff_id, str(error)) from error
    if digest.hexdigest() != digests.hexadecimal(diff_id):
        raise _damaged(diff_id, "its content has another digest")


def _damaged(diff_id: str, what: str) -> StoreError:
    return StoreError(f"layer {diff_id} is not what was imported: {what}", hint="`flatmount fsck` says what changed")


def _pieces(fd: int, tree_fd: int, entries: Mapping[bytes, LayerEntry]) -> Iterator[bytes]:
    os.lseek(fd, 0, os.SEEK_SET)
    with (
        open(fd, "rb", closefd=False) as file,
        zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as unpacked,
        io.BufferedReader(unpacked, _CHUNK) as records,
    ):
        while head := records.read(_RECORD.size):
            kind, length = _RECORD.unpack(head)
            if kind == _RAW:
                yield records.read(length)
                continue
            (path_length,) = _LENGTH.unpack(records.read(_LENGTH.size))
            path = records.read(path_length)
            yield from _stored(tree_fd, path, entries[path], length)


def _stored(tree_fd: int, path: bytes, entry: LayerEntry, length: int) -> Iterator[bytes]:
    """What an archive stores of a file: all of it, or the extents of a sparse one."""
    spans = ((0, length),) if entry.extents is None else entry.extents
    fd = os.open(path, _READ, dir_fd=tree_fd)
    try:
        for offset, size in spans:
            at, end = offset, offset + size
            while at < end:
                data = os.pread(fd, min(_CHUNK, end - at), at)
                if not data:
                    raise ValueError(f"{os.fsdecode(path)} ends early")
                at += len(data)
                yield data
    finally:
        os.close(fd)
