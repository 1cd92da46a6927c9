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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flatmount.errors import FlatmountError, StoreError
from flatmount.snapshotter import book
from flatmount.snapshotter._front import Committer
from flatmount.snapshotter.trees import Trees, Upper
from flatmount.snapshotter.turns import Shared
from flatmount.store.database import LAZILY, Database, refused_room
from flatmount.store.reserve import Reserve

log = logging.getLogger("flatmount.snapshotter")
T = TypeVar("T")
Done = Callable[[BaseException | None], None]

_MOST_AT_ONCE = 512
# So many are enough to begin with, while the event loop still takes in the others.
_BEGIN_AT = 48
# The changes of a batch that failed are tried one by one, for so long.
_TRY_FOR_S = 1.0
_RESERVE_EVERY_S = 5.0
_LOW_EVERY_S = 0.1
_SYNC_AFTER_S = 0.5
_SYNC_AGAIN_S = 5.0
# The log is moved into the book by the keeper, so often. While changes never stop that does not get to its end, and the
# writer does it when the log has become so long.
_MOVE_EVERY_S = 1.0
_LONG_BYTES = 32 << 20
_CLOSE_S = 0.5


@dataclass(slots=True)
class Change:
    """What one request changes: directories that are made first, rows, and who is told.

    `done` is called by the event loop, with the reason where it did not come to pass. What is not `growing` may have
    the store's reserve on a full disk; in a batch with others it has it when the batch was refused.
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
    refused: bool = False


class Desk:
    """Writes and reads a store's book. Belongs to the event loop it is made on.

    `failed` is called, once for each batch of which rows were not written, before those are told whose changes were in
    it. What is written behind such a batch was allowed because of it: the book's own rules refuse what cannot be then.
    """

    def __init__(
        self,
        path: str,
        data_fd: int,
        reserve: Reserve,
        trees: Trees,
        failed: Callable[[], None],
        made: Callable[[int, int], None],
    ) -> None:
        """Open the book at `path`, with the store's reserve for a full disk. Raises: StoreError.

        Args:
            data_fd: the directory that `trees` are in, borrowed for as long as the process lives.
            made: is told how many more of what `make_ahead` was given there are, and the errno that ended it, or 0.
        """
        self._path = path
        self._reserve = reserve
        self._reserve_next = 0.0
        self._move_next = time.monotonic() + _MOVE_EVERY_S
        self._reserve_lacks = True
        self._trees = trees
        self._failed = failed
        self._made = made
        self._loop = asyncio.get_running_loop()
        self._waiting = _Batch()
        self._writing: _Batch | None = None
        self._handing_over = False
        self._log_is_long = False
        self._low = False
        self._low_next = 0.0
        self._keeper_told = False
        self._to_writer: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        # None: leave; True: something was written; else a question.
        self._to_keeper: queue.SimpleQueue[_Asked | bool | None] = queue.SimpleQueue()
        self._synced = Shared(lambda: self._ask(lambda database: database.sync()))
        writing = Database(path, reserve=reserve, lazily=True)
        try:
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
        # A newer store is read only: the writer is the one that tells so.
        self._committer = None if writing.newer else self._new_committer(data_fd)
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

    def make_ahead(self, numbers: list[int]) -> bool:
        """Make the directories of active snapshots to come while nothing is to be written. False: they will not be."""
        if self._committer is None:
            return False
        self._committer.ahead(numbers)
        return True

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
        await self._synced.run()

    def stuck_s(self) -> float:
        """For how long the disk has been at work on one commit."""
        return 0.0 if self._writing is None else time.monotonic() - self._writing.begun_s

    async def close(self) -> None:
        """Write what was asked for, make sure of it and close the book; gives a wedged disk half a second."""
        until = time.monotonic() + _CLOSE_S
        committer = self._committer
        while committer is not None and self._writing is not None and time.monotonic() < until:
            await asyncio.sleep(_CLOSE_S / 100)  # it may be the committer's, and is told of here
        self._committer = None
        if committer is not None:
            self._loop.remove_reader(committer.fileno())
        while self._waiting.changes:
            self._give()
        self._to_writer.put(None)

        def left_s() -> float:
            return max(0.0, until - time.monotonic())

        def leave() -> None:
            writer, keeper = self._threads
            if committer is not None:
                committer.close(int(left_s() * 1000))
            writer.join(left_s())
            self._to_keeper.put(None)
            keeper.join(left_s())

        await asyncio.to_thread(leave)

    async def _ask(self, work: Callable[[Database], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._to_keeper.put(_Asked(work, future))
        return await future

    # The event loop's side of writing.

    def _hand_over(self) -> None:
        self._handing_over = False
        if self._writing is None and self._waiting.changes:
            self._give()

    def _give(self) -> None:
        batch = self._waiting
        self._waiting = _Batch(batch.changes[_MOST_AT_ONCE:])
        del batch.changes[_MOST_AT_ONCE:]
        batch.begun_s = time.monotonic()
        self._writing = batch
        if not self._commit(batch):
            self._to_writer.put(batch)

    def _new_committer(self, data_fd: int) -> Committer | None:
        try:
            return Committer(self._path, data_fd, LAZILY, book.WRITE)
        except RuntimeError as error:
            log.info("commits take turns with calls at the interpreter", extra={"reason": str(error)})
            return None

    def _commit(self, batch: _Batch) -> bool:
        """Have the batch written without the interpreter, if nothing about it is unusual."""
        if self._committer is None or self._log_is_long:
            return False
        try:
            uppers = self._trees.entries([change.upper for change in batch.changes if change.upper is not None])
            if uppers is None:
                return False
            self._committer.submit(uppers, book.rows_of(change.rows for change in batch.changes))
        except Exception:
            return False  # the writer finds out whose fault it is
        return True

    def _committed(self) -> None:
        if self._committer is None:
            return
        done, why, ahead, ahead_error = self._committer.take()
        if ahead or ahead_error:
            self._made(ahead, ahead_error)
        batch = self._writing
        if not done or batch is None:
            return
        if why is not None:
            # The writer finds out what is wrong with which change, and whose fault it is.
            self._to_writer.put(batch)
            return
        self._tell_keeper()
        self._written(batch)

    def _written(self, batch: _Batch) -> None:
        self._writing = None
        if batch.refused:
            self._failed()
        self._hand_over()
        for change in batch.changes:
            try:
                change.done(change.error)
            except Exception:
                log.exception("who asked for a change cannot be told of it")

    # The threads.

    def _write_all(self, database: Database) -> None:
        while (batch := self._to_writer.get()) is not None:
            self._make([change for change in batch.changes if change.upper is not None])
            batch.refused = not self._write(database, [change for change in batch.changes if change.error is None])
            self._tell_keeper()
            if self._log_is_long:
                self._log_is_long = False
                self._move(database)  # before anything else is written
            try:
                self._loop.call_soon_threadsafe(self._written, batch)
            except RuntimeError:
                break  # the loop has ended and nobody waits
        database.close()

    def _tell_keeper(self) -> None:
        if not self._keeper_told:
            self._keeper_told = True
            self._to_keeper.put(True)

    def _make(self, changes: list[Change]) -> None:
        if not changes:
            return
        try:
            errors = self._trees.make([change.upper for change in changes if change.upper is not None])
        except Exception as error:
            errors = [self._as_told(error)] * len(changes)
        for change, told in zip(changes, errors, strict=True):
            change.error = told

    def _write(self, database: Database, changes: list[Change]) -> bool:
        """Write all of them, or each that can be, in order; whether that was all. The others have their error."""
        begun_s = time.monotonic()
        try:
            rows = book.rows_of(change.rows for change in changes)
            if all(change.growing for change in changes):
                database.write(book.WRITE, rows, growing=True)
            else:
                self._write_smaller(database, rows)
        except Exception as error:
            if len(changes) > 1:
                return self._write_each(database, changes, begun_s + _TRY_FOR_S, error)
            changes[0].error = self._as_told(error)
            return False
        return True

    def _write_each(self, database: Database, changes: list[Change], until_s: float, error: Exception) -> bool:
        """One by one, so that what one asks for fails nobody else: but not for long on a disk that does not answer."""
        told = self._as_told(error)
        written = True
        for change in changes:
            if time.monotonic() < until_s:
                written &= self._write(database, [change])
            else:
                change.error, written = told, False
        return written

    def _write_smaller(self, database: Database, rows: Sequence[Sequence[book.Row]]) -> None:
        """Write what may have the store's reserve. Whether it is needed is only looked at now and then."""
        now = time.monotonic()
        if now >= self._low_next:
            self._low_next = now + _LOW_EVERY_S
            self._low = self._reserve.is_low()
        if not self._low:
            try:
                database.write(book.WRITE, rows, growing=True)
                return
            except StoreError as error:
                if not refused_room(error):
                    raise
        database.release_reserve()
        self._reserve_lacks = True
        self._move(database)  # the log is begun anew then, and takes no more room
        database.write(book.WRITE, rows)

    def _move(self, database: Database) -> bool:
        try:
            return database.checkpoint()
        except StoreError as error:
            log.warning(error.line())
            return False

    def _keep(self, database: Database) -> None:
        # What a process wrote that was killed has been told to be there as well.
        sync_at = self._make_sure(database)
        while True:
            now = time.monotonic()
            if sync_at is not None and now >= sync_at:
                sync_at = self._make_sure(database)
                continue
            keep_at = self._reserve_next if self._reserve_lacks else None
            if keep_at is not None and now >= keep_at:
                self._keep_reserve(now)
                continue
            next_at = min((at for at in (sync_at, keep_at) if at is not None), default=None)
            try:
                asked = self._to_keeper.get(timeout=None if next_at is None else next_at - now)
            except queue.Empty:
                continue
            if asked is None:
                break
            if asked is True:
                soon = time.monotonic() + _SYNC_AFTER_S
                sync_at = soon if sync_at is None else min(sync_at, soon)
            elif isinstance(asked, _Asked) and not self._answer(database, asked):
                break
        if sync_at is not None:
            self._make_sure(database)
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

    def _make_sure(self, database: Database) -> float | None:
        """Have on disk what was written until now; when to try again, where that failed or more is to be done."""
        self._keeper_told = False
        now = time.monotonic()
        again_at: float | None = None
        try:
            if now < self._move_next:
                database.sync()
                again_at = self._move_next
            else:
                self._move_next = now + _MOVE_EVERY_S
                # What has been moved is on disk in the book itself.
                if not self._move(database):
                    database.sync()
        except FlatmountError as error:
            # Whoever needs it on disk asks, and is told; the others have been told that it was accepted.
            log.error(error.line())
            return now + _SYNC_AGAIN_S
        self._log_is_long = database.log_bytes() > _LONG_BYTES
        if now >= self._reserve_next:
            self._keep_reserve(now)
        return again_at

    def _keep_reserve(self, now: float) -> None:
        self._reserve_next = now + _RESERVE_EVERY_S
        self._reserve_lacks = False  # the writer may give it up this moment
        if not self._reserve.keep():
            self._reserve_lacks = True

    def _as_told(self, error: BaseException) -> FlatmountError:
        # SQLite says "disk I/O error" of a file system that has turned read-only, and statvfs(2) need not know of it.
        try:
            os.close(os.open(os.path.dirname(self._path), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except OSError as refusal:
            if refusal.errno == errno.EROFS:
                return StoreError(
                    f"{self._path}: its file system has become read-only",
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
