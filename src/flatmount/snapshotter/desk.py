"""The book's two threads: one that writes, one that makes sure of what was written and reads.

What many ask for at once is one commit, and one call of each kind to SQLite and to the file system: a thread that takes
the interpreter's lock for every row would wait for it at every row. A commit is seen by every process at once, and is
on disk within a second; who needs more asks for it. The event loop never waits for a disk. On a full disk
the store's reserve is given back for what makes the book smaller, and set aside again when there is room.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flatmount.errors import FlatmountError, StoreError
from flatmount.snapshotter import book
from flatmount.snapshotter._front import Committer
from flatmount.snapshotter.trees import Trees, Upper
from flatmount.store.database import LAZILY, Database
from flatmount.store.reserve import Reserve

log = logging.getLogger("flatmount.snapshotter")
T = TypeVar("T")
Done = Callable[[BaseException | None], None]

_MOST_AT_ONCE = 512
# So many are enough to begin with, while the event loop still takes in the others.
_BEGIN_AT = 16
_RESERVE_EVERY_S = 5.0
_LOW_EVERY_S = 0.1
_SYNC_AFTER_S = 0.5
# The log is moved into the book by the keeper, so often. While changes never stop that does not get to its end, and the
# writer does it after so many.
_MOVE_EVERY_S = 1.0
_WRITER_MOVES = 20_000


@dataclass(slots=True)
class Change:
    """What one request changes: directories that are made first, rows, and who is told.

    `done` is called by the event loop, with the reason where it did not come to pass. `growing` says that it may not
    eat the store's reserve.
    """

    rows: book.Rows
    done: Done
    upper: Upper | None = None
    growing: bool = False
    error: BaseException | None = None


@dataclass(slots=True)
class _Asked:
    work: Callable[[Database], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Batch:
    changes: list[Change] = field(default_factory=list)
    begun_s: float = 0.0


class Desk:
    """Writes and reads a store's book. Belongs to the event loop it is made on.

    `failed` is called, once for each batch that was not written, before those are told whose changes were in it.
    """

    def __init__(self, path: str, data_fd: int, reserve: Reserve, trees: Trees, failed: Callable[[], None]) -> None:
        """Open the book at `path`, with the store's reserve for a full disk. Raises: StoreError.

        Args:
            data_fd: the directory that `trees` are in, borrowed for as long as the process lives.
        """
        self._path = path
        self._reserve = reserve
        self._reserve_next = self._move_next = 0.0
        self._trees = trees
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._waiting = _Batch()
        self._writing: _Batch | None = None
        self._handing_over = False
        self._unmoved = 0
        self._low = False
        self._low_next = 0.0
        self._keeper_told = False
        self._to_writer: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        # None: leave; True: something was written; else a question.
        self._to_keeper: queue.SimpleQueue[_Asked | bool | None] = queue.SimpleQueue()
        self._syncing: asyncio.Future[None] | None = None
        self._next_sync: asyncio.Future[None] | None = None
        writing = Database(path, reserve=reserve, lazily=True)
        try:
            for statement in book.SETUP:
                writing.write(statement, (), growing=True)
            reading = Database(path)
        except BaseException:
            writing.close()
            raise
        self._threads = [
            threading.Thread(target=self._write_all, args=(writing,), name="book-writer", daemon=True),
            threading.Thread(target=self._keep, args=(reading,), name="book-keeper", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._committer = self._new_committer(data_fd)
        if self._committer is not None:
            self._loop.add_reader(self._committer.fileno(), self._committed)

    def submit(self, change: Change) -> None:
        """Write a change with what else is asked for in this turn of the event loop, or while another is written."""
        self._waiting.changes.append(change)
        if self._writing is not None:
            return
        if len(self._waiting.changes) >= _BEGIN_AT:
            self._hand_over()
        elif not self._handing_over:
            self._handing_over = True
            self._loop.call_soon(self._hand_over)

    async def write(self, rows: book.Rows, *, growing: bool = False) -> None:
        """Write a change and wait for it. Raises: StoreError."""
        future: asyncio.Future[None] = self._loop.create_future()
        self.submit(Change(rows, lambda error: _settle(future, None, error), growing=growing))
        await future

    async def numbers(self, count: int) -> range:
        """Numbers that no tree of this store has had or will have. Raises: StoreError."""
        return await self._ask(lambda database: database.next_numbers(count))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on one state of the book. Raises: what `work` raises; StoreError."""

        def reading(database: Database) -> T:
            with database.reading() as db:
                return work(db)

        return await self._ask(reading)

    async def settled(self) -> None:
        """What was submitted before this call has been written, or refused, when it returns. Raises: StoreError."""
        if self._waiting.changes or self._writing is not None:
            await self.write(book.Rows(), growing=True)

    async def durable(self) -> None:
        """Everything that was submitted before this call is on disk when it returns. Raises: StoreError.

        Many who wait share one fdatasync(2).
        """
        await self.settled()
        if self._next_sync is None:
            self._next_sync = asyncio.ensure_future(self._sync_after(self._syncing))
        await asyncio.shield(self._next_sync)

    def stuck_s(self) -> float:
        """For how long the disk has been at work on one commit."""
        return 0.0 if self._writing is None else time.monotonic() - self._writing.begun_s

    async def close(self) -> None:
        """Finish what was asked for and close the book; gives a wedged disk half a second."""
        self._hand_over()
        committer, self._committer = self._committer, None
        if committer is not None:
            self._loop.remove_reader(committer.fileno())
            await asyncio.to_thread(committer.close, 500)
        self._to_writer.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 0.5)
            self._to_keeper.put(None)

    async def _sync_after(self, before: asyncio.Future[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._syncing, self._next_sync = self._next_sync, None
        await self._ask(lambda database: database.sync())

    async def _ask(self, work: Callable[[Database], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._to_keeper.put(_Asked(work, future))
        return await future

    # The event loop's side of writing.

    def _hand_over(self) -> None:
        self._handing_over = False
        if self._writing is not None or not self._waiting.changes:
            return
        batch = self._waiting
        self._waiting = _Batch(batch.changes[_MOST_AT_ONCE:])
        del batch.changes[_MOST_AT_ONCE:]
        batch.begun_s = time.monotonic()
        self._writing = batch
        if not self._commit(batch):
            self._to_writer.put(batch)

    def _new_committer(self, data_fd: int) -> Committer | None:
        try:
            return Committer(self._path, data_fd, (*LAZILY, *book.SETUP), book.WRITE)
        except RuntimeError as error:
            log.info("commits take turns with calls at the interpreter", extra={"reason": str(error)})
            return None

    def _commit(self, batch: _Batch) -> bool:
        """Have the batch written without the interpreter, if nothing about it is unusual."""
        if self._committer is None:
            return False
        uppers = self._trees.entries([change.upper for change in batch.changes if change.upper is not None])
        if uppers is None:
            return False
        self._committer.submit(uppers, book.parameters(change.rows for change in batch.changes))
        return True

    def _committed(self) -> None:
        if self._committer is None:
            return
        done, why = self._committer.take()
        batch = self._writing
        if not done or batch is None:
            return
        if why is not None:
            # The writer finds out what is wrong with which change, and whose fault it is.
            self._to_writer.put(batch)
            return
        self._unmoved += len(batch.changes)
        if not self._keeper_told:
            self._keeper_told = True
            self._to_keeper.put(True)
        self._written(batch, None)

    def _written(self, batch: _Batch, error: BaseException | None) -> None:
        self._writing = None
        if error is not None:
            # What waits was allowed because of what has failed.
            batch.changes += self._waiting.changes
            self._waiting = _Batch()
            self._failed()
        self._hand_over()
        for change in batch.changes:
            change.done(change.error or error)

    # The threads.

    def _write_all(self, database: Database) -> None:
        while (batch := self._to_writer.get()) is not None:
            error: BaseException | None = None
            try:
                self._write(database, batch)
            except BaseException as caught:
                error = self._as_told(caught)
            try:
                self._loop.call_soon_threadsafe(self._written, batch, error)
            except RuntimeError:
                break  # the loop has ended and nobody waits
        database.close()

    def _write(self, database: Database, batch: _Batch) -> None:
        making = [change for change in batch.changes if change.upper is not None]
        if making:
            errors = self._trees.make([change.upper for change in making if change.upper is not None])
            for change, error in zip(making, errors, strict=True):
                change.error = error
        parameters = book.parameters(change.rows for change in batch.changes if change.error is None)
        if all(change.growing for change in batch.changes):
            database.write(book.WRITE, parameters, growing=True)
        else:
            self._write_smaller(database, parameters)
        self._unmoved += len(batch.changes)
        if self._unmoved > _WRITER_MOVES:
            self._move(database)
        if not self._keeper_told:
            self._keeper_told = True
            self._to_keeper.put(True)

    def _write_smaller(self, database: Database, parameters: tuple[str | None, ...]) -> None:
        """Write what may have the store's reserve. Whether it is needed is only looked at now and then."""
        now = time.monotonic()
        if now >= self._low_next:
            self._low_next = now + _LOW_EVERY_S
            self._low = self._reserve.is_low()
        if not self._low:
            try:
                database.write(book.WRITE, parameters, growing=True)
                return
            except StoreError:
                self._low = self._reserve.is_low()
                if not self._low:
                    raise
        self._move(database)  # the log is begun anew then, and takes no more room
        database.write(book.WRITE, parameters)

    def _move(self, database: Database) -> None:
        before = self._unmoved
        try:
            if database.checkpoint():
                self._unmoved -= before
        except StoreError as error:
            log.warning(error.line())

    def _keep(self, database: Database) -> None:
        unsynced_since: float | None = None
        while True:
            left_s = None if unsynced_since is None else unsynced_since + _SYNC_AFTER_S - time.monotonic()
            try:
                asked = self._to_keeper.get(timeout=left_s if left_s is None or left_s > 0 else 0.0)
            except queue.Empty:
                self._make_sure(database)
                unsynced_since = None
                continue
            if asked is None:
                break
            if asked is True:
                unsynced_since = unsynced_since or time.monotonic()
            elif isinstance(asked, _Asked) and not self._answer(database, asked):
                break
        database.close()

    def _answer(self, database: Database, asked: _Asked) -> bool:
        result: Any = None
        told: BaseException | None = None
        try:
            result = asked.work(database)
        except BaseException as error:
            told = self._as_told(error)
        try:
            self._loop.call_soon_threadsafe(_settle, asked.future, result, told)
        except RuntimeError:
            return False
        return True

    def _make_sure(self, database: Database) -> None:
        self._keeper_told = False
        try:
            database.sync()
            now = time.monotonic()
            if self._unmoved and now >= self._move_next:
                self._move_next = now + _MOVE_EVERY_S
                self._move(database)
            if now >= self._reserve_next:
                self._reserve_next = now + _RESERVE_EVERY_S
                self._reserve.keep()
        except FlatmountError as error:
            # Whoever needs it on disk asks, and is told; the others have been told that it was accepted.
            log.error(error.line())

    def _as_told(self, error: BaseException) -> FlatmountError:
        # SQLite says "disk I/O error" of a file system that has turned read-only, and statvfs(2) need not know of it.
        try:
            os.close(os.open(os.path.dirname(self._path), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except OSError as refusal:
            if refusal.errno == errno.EROFS:
                return StoreError(
                    f"{self._path}: its file system has become read-only; nothing was changed",
                    hint="see the kernel's log, check the file system, mount it read-write and restart the snapshotter",
                )
        return error if isinstance(error, FlatmountError) else StoreError(f"the store's book: {error}")


def _settle(future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
