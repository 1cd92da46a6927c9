"""The manifest of a layer's entries: what was unpacked, for whoever has to verify it later.

A zstd-compressed text of JSON lines: a header object, then one array for each entry, sorted by path. Names
are bytes on disk and text here: UTF-8, other bytes as lone surrogates.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NamedTuple

import zstandard

from flatmount.errors import StoreError
from flatmount.image.tar import Extent, Kind

SCHEMA: Final = "flatmount.entries/1"
_LETTERS: Final = {
    Kind.FILE: "f",
    Kind.SYMLINK: "l",
    Kind.CHAR: "c",
    Kind.BLOCK: "b",
    Kind.DIRECTORY: "d",
    Kind.FIFO: "p",
}
_KINDS: Final = {letter: kind for kind, letter in _LETTERS.items()}
_WHITEOUT_LETTER: Final = "w"


class LayerEntry(NamedTuple):
    """One name in a layer's tree.

    `kind` None is a whiteout. `digest` is the sha256 of a file's stored bytes (of its extents, in order, when
    it is sparse), empty for a file that is a link to `below`, a path of a lower layer. Names of one file
    share a `group`.
    """

    kind: Kind | None
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    digest: str = ""
    target: bytes = b""
    device: tuple[int, int] | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[Extent, ...] | None = None
    group: int | None = None
    below: bytes | None = None
    opaque: bool = False


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _line(path: bytes, entry: LayerEntry) -> str:
    more: dict[str, Any] = {}
    if entry.target:
        more["target"] = _text(entry.target)
    if entry.device is not None:
        more["device"] = entry.device
    if entry.xattrs:
        more["xattrs"] = {_text(key): value.hex() for key, value in entry.xattrs}
    if entry.extents is not None:
        more["extents"] = entry.extents
    if entry.group is not None:
        more["group"] = entry.group
    if entry.below is not None:
        more["below"] = _text(entry.below)
    if entry.opaque:
        more["opaque"] = True
    letter = _LETTERS[entry.kind] if entry.kind is not None else _WHITEOUT_LETTER
    # What json.dumps gives for the list, which makes a new encoder each time.
    numbers = f"{entry.mode},{entry.uid},{entry.gid},{entry.mtime_ns},{entry.size}"
    rest = "," + json.dumps(more, separators=(",", ":")) if more else ""
    return f'[{encode_basestring_ascii(_text(path))},"{letter}",{numbers},"{entry.digest}"{rest}]'


def _entry(line: str) -> tuple[bytes, LayerEntry]:
    path, letter, mode, uid, gid, mtime_ns, size, digest, *rest = json.loads(line)
    more = rest[0] if rest else {}
    device, extents, below = more.get("device"), more.get("extents"), more.get("below")
    return _bytes(path), LayerEntry(
        kind=None if letter == _WHITEOUT_LETTER else _KINDS[letter],
        mode=mode,
        uid=uid,
        gid=gid,
        mtime_ns=mtime_ns,
        size=size,
        digest=digest,
        target=_bytes(more.get("target", "")),
        device=None if device is None else (device[0], device[1]),
        xattrs=tuple((_bytes(key), bytes.fromhex(value)) for key, value in more.get("xattrs", {}).items()),
        extents=None if extents is None else tuple(Extent(*pair) for pair in extents),
        group=more.get("group"),
        below=None if below is None else _bytes(below),
        opaque=more.get("opaque", False),
    )


def write(fd: int, diff_id: str, entries: Iterable[tuple[bytes, LayerEntry]]) -> None:
    """Write the manifest to the borrowed descriptor `fd`. It is not synced."""
    with (
        open(fd, "wb", closefd=False) as file,
        zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as packed,
        io.TextIOWrapper(packed, encoding="ascii", newline="\n", write_through=False) as text,
    ):
        text.write(json.dumps({"schema": SCHEMA, "diff_id": diff_id}) + "\n")
        for path, entry in entries:
            text.write(_line(path, entry) + "\n")


def read(fd: int, diff_id: str) -> Iterator[tuple[bytes, LayerEntry]]:
    """The entries in the manifest that the borrowed descriptor `fd` is open on.

    Raises: StoreError when it is damaged.
    """
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        with (
            open(fd, "rb", closefd=False) as file,
            zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as packed,
            io.TextIOWrapper(packed, encoding="ascii") as text,
        ):
            header = json.loads(text.readline())
            if header != {"schema": SCHEMA, "diff_id": diff_id}:
                raise StoreError(f"the entries of layer {diff_id} are those of {header}", hint="the store is damaged")
            for line in text:
                yield _entry(line)
    except (ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
        raise StoreError(
            f"the entries of layer {diff_id} cannot be read: {error}", hint="the store is damaged"
        ) from error
