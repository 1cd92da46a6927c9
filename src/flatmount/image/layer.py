"""A layer's bytes on their way: counted, hashed, decompressed, hashed again. One pass, nothing kept."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import zstandard
from isal import igzip_lib, isal_zlib

from flatmount.errors import BadImage
from flatmount.image import digest as digests
from flatmount.image.model import Descriptor

_CHUNK = 1 << 18
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_DECODER_ERRORS: tuple[type[Exception], ...] = (
    cast(type[Exception], igzip_lib.IsalError),
    zlib.error,
    EOFError,
    zstandard.ZstdError,
)
_ZSTD_WINDOW = 128 << 20  # bytes; what `zstd -d` takes without --long


class LayerStream:
    """Reads one layer uncompressed; `finish` says whether it was the one that was promised.

    `file` is read to its end and closed by `close`. Compression is told from the first bytes: media types are
    often wrong, and what the bytes are is settled by the digests. `progress` is called with the compressed
    bytes so far.
    """

    def __init__(
        self,
        file: BinaryIO,
        descriptor: Descriptor,
        diff_id: str,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._file = file
        self._descriptor = descriptor
        self._diff_id = diff_id
        self._progress = progress
        self._compressed = hashlib.new(digests.algorithm(descriptor.digest))
        self._plain = hashlib.new(digests.algorithm(diff_id))
        self._size = 0
        self._pieces = self._decompressed()

    @property
    def size_bytes(self) -> int:
        """What the descriptor says of the compressed size."""
        return self._descriptor.size

    def read(self, _: int) -> bytes:
        """Some uncompressed bytes, none at the end.

        Raises: BadImage for a stream that cannot be decompressed.
        """
        try:
            piece = next(self._pieces, b"")
        except _DECODER_ERRORS as error:
            raise BadImage(f"cannot be decompressed: {error}", hint="fetch or copy the image again") from error
        self._plain.update(piece)
        return piece

    def finish(self) -> None:
        """Read what is left and compare size and both digests. Raises: BadImage."""
        while self.read(_CHUNK):
            pass
        self.check_blob()
        if self._plain.hexdigest() != digests.hexadecimal(self._diff_id):
            raise BadImage(
                f"its content is {self._plain.name}:{self._plain.hexdigest()}, "
                f"but the image's config says {self._diff_id}",
                hint="the image was put together wrongly or tampered with; nothing was stored",
            )

    def check_blob(self) -> None:
        """Read what is left of the blob, without decompressing it, and compare size and digest.

        Raises: BadImage.
        """
        while self._take():
            pass
        said, digest = self._descriptor, f"{self._compressed.name}:{self._compressed.hexdigest()}"
        if self._size != said.size:
            raise BadImage(
                f"it has {self._size} bytes instead of {said.size}",
                hint="it is truncated or tampered with; fetch or copy the image again",
            )
        if digest != said.digest:
            raise BadImage(
                f"it has another digest, {digest}",
                hint="it is damaged or tampered with; fetch or copy the image again",
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _take(self) -> bytes:
        # One byte more than promised is enough to know that the size is wrong.
        data = self._file.read(min(_CHUNK, self._descriptor.size + 1 - self._size))
        self._size += len(data)
        self._compressed.update(data)
        if self._progress is not None:
            self._progress(self._size)
        return data

    def _decompressed(self) -> Iterator[bytes]:
        data = self._take()
        while 0 < len(data) < 4 and (more := self._take()):
            data += more
        if data.startswith(_GZIP):
            yield from self._members(data)
        elif data.startswith(_ZSTD):
            yield from self._frames(data)
        else:
            while data:
                yield data
                data = self._take()

    def _members(self, data: bytes) -> Iterator[bytes]:
        """Gzip members, one after the other, in bounded pieces, so that a bomb meets its reader's limits."""
        decoder = isal_zlib.decompressobj(16 + zlib.MAX_WBITS)
        while True:
            piece = decoder.decompress(data, _CHUNK)
            if piece:
                yield piece
            data = decoder.unconsumed_tail
            if decoder.eof:
                data = decoder.unused_data or self._take()
                if not data.strip(b"\0"):
                    return  # padding after the last member, as some writers leave it
                while len(data) < 2 and (more := self._take()):
                    data += more
                if not data.startswith(_GZIP):
                    # Another reader might take it for content.
                    raise BadImage("something follows the compressed stream", hint="the image is malformed or hostile")
                decoder = isal_zlib.decompressobj(16 + zlib.MAX_WBITS)
            elif not data and len(piece) < _CHUNK:
                data = self._take()
                if not data:
                    raise BadImage("the compressed stream ends early", hint="fetch or copy the image again")

    def _frames(self, data: bytes) -> Iterator[bytes]:
        rest = cast(BinaryIO, _Rest(data, self._take))
        with zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(
            rest, read_across_frames=True, closefd=False
        ) as reader:
            while piece := reader.read(_CHUNK):
                yield piece


class _Rest:
    """What was read already and then the rest, for a decoder that wants a file."""

    def __init__(self, head: bytes, take: Callable[[], bytes]) -> None:
        self._head = head
        self._take = take

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            self._head = self._take()
        part, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
        return part
