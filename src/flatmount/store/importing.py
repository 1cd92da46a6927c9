"""From an image somewhere to layers in the store: all of it, durably, or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

from flatmount.errors import BadImage, FlatmountError, StoreError, from_os_error
from flatmount.image import ImageSource, LayerStream, TarReader
from flatmount.image import digest as digests
from flatmount.image.ahead import ReadAhead
from flatmount.store import entries
from flatmount.store.archives import ArchiveRecorder
from flatmount.store.below import Below
from flatmount.store.database import Database
from flatmount.store.disk import Disk
from flatmount.store.origins import book_origin
from flatmount.store.unpack import Limits, Unpacked, unpack

_ATTEMPTS = 3
_AHEAD_BYTES = 4 << 20  # compressed; smaller layers run side by side as they are
_SIDE_BY_SIDE = 4  # layers, each with up to 128 open directories


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far an import is: layer `layer` of `layers`, counted from 1, and its compressed bytes."""

    layer: int
    layers: int
    digest: str
    done_bytes: int
    total_bytes: int


Progress = Callable[[Progressed], None]
"""Called from the threads that unpack, of which there are several."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A layer of the image that is being imported: in the store already, or new and still in staging."""

    number: int
    diff_id: str
    parent_chain: str
    unpacked: Unpacked | None
    repeated: bool


class _Vanished(Exception):
    """A layer that was to be shared was removed meanwhile."""


def import_image(
    disk: Disk, database: Database, image: ImageSource, name: str | None, progress: Progress | None
) -> None:
    """Make `image` part of the store, under `name` if there is one. Raises: BadImage, StoreError."""
    with disk.working():
        for attempt in range(_ATTEMPTS):
            run = _Import(disk, database, image, progress)
            try:
                run.stage()
                run.commit(name)
                return
            except StoreError:
                # There is no room, or nothing can be written: what only saves time does not stay.
                run.undo()
                run.forget()
                raise
            except _Vanished:
                run.undo()
                if attempt + 1 == _ATTEMPTS:
                    raise FlatmountError(
                        "layers are being removed as fast as they are imported", hint="try again"
                    ) from None
            except BaseException:
                run.undo()
                raise


def unpack_layer(
    disk: Disk,
    image: ImageSource,
    position: int,
    number: int,
    below: Sequence[str],
    report: Callable[[int], None] | None = None,
    ready: Callable[[], None] | None = None,
) -> Unpacked:
    """Unpack layer `position` of `image` to staging/`number` and write its entries; nothing is synced or in the book.

    `below` are the trees beneath it, topmost first, relative to the data directory; `ready` returns when they are
    complete, and is called when the first of them is needed. Both digests are verified; a layer that is bad and began
    with what an earlier attempt had kept is fetched and unpacked once more, as a whole.
    What a failure leaves is the caller's to discard. Raises: BadImage, StoreError, naming the layer.
    """
    label = f"layer {image.manifest.layers[position].digest}"
    try:
        try:
            return _unpack_once(disk, image, position, number, Below(disk.data_fd, below, ready), report)
        except BadImage:
            if not image.forget(position):
                raise
        disk.discard(f"staging/{number}")
        return _unpack_once(disk, image, position, number, Below(disk.data_fd, below, ready), report)
    except FlatmountError as error:
        raise type(error)(f"{label}: {error}", hint=error.hint) from error
    except OSError as error:
        raise from_os_error(error, f"{label}: unpack") from error


def _unpack_once(
    disk: Disk, image: ImageSource, position: int, number: int, below: Below, report: Callable[[int], None] | None
) -> Unpacked:
    diff_id = image.config.diff_ids[position]
    stream = LayerStream(image.open_layer(position), image.manifest.layers[position], diff_id, report)
    try:
        return _unpack_stream(disk, stream, number, diff_id, below)
    except BadImage:
        # A damaged blob makes strange archives: say that it is damaged, if it is.
        stream.check_blob()
        raise
    finally:
        stream.close()


def _unpack_stream(disk: Disk, stream: LayerStream, number: int, diff_id: str, below: Below) -> Unpacked:
    os.mkdir(f"staging/{number}", 0o700, dir_fd=disk.data_fd)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    target = os.open(f"staging/{number}", flags, dir_fd=disk.data_fd)
    try:
        limits = Limits(total_bytes=disk.free_bytes())
        unpacked = _unpack_recorded(disk, stream, number, target, below, limits)
    finally:
        os.close(target)
    stream.finish()
    if not unpacked.complete:
        disk.drop_archive(number)
    fd = disk.create_entries(number)
    try:
        entries.write(fd, diff_id, unpacked.entries.items())
    finally:
        os.close(fd)
    return unpacked


def _unpack_recorded(
    disk: Disk, stream: LayerStream, number: int, target: int, below: Below, limits: Limits
) -> Unpacked:
    fd = disk.create_archive(number)
    try:
        recorder = ArchiveRecorder(fd)
        try:
            return _unpack_ahead(stream, recorder, target, below, limits)
        finally:
            recorder.close()
    finally:
        os.close(fd)


def _unpack_ahead(
    stream: LayerStream, recorder: ArchiveRecorder, target: int, below: Below, limits: Limits
) -> Unpacked:
    """Fetching, decompressing and two digests on one thread, making files on this one."""
    if stream.size_bytes < _AHEAD_BYTES or len(os.sched_getaffinity(0)) == 1:
        return unpack(TarReader(stream.read, recorder), target, below, limits)
    ahead = ReadAhead(stream.read)
    try:
        return unpack(TarReader(ahead.read, recorder), target, below, limits)
    finally:
        ahead.close()


def layer_facts(unpacked: Unpacked) -> tuple[int | str | None, ...]:
    """What the book keeps of a layer, from the column `entries` on."""
    root = unpacked.root
    return (
        len(unpacked.entries),
        unpacked.files,
        unpacked.size_bytes,
        unpacked.dropped_xattrs,
        json.dumps([unpacked.owners.uids, unpacked.owners.gids]),
        None if root is None else json.dumps([root.mode, root.uid, root.gid, root.mtime_ns]),
    )


def _wait_for(layers: Sequence[Future[Unpacked]]) -> None:
    for layer in layers:
        layer.result()


class _Import:
    def __init__(self, disk: Disk, database: Database, image: ImageSource, progress: Progress | None) -> None:
        self._disk = disk
        self._database = database
        self._image = image
        self._progress = progress
        self._chain = digests.chain_ids(image.config.diff_ids)
        self._placed: list[_Placed] = []
        self._numbers: list[int] = []
        self._missing: list[int] = []
        self._given_up = threading.Event()

    def stage(self) -> None:
        """Unpack what the store does not have. Lower layers first: upper ones are resolved against them."""
        there = self._there()
        missing = [position for position, number in enumerate(there) if number is None]
        self._numbers = list(self._database.next_numbers(len(missing))) if missing else []
        self._missing = missing
        self._image.expect(missing, self._disk.keeping())
        fresh = iter(self._numbers)
        numbers = [next(fresh) if number is None else number for number in there]
        kinds = ["staging" if number is None else "layers" for number in there]
        paths = [f"{kind}/{number}" for kind, number in zip(kinds, numbers, strict=True)]
        unpacked = dict(zip(missing, self._side_by_side(missing, numbers, paths), strict=True))
        diff_ids = self._image.config.diff_ids
        for position, (diff_id, number) in enumerate(zip(diff_ids, numbers, strict=True)):
            parent = self._chain[position - 1] if position else ""
            repeated = diff_id in diff_ids[:position]
            self._placed.append(_Placed(number, diff_id, parent, unpacked.get(position), repeated))
        # Before the sync, which would only write it.
        self.forget()

    def forget(self) -> None:
        """Nothing of what was fetched is kept for another attempt."""
        for position in self._missing:
            self._image.forget(position)

    def _unpack(self, position: int, number: int, below: Sequence[str], ready: Callable[[], None]) -> Unpacked:
        unpacked = unpack_layer(self._disk, self._image, position, number, below, self._reporter(position), ready)
        # Until all layers are there, this one would have to be fetched again after a kill.
        if not self._disk.roomy():
            self._image.forget(position)
        return unpacked

    def _side_by_side(self, missing: Sequence[int], numbers: Sequence[int], paths: Sequence[str]) -> list[Unpacked]:
        """Unpack several layers at once. One that must know what is beneath it waits for those beneath it.

        They are begun lowest first, so that nobody waits for a layer that has not begun. When one fails, the
        others are given up, and nothing is written any more when the failure is raised: of several, the lowest.
        """
        jobs: list[Future[Unpacked]] = []
        with ThreadPoolExecutor(min(_SIDE_BY_SIDE, os.cpu_count() or 1), "flatmount-unpack") as pool:
            try:
                for position in missing:
                    below, ready = paths[:position][::-1], partial(_wait_for, tuple(jobs))
                    jobs.append(pool.submit(self._unpack, position, numbers[position], below, ready))
                ended = wait(jobs, return_when=FIRST_EXCEPTION).done
                return [job.result() for job in jobs if job in ended]
            except BaseException:
                self._given_up.set()
                self._image.give_up()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _there(self) -> list[int | None]:
        """The number of each layer that the store has."""
        found: list[int | None] = []
        for position, diff_id in enumerate(self._image.config.diff_ids):
            found.append(self._find(diff_id, self._chain[position - 1] if position else "", found))
        return found

    def _find(self, diff_id: str, parent: str, used: Sequence[int | None]) -> int | None:
        with self._database.reading() as db:
            rows = db.execute(
                "SELECT number FROM layers WHERE diff_id = ? AND (parent_chain IS NULL OR parent_chain = ?)",
                (diff_id, parent),
            ).fetchall()
        # overlayfs refuses one directory as two of its layers, so that a repeated layer gets a tree of its
        # own.
        return next((number for (number,) in rows if number not in used), None)

    def _reporter(self, position: int) -> Callable[[int], None]:
        """Called for each piece of a layer: passes the word on, or ends a layer that nobody needs any more."""
        progress, layers = self._progress, self._image.manifest.layers
        layer = layers[position]

        def report(done: int) -> None:
            if self._given_up.is_set():
                raise FlatmountError("given up, because another layer cannot be had")
            if progress is not None:
                progress(Progressed(position + 1, len(layers), layer.digest, done, layer.size))

        return report

    def commit(self, name: str | None) -> None:
        """Make it durable, then visible."""
        new = [placed.number for placed in self._placed if placed.unpacked]
        try:
            self._disk.sync()
            self._disk.publish("layers", new)
        except OSError as error:
            raise from_os_error(error, "keep the image") from error
        with self._database.transaction() as db:
            numbers = [self._book_layer(db, placed) for placed in self._placed]
            self._book_image(db, numbers, name)
        # The image is in the book: what another import was faster with is the sweep's where it cannot go now.
        with contextlib.suppress(OSError):
            for number in set(new) - set(numbers):
                self._discard(number)

    def _book_layer(self, db: sqlite3.Connection, placed: _Placed) -> int:
        """The layer's number from now on: another one, when somebody else was faster with the same layer."""
        unpacked = placed.unpacked
        if unpacked is None:
            if db.execute("SELECT 1 FROM layers WHERE number = ?", (placed.number,)).fetchone() is None:
                raise _Vanished
            return placed.number
        parent = placed.parent_chain if unpacked.dependent or placed.repeated else None
        row = db.execute(
            "SELECT number FROM layers WHERE diff_id = ? AND ifnull(parent_chain, 'any') = ifnull(?, 'any')",
            (placed.diff_id, parent),
        ).fetchone()
        if row is not None:
            return int(row[0])
        db.execute(
            "INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (placed.number, placed.diff_id, parent, *layer_facts(unpacked)),
        )
        return placed.number

    def _book_image(self, db: sqlite3.Connection, numbers: list[int], name: str | None) -> None:
        manifest = self._image.manifest
        documents = ((manifest.digest, manifest.raw), (manifest.config.digest, self._image.config_raw))
        db.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?)", documents)
        added = db.execute(
            "INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)",
            (manifest.digest, manifest.config.digest, self._chain[-1], time.time_ns()),
        ).rowcount
        if added:
            db.executemany(
                "INSERT INTO image_layers VALUES (?, ?, ?)",
                [(manifest.digest, position, number) for position, number in enumerate(numbers)],
            )
        if name is not None:
            db.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, manifest.digest))
        book_origin(db, manifest.digest, self._image.origin)

    def undo(self) -> None:
        """Leave the store as it was: what is in the book by now, in the moment of an interrupt, stays."""
        for number in self._database.unbooked("layers", self._numbers):
            self._discard(number)

    def _discard(self, number: int) -> None:
        self._disk.discard(f"staging/{number}")
        self._disk.discard(f"layers/{number}")
        self._disk.drop_entries(number)
