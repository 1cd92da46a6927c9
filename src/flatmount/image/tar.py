"""A strict, streaming reader of tar archives: ustar, GNU and PAX, sparse files in all four forms.

A layer comes from anybody. Whatever is not clearly an archive is an error here; nothing is guessed, skipped
or taken for the end. Names are bytes, as the kernel has them.

See: pax(1), "ustar Interchange Format" and "pax Interchange Format"; tar(5); GNU tar manual, "Storing Sparse
Files".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from flatmount.errors import BadImage

BLOCK: Final = 512
EXTENSION_BYTES: Final = 1 << 20  # of one PAX header, long name or sparse map, as in Go's archive/tar
_EXTENSIONS: Final = 32  # headers before one entry; a writer needs three
TRAILING_BYTES: Final = 64 << 20  # after the end of the archive; writers pad to a record of 10 KiB
_REMEMBERED: Final = 4096  # numbers of headers: owners, modes and times are few
_HINT: Final = "the archive is damaged or was made by a broken tool"


class Kind(enum.Enum):
    """What an entry is."""

    FILE = "file"
    LINK = "hard link"
    SYMLINK = "symbolic link"
    CHAR = "character device"
    BLOCK = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


class Extent(NamedTuple):
    """Bytes of a sparse file that are stored: all others are holes."""

    offset: int
    length: int


class Entry(NamedTuple):
    """One entry. `size` is the size of the file, `stored` what the archive holds of it, in bytes."""

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    stored: int
    target: bytes
    major: int
    minor: int
    xattrs: tuple[tuple[bytes, bytes], ...]
    extents: tuple[Extent, ...] | None


_KINDS: Final = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_ZERO: Final = bytes(BLOCK)
_XATTR: Final = b"SCHILY.xattr."


class _Input:
    """Exact reads on top of a stream that returns what it has."""

    def __init__(self, read: Callable[[int], bytes], keep: Callable[[bytes | memoryview], None]) -> None:
        self._read = read
        self._keep = keep
        self._chunk = memoryview(b"")
        self._at = 0
        self.position = 0

    def take(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the stream."""
        end = self._at + size
        if end <= len(self._chunk):
            part = self._chunk[self._at : end].tobytes()
            self._at = end
            self.position += size
        else:
            part = b"".join(self.pieces(size))
        self._keep(part)
        return part

    def whole(self, size: int) -> bytes | memoryview:
        """As `take`, but not kept, and not copied where it can be had as it lies."""
        end = self._at + size
        if end > len(self._chunk):
            return b"".join(self.pieces(size))
        part = self._chunk[self._at : end]
        self._at = end
        self.position += size
        return part

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes without copying them; ends early only at the end of the stream."""
        while size:
            if self._at == len(self._chunk):
                self._chunk = memoryview(self._read(1 << 18))
                self._at = 0
                if not len(self._chunk):
                    return
            piece = self._chunk[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            yield piece


class Recorder(Protocol):
    """Is told every byte of an archive, in order."""

    def raw(self, data: bytes | memoryview) -> None:
        """Bytes that are in no claimed content."""

    def content(self, path: bytes, stored: int) -> None:
        """The content of the current entry, `stored` bytes, which was claimed as `path`."""


class TarReader:
    """Iterates over the entries of a stream; `data()` gives the content of the one that was just returned.

    `read(n)` returns at most n bytes, none at the end. `recorder` is told all bytes but contents that are
    claimed. Errors are BadImage, with the entry's position in the archive.
    """

    def __init__(self, read: Callable[[int], bytes], recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        self._keep: Callable[[bytes | memoryview], None] = _forget if recorder is None else recorder.raw
        self._input = _Input(read, self._keep)
        self._claimed = False
        self._left = 0
        self._padding = 0
        self._last = b""
        self._numbers: dict[bytes, int] = {}

    @property
    def data_offset(self) -> int:
        """Where the content of the current entry begins, in bytes from the start of the stream."""
        return self._input.position

    def skipped(self, stored: int) -> None:
        """Tell that the caller moved the stream past the content, of `stored` bytes, and its padding."""
        self._input.position += stored + -stored % BLOCK
        self._left = self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            self._left = entry.stored
            self._padding = -entry.stored % BLOCK
            self._last = entry.name
            self._claimed = False
            yield entry
        self._drain()

    def claim(self, path: bytes) -> None:
        """The content of the current entry will be in the file `path`: the recorder need not keep it."""
        self._claimed = True
        if self._recorder is not None and self._left:
            self._recorder.content(path, self._left)

    def data(self) -> Iterator[memoryview]:
        """The stored bytes of the current entry, in order; of a sparse file those of its extents."""
        while self._left:
            got = False
            for piece in self._input.pieces(self._left):
                got = True
                self._left -= len(piece)
                if not self._claimed:
                    self._keep(piece)
                yield piece
            if not got:
                raise self._bad("the archive ends within the content")

    def content(self) -> bytes | memoryview:
        """All of `data()` at once, for an entry that is known to be small."""
        whole = self._input.whole(self._left)
        if len(whole) != self._left:
            raise self._bad("the archive ends within the content")
        self._left = 0
        if not self._claimed:
            self._keep(whole)
        return whole

    def _bad(self, what: str) -> BadImage:
        after = f" after {show(self._last)}" if self._last else ""
        return BadImage(f"tar entry at byte {self._input.position}{after}: {what}", hint=_HINT)

    def _block(self) -> bytes:
        block = self._input.take(BLOCK)
        if len(block) != BLOCK:
            raise self._bad("the archive ends within a header")
        return block

    def _skip(self) -> None:
        if self._left:
            for _ in self.data():
                pass
        # umoci ends an archive right after the last content; what is missing is nothing but zeros.
        if self._padding:
            self._input.take(self._padding)
            self._padding = 0

    def _drain(self) -> None:
        """Whatever follows the end belongs to the digest and to nothing else."""
        trailing = 0
        for piece in self._input.pieces(TRAILING_BYTES + 1):
            trailing += len(piece)
            self._keep(piece)
        if trailing > TRAILING_BYTES:
            raise self._bad(f"more than {TRAILING_BYTES} bytes after the end of the archive")

    def _extension(self, header: bytes) -> bytes:
        size = self._number(header[124:136], "size")
        if size > EXTENSION_BYTES:
            raise self._bad(f"an extended header of {size} bytes")
        data = self._input.take(size)
        if len(data) != size or len(self._input.take(-size % BLOCK)) != -size % BLOCK:
            raise self._bad("the archive ends within an extended header")
        return data

    def _next(self) -> Entry | None:
        self._skip()
        pax: dict[bytes, bytes] = {}
        sparse_00: list[int] = []
        name = target = None
        extended = False
        for _ in range(_EXTENSIONS):
            block = self._input.take(BLOCK)
            if not block or block == _ZERO:
                if extended:
                    raise self._bad("an extended header without its entry")
                return None
            if len(block) != BLOCK:
                raise self._bad("the archive ends within a header")
            self._check(block)
            flag = block[156:157]
            if flag == b"x":
                pax, sparse_00 = self._records(self._extension(block))
            elif flag == b"g":
                self._records(self._extension(block))  # for all entries to come; engines do not apply these
                continue
            elif flag == b"L":
                name = self._extension(block).split(b"\0", 1)[0]
            elif flag == b"K":
                target = self._extension(block).split(b"\0", 1)[0]
            else:
                return self._entry(block, pax, sparse_00, name, target)
            extended = True
        raise self._bad(f"{_EXTENSIONS} extended headers in a row")

    def _check(self, block: bytes) -> None:
        said = self._number(block[148:156], "checksum")
        blank = sum(block) - sum(block[148:156]) + 8 * 0x20
        if said != blank:
            signed = blank - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
            if said != signed:
                raise self._bad("the header's checksum is wrong")

    def _number(self, field: bytes, what: str, *, negative: bool = False) -> int:
        """Octal digits, or GNU's base 256 for what they cannot hold."""
        known = self._numbers.get(field)
        if known is not None:
            return known
        if field[0] & 0x80:
            value = int.from_bytes(field, "big", signed=False) & ~(0x80 << 8 * (len(field) - 1))
            if field[0] & 0x40:
                value -= 1 << (8 * len(field) - 1)
        else:
            digits = field.strip(b" \0")
            if not digits:
                return 0
            if digits.strip(b"01234567"):
                raise self._bad(f"{what} {field!r} is not a number")
            value = int(digits, 8)
        if not (-(1 << 62) if negative else 0) <= value < 1 << 62:
            raise self._bad(f"{what} {value} is out of range")
        if value >= 0 and len(self._numbers) < _REMEMBERED:
            self._numbers[field] = value
        return value

    def _decimal(self, text: bytes, what: str) -> int:
        if not text.isdigit() or len(text) > 18:
            raise self._bad(f"{what} {text[:40]!r} is not a number")
        return int(text)

    def _records(self, data: bytes) -> tuple[dict[bytes, bytes], list[int]]:
        """PAX records; those of sparse form 0.0 repeat their keys and are returned apart, in order."""
        records: dict[bytes, bytes] = {}
        sparse: list[int] = []
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + 20)
            if space <= at:
                raise self._bad("a malformed PAX record")
            end = at + self._decimal(data[at:space], "the length of a PAX record")
            if not space + 1 < end <= len(data) or data[end - 1] != 0x0A:
                raise self._bad("a malformed PAX record")
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
            if not equals or not key:
                raise self._bad("a malformed PAX record")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                expected = b"GNU.sparse.numbytes" if len(sparse) % 2 else b"GNU.sparse.offset"
                if key != expected:
                    raise self._bad("a malformed sparse map")
                sparse.append(self._decimal(value, "a sparse map"))
            records[key] = value
            at = end
        return records, sparse

    def _entry(
        self,
        block: bytes,
        pax: dict[bytes, bytes],
        sparse_00: list[int],
        long_name: bytes | None,
        long_target: bytes | None,
    ) -> Entry:
        fields = _HEADER.unpack(block)
        (name, mode, uid, gid, size, mtime, _, flag, target, magic, _, _, major, minor, prefix, _) = fields
        kind = _KINDS.get(flag)
        if kind is None:
            raise self._bad(f"an entry of unknown type {flag!r}")
        name = name.split(b"\0", 1)[0]
        if magic == b"ustar\x0000" and prefix[0]:
            name = prefix.split(b"\0", 1)[0] + b"/" + name
        name = name if long_name is None else long_name
        target = target.split(b"\0", 1)[0] if long_target is None else long_target
        stored = self._number(size, "size")
        owner, group = self._number(uid, "uid"), self._number(gid, "gid")
        mtime_ns = self._number(mtime, "mtime", negative=True) * 1_000_000_000
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if pax:
            # An empty value takes the record back (pax(1)).
            name = pax.get(b"path") or name
            target = pax.get(b"linkpath") or target
            stored = self._decimal(pax[b"size"], "size") if pax.get(b"size") else stored
            owner = self._decimal(pax[b"uid"], "uid") if pax.get(b"uid") else owner
            group = self._decimal(pax[b"gid"], "gid") if pax.get(b"gid") else group
            mtime_ns = self._time(pax[b"mtime"]) if pax.get(b"mtime") else mtime_ns
            xattrs = tuple((k[len(_XATTR) :], v) for k, v in pax.items() if k.startswith(_XATTR))
        if kind is Kind.FILE and flag in b"\x000" and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # how archives older than ustar say it
        if kind is not Kind.FILE:
            stored = 0
        extents, file_size = None, stored
        if kind is Kind.FILE and (flag == b"S" or sparse_00 or any(k.startswith(b"GNU.sparse.") for k in pax)):
            name = pax.get(b"GNU.sparse.name", name)
            extents, file_size, stored = self._sparse(block, flag, pax, sparse_00, stored)
        device = kind in (Kind.CHAR, Kind.BLOCK)
        return Entry(
            name=name,
            kind=kind,
            mode=self._number(mode, "mode") & 0o7777,
            uid=owner,
            gid=group,
            mtime_ns=mtime_ns,
            size=file_size,
            stored=stored,
            target=target,
            major=self._number(major, "device") if device else 0,
            minor=self._number(minor, "device") if device else 0,
            xattrs=xattrs,
            extents=extents,
        )

    def _time(self, text: bytes) -> int:
        """Seconds with any number of decimals, as nanoseconds, without the rounding of a float."""
        whole, _, fraction = text.partition(b".")
        minus = whole.startswith(b"-")
        seconds = self._decimal(whole.removeprefix(b"-"), "mtime")
        if seconds >= 1 << 53:
            raise self._bad(f"mtime {seconds} is out of range")
        nanoseconds = self._decimal(fraction[:9].ljust(9, b"0"), "mtime") if fraction else 0
        value = seconds * 1_000_000_000 + nanoseconds
        return -value if minus else value

    def _sparse(
        self, block: bytes, flag: bytes, pax: dict[bytes, bytes], sparse_00: list[int], stored: int
    ) -> tuple[tuple[Extent, ...], int, int]:
        if flag == b"S":
            numbers, size = self._old_gnu(block), self._number(block[483:495], "real size")
        elif b"GNU.sparse.major" in pax:
            if (pax[b"GNU.sparse.major"], pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise self._bad("a sparse file of an unknown form")
            numbers, used = self._map_in_data(stored)
            stored -= used
            size = self._decimal(pax.get(b"GNU.sparse.realsize", b""), "real size")
        else:
            text = pax.get(b"GNU.sparse.map")
            numbers = sparse_00 if text is None else [self._decimal(n, "a sparse map") for n in text.split(b",") if n]
            size = self._decimal(pax.get(b"GNU.sparse.size", b""), "real size")
        if len(numbers) % 2:
            raise self._bad("a malformed sparse map")
        extents = tuple(Extent(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))
        end = 0
        for extent in extents:
            if extent.offset < end or extent.offset + extent.length > size:
                raise self._bad("a sparse map that overlaps or leaves the file")
            end = extent.offset + extent.length
        if sum(extent.length for extent in extents) != stored:
            raise self._bad("a sparse map that disagrees with the size")
        return tuple(extent for extent in extents if extent.length), size, stored

    def _old_gnu(self, block: bytes) -> list[int]:
        numbers: list[int] = []
        table, count, more = block[386:482], 4, block[482]
        blocks = 0
        while True:
            for at in range(0, 24 * count, 24):
                if not table[at]:
                    break
                numbers += [
                    self._number(table[at : at + 12], "offset"),
                    self._number(table[at + 12 : at + 24], "length"),
                ]
            if not more:
                return numbers
            blocks += 1
            if blocks * BLOCK > EXTENSION_BYTES:
                raise self._bad("a sparse map without end")
            table = self._block()
            count, more = 21, table[504]

    def _map_in_data(self, stored: int) -> tuple[list[int], int]:
        """Form 1.0: decimal lines before the data, the first their number, padded to a block."""
        text, used = b"", 0
        count = None
        while count is None or text.count(b"\n") < 2 * count + 1:
            if used + BLOCK > min(stored + -stored % BLOCK, EXTENSION_BYTES):
                raise self._bad("a malformed sparse map")
            text += self._block()
            used += BLOCK
            if count is None and b"\n" in text:
                count = self._decimal(text.partition(b"\n")[0], "a sparse map")
                if count > EXTENSION_BYTES:
                    raise self._bad("a sparse map without end")
        lines = text.split(b"\n")[1 : 2 * count + 1]
        return [self._decimal(line, "a sparse map") for line in lines], used


def _forget(data: bytes | memoryview) -> None:
    pass


def show(name: bytes) -> str:
    """A name from an archive as one bounded, printable line."""
    text = name.decode("utf-8", "backslashreplace")
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"
