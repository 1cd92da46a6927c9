"""The files that an image comes in: a directory, or a tar archive that is read in place."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from flatmount.errors import BadImage, FlatmountError, from_os_error
from flatmount.image.tar import BLOCK, Kind, TarReader

_MAX_MEMBERS = 200_000
_LINKS = 8


class Files(Protocol):
    """Named regular files that can be read. Names are relative, with slashes, and never leave the place."""

    where: str

    def open(self, name: str) -> BinaryIO | None:
        """The file for reading, which the caller closes, or None where there is none of that name."""

    def size(self, name: str) -> int | None:
        """Its size in bytes, or None where there is none."""

    def close(self) -> None:
        """Give back what is open."""


class DirectoryFiles:
    """Files below a directory. No symbolic link is followed and nothing but a regular file is opened."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, name: str) -> BinaryIO | None:
        """See Files.open. Raises: BadImage for a link or a special file."""
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise BadImage(f"{self.where}: a file called {name!r}", hint="the image is malformed")
        opened: list[int] = []
        try:
            fd = self._fd
            for part in parts[:-1]:
                fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                opened.append(fd)
            # O_NONBLOCK: a fifo must not hang the reader.
            last = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise BadImage(
                    f"{self.where}/{name} is not a plain file", hint="links are not followed here"
                ) from error
            raise from_os_error(error, "open") from error
        finally:
            for fd in opened:
                os.close(fd)
        if not stat.S_ISREG(os.fstat(last).st_mode):
            os.close(last)
            raise BadImage(f"{self.where}/{name} is not a plain file", hint="links and devices are not read here")
        return os.fdopen(last, "rb", buffering=0)

    def size(self, name: str) -> int | None:
        """See Files.size."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            return os.fstat(file.fileno()).st_size

    def close(self) -> None:
        """See Files.close."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int


class TarFiles:
    """Files of an uncompressed tar archive, read where they lie.

    Old docker archives link layers to each other.
    """

    def __init__(self, path: str) -> None:
        self.where = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._members: dict[str, _Member] = {}
        self._links: dict[str, str] = {}
        try:
            self._read_members()
        except BaseException:
            self._file.close()
            raise

    def _read_members(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(6)
        if head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd" or head == b"\xfd7zXZ\0":
            raise BadImage(f"{self.where} is compressed as a whole", hint="decompress it first (gunzip, zstd -d, unxz)")
        if len(head) < 6:
            raise BadImage(
                f"{self.where} is not an image: it has {len(head)} bytes",
                hint="give an OCI layout or archive",
            )
        self._file.seek(0)
        reader = TarReader(self._seeking_read)
        try:
            for count, entry in enumerate(reader):
                if count > _MAX_MEMBERS:
                    raise BadImage(f"{self.where}: more than {_MAX_MEMBERS} files", hint="this is not an image")
                name = posixpath.normpath(os.fsdecode(entry.name))
                if entry.kind is Kind.FILE and entry.extents is None:
                    if reader.data_offset + entry.stored > size:
                        raise BadImage(f"{self.where} is truncated within {name}", hint="fetch or copy it again")
                    self._members[name] = _Member(reader.data_offset, entry.stored)
                    self._jump(reader, entry.stored)
                elif entry.kind in (Kind.SYMLINK, Kind.LINK):
                    target = os.fsdecode(entry.target)
                    base = posixpath.dirname(name) if entry.kind is Kind.SYMLINK else ""
                    self._links[name] = posixpath.normpath(posixpath.join(base, target))
        except BadImage as error:
            if not self._members:
                raise BadImage(
                    f"{self.where} is not an image: {error}", hint="give an OCI layout or archive"
                ) from error
            raise BadImage(f"{self.where}: {error}", hint=error.hint) from error

    def _seeking_read(self, _: int) -> bytes:
        return self._file.read(BLOCK)

    def _jump(self, reader: TarReader, stored: int) -> None:
        """Content is skipped by position: an archive of gigabytes is listed without reading it."""
        self._file.seek(stored + -stored % BLOCK, io.SEEK_CUR)
        reader.skipped(stored)

    def _find(self, name: str) -> _Member | None:
        for _ in range(_LINKS):
            if name in self._members:
                return self._members[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None

    def open(self, name: str) -> BinaryIO | None:
        """See Files.open."""
        member = self._find(name)
        if member is None:
            return None
        return io.BufferedReader(_Slice(os.dup(self._file.fileno()), member.offset, member.size), 1 << 18)

    def size(self, name: str) -> int | None:
        """See Files.size."""
        member = self._find(name)
        return None if member is None else member.size

    def close(self) -> None:
        """See Files.close."""
        self._file.close()


class _Slice(io.RawIOBase):
    """A part of a file as a file. Owns `fd`; reads by position, so that several may share one description."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._at, self._end = fd, offset, offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed names a wider buffer
        size = min(len(buffer), self._end - self._at)
        done = os.preadv(self._fd, [buffer[:size]], self._at) if size else 0
        self._at += done
        return done

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_files(path: str) -> Files:
    """The files of the image at `path`, a directory or a tar archive. Raises: BadImage, FlatmountError."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return DirectoryFiles(path)
        if stat.S_ISREG(mode):
            return TarFiles(path)
    except FileNotFoundError as error:
        raise FlatmountError(
            f"{path}: there is no such file or directory", hint="give an OCI layout or archive"
        ) from error
    except OSError as error:
        raise from_os_error(error, "open") from error
    raise BadImage(f"{path} is neither a directory nor a file", hint="give an OCI layout or archive")


def read_document(files: Files, name: str, limit: int) -> bytes | None:
    """A small file as a whole, or None where there is none. Raises: BadImage past `limit` bytes."""
    file = files.open(name)
    if file is None:
        return None
    with file:
        data = b""
        while len(data) <= limit and (part := file.read(limit + 1 - len(data))):
            data += part
    if len(data) > limit:
        raise BadImage(f"{files.where}: {name} has more than {limit} bytes", hint="the image is malformed")
    return data
