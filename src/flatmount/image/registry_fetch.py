"""Layers on their way: fetched side by side, read while they come.

What comes before its reader wants it waits in files: they cost memory first and disk only when memory is short. They
have names (see flatmount.image.partial), so that what came of a layer is there for the next attempt when this one is
killed or loses the registry; where somebody else writes the same blob already, the file has none.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from flatmount.errors import FlatmountError, from_os_error
from flatmount.image.model import Descriptor
from flatmount.image.partial import drop_partial, open_partial
from flatmount.image.registry_client import Client
from flatmount.image.registry_http import Interrupted

_FETCHED_AHEAD: Final = 64  # layers that wait for their reader, each with one descriptor
_JOIN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """How far the fetching of layer `position`, from 0, is; bytes. `kept_bytes` of them an earlier attempt fetched."""

    position: int
    digest: str
    done_bytes: int
    kept_bytes: int
    total_bytes: int
    active: bool


class Fetcher:
    """Fetches layers of one image on `parallel` threads, in the order in which they were asked for."""

    def __init__(self, client: Client, layers: Sequence[Descriptor], parallel: int) -> None:
        self._client = client
        self._layers = layers
        self._parallel = parallel
        self._directory: str | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Spool] = deque()
        self._spools: dict[int, Spool] = {}
        self._threads: list[threading.Thread] = []
        self._working = 0  # threads that will look for another layer; counted, because one that ends is alive a moment
        self._closed = False

    def begin(self, positions: Sequence[int], directory: str | None) -> None:
        """Start to fetch these layers, where earlier attempts ended; what comes is kept in files of `directory`.

        Without a directory it is kept in unnamed files of the system's own for temporary ones.
        """
        self._directory = directory
        spools = [Spool(position, self._layers[position], directory, self._changed) for position in positions]
        with self._changed:
            self._waiting.extend(spools)
            self._spools.update({spool.position: spool for spool in spools})
            for _ in range(min(self._parallel, len(self._waiting)) - self._working):
                self._working += 1
                thread = threading.Thread(target=self._work, name="flatmount-fetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def open(self, position: int) -> BinaryIO:
        """The bytes of a layer, which the caller closes; its `read` waits for what has not come yet."""
        with self._changed:
            spool = self._spools.get(position)
            known = spool is not None and not spool.taken
        if not known:
            self.begin((position,), self._directory)
        with self._changed:
            spool = self._spools[position]
            spool.taken = True
            self._changed.notify_all()
        return cast(BinaryIO, spool)

    def forget(self, position: int) -> bool:
        """Give the name of a layer's file back; whether its bytes began with those of an earlier attempt."""
        with self._changed:
            spool = self._spools.get(position)
        return spool is not None and spool.forget()

    def states(self) -> tuple[Fetched, ...]:
        """How far every layer is that was asked for."""
        with self._changed:
            return tuple(spool.state() for spool in self._spools.values())

    def give_up(self) -> None:
        """End what is not done: whoever reads it gets Interrupted. The threads end when their transfers do."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for spool in self._spools.values():
                spool.end(Interrupted("interrupted"))
            self._changed.notify_all()

    def close(self) -> None:
        """Give up, and give the files back. The transport must have been cancelled, so that no thread waits for it."""
        self.give_up()
        for thread in self._threads:
            thread.join(_JOIN_S)
        for spool in self._spools.values():
            spool.close()

    def _work(self) -> None:
        while (spool := self._next()) is not None:
            try:
                start = spool.start()
                if start < spool.descriptor.size:
                    for piece in self._client.blob(spool.descriptor, start):
                        spool.put(piece)
                spool.end(None)
            except FlatmountError as error:
                spool.end(error)
            except OSError as error:
                spool.end(from_os_error(error, "keep what was fetched"))
            except Exception as error:
                # Whoever reads must not wait for ever, and the fault must not go by unseen.
                spool.end(FlatmountError(f"{type(error).__name__}: {error}", hint="this is a fault of flatmount"))

    def _next(self) -> Spool | None:
        """The layer to fetch next, as soon as few enough wait for their reader. A taken one never has to wait."""
        with self._changed:
            while True:
                if self._closed or not self._waiting:
                    self._working -= 1
                    return None
                wanted = next((spool for spool in self._waiting if spool.taken), None)
                if wanted is not None:
                    self._waiting.remove(wanted)
                    return wanted
                if sum(spool.holds for spool in self._spools.values()) < _FETCHED_AHEAD:
                    spool = self._waiting.popleft()
                    spool.holds = True
                    return spool
                self._changed.wait()


class Spool(io.RawIOBase):
    """One layer, written by the thread that fetches it and read by somebody else at the same time."""

    def __init__(
        self, position: int, descriptor: Descriptor, directory: str | None, changed: threading.Condition
    ) -> None:
        self.position = position
        self.descriptor = descriptor
        self.taken = False
        self.holds = False
        self._directory = directory
        self._changed = changed
        self._file: BinaryIO | None = None
        self._written = 0
        self._kept = 0
        self._named = False
        self._forgotten = False
        self._at = 0
        self._ended = False
        self._error: FlatmountError | None = None

    def start(self) -> int:
        """Make the file, or open that of an earlier attempt; returns how many bytes are in it already."""
        kept = None if self._directory is None else self._open_kept(self._directory)
        if kept is None:
            unnamed = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - closed by close()
        file, have = kept or (cast(BinaryIO, unnamed), 0)
        with self._changed:
            self.holds = True
            self._named = kept is not None
            self._kept = self._written = have
            # Nobody may be left to want it: it was forgotten, or closed, while it was made.
            if self._forgotten or (self.closed and not have):
                self.forget()
            if self.closed:
                file.close()
            else:
                self._file = file
            self._changed.notify_all()
        return have

    def _open_kept(self, directory: str) -> tuple[BinaryIO, int] | None:
        opened = open_partial(directory, self.descriptor.digest, self.descriptor.size)
        return None if opened is None else (cast(BinaryIO, os.fdopen(opened[0], "r+b", buffering=0)), opened[1])

    def forget(self) -> bool:
        """Give the file's name back; whether its bytes began with those of an earlier attempt."""
        self._forgotten = True
        if self._named and self._directory is not None:
            drop_partial(self._directory, self.descriptor.digest)
        return self._kept > 0

    def put(self, piece: bytes) -> None:
        """Append `piece`. Raises: Interrupted, when nobody will read it any more."""
        rest = memoryview(piece)
        with self._changed:
            while rest:
                if self._file is None or self._ended:
                    raise Interrupted("interrupted")
                done = os.pwrite(self._file.fileno(), rest, self._written)
                self._written += done
                rest = rest[done:]
            self._changed.notify_all()

    def end(self, error: FlatmountError | None) -> None:
        """There will be no more; `error` says why, where that is not the end of the layer. The first word counts."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def state(self) -> Fetched:
        """See Fetched. The caller holds the condition's lock."""
        active = self._file is not None and not self._ended
        return Fetched(self.position, self.descriptor.digest, self._written, self._kept, self.descriptor.size, active)

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, as soon as there are any; none at the end.

        Raises: RegistryError and what else ended the fetching early.
        """
        with self._changed:
            while self._at == self._written and not self._ended and not self.closed:
                self._changed.wait()
            if self._file is None or self._at == self._written:
                if self._error is not None:
                    raise self._error
                return b""
            there = self._written - self._at
            # Under the lock: the file may be closed by somebody else, and its descriptor be another file's at once.
            data = os.pread(self._file.fileno(), there if size < 0 else min(size, there), self._at)
            self._at += len(data)
            return data

    def close(self) -> None:
        """Give the file back; what is still to come is not wanted any more."""
        with self._changed:
            if self._file is not None:
                if not self._written:
                    self.forget()
                self._file.close()
                self._file = None
            self.holds = False
            super().close()
            self._changed.notify_all()
