"""The book's two threads: one that writes, one that reads.

What many ask for at once is one commit: each piece of work runs in a savepoint of its own, so that one that fails takes
nothing else along, and all wait for the same write to disk. The event loop never waits for a disk. On a full disk the
store's reserve is given back for what makes the book smaller, and set aside again when there is room.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from flatmount.errors import FlatmountError, StoreError
from flatmount.store.database import Database
from flatmount.store.reserve import Reserve

T = TypeVar("T")
_MOST_AT_ONCE = 256
_RESERVE_EVERY_S = 5.0


@dataclass(slots=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    growing: bool = False
    result: Any = None
    error: BaseException | None = None


class Desk:
    """Runs work on a store's book. Belongs to the event loop it is made on."""

    def __init__(self, path: str, reserve: Reserve) -> None:
        """Open the book at `path` twice, with the store's reserve for a full disk. Raises: StoreError."""
        self._path = path
        self._reserve = reserve
        self._reserve_next = 0.0
        self._loop = asyncio.get_running_loop()
        self._queues: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue(), queue.SimpleQueue()]
        databases = [Database(path, reserve=reserve)]
        try:
            databases.append(Database(path))
        except BaseException:
            databases[0].close()
            raise
        self._threads = [
            threading.Thread(target=self._serve, args=arguments, name=name, daemon=True)
            for name, arguments in (
                ("book-writer", (databases[0], self._queues[0], lambda batch: self._writing(databases[0], batch))),
                ("book-reader", (databases[1], self._queues[1], lambda batch: databases[1].reading())),
            )
        ]
        for thread in self._threads:
            thread.start()

    async def write(self, work: Callable[[sqlite3.Connection], T], *, growing: bool = False) -> T:
        """Run `work` in the writing thread; what it did is on disk when this returns, or undone when it raises.

        What is `growing` gets nothing of the reserve, unless something that is not happens to share its commit.
        Work is not repeated: it may touch the disk as well, and cleans up what it raises after. Raises: what `work`
        raises; StoreError where the commit failed, whatever `work` said.
        """
        return await self._ask(0, work, growing)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on one state of the book. Raises: what `work` raises; StoreError."""
        return await self._ask(1, work)

    async def close(self) -> None:
        """Finish what was asked for and close the book; gives a wedged disk half a second."""
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 0.5)

    async def _ask(self, which: int, work: Callable[[sqlite3.Connection], T], growing: bool = False) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._queues[which].put(_Job(work, future, growing))
        return await future

    def _writing(self, database: Database, batch: Sequence[_Job]) -> AbstractContextManager[sqlite3.Connection]:
        if time.monotonic() >= self._reserve_next:
            self._reserve_next = time.monotonic() + _RESERVE_EVERY_S
            self._reserve.keep()
        return database.transaction(growing=all(job.growing for job in batch))

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

    def _serve(
        self,
        database: Database,
        waiting: queue.SimpleQueue[_Job | None],
        begin: Callable[[Sequence[_Job]], AbstractContextManager[sqlite3.Connection]],
    ) -> None:
        while (job := waiting.get()) is not None:
            batch = [job]
            last = False
            while len(batch) < _MOST_AT_ONCE and not last:
                try:
                    more = waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                else:
                    batch.append(more)
            try:
                with begin(batch) as db:
                    for one in batch:
                        _run(db, one)
            except BaseException as error:
                told = self._as_told(error)
                for one in batch:
                    one.error = one.error or told
            try:
                self._loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:
                break  # the loop has ended and nobody waits
            if last:
                break
        database.close()


def _run(db: sqlite3.Connection, job: _Job) -> None:
    db.execute("SAVEPOINT job")
    try:
        job.result = job.work(db)
    except sqlite3.OperationalError:
        raise
    except Exception as error:
        job.error = error
        db.execute("ROLLBACK TO job")
    db.execute("RELEASE job")


def _deliver(batch: list[_Job]) -> None:
    for job in batch:
        if job.future.done():
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.result)
