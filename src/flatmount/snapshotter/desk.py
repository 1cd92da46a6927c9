"""The book's two threads: one that writes, one that reads.

What many ask for at once is one commit: each piece of work runs in a savepoint of its own, so that one that fails takes
nothing else along, and all wait for the same write to disk. The event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from flatmount.errors import FlatmountError, StoreError
from flatmount.store.database import Database

T = TypeVar("T")
_MOST_AT_ONCE = 256


@dataclass(slots=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Desk:
    """Runs work on a store's book. Belongs to the event loop it is made on."""

    def __init__(self, path: str) -> None:
        """Open the book at `path` twice. Raises: StoreError."""
        self._loop = asyncio.get_running_loop()
        self._queues: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue(), queue.SimpleQueue()]
        databases = [Database(path)]
        try:
            databases.append(Database(path))
        except BaseException:
            databases[0].close()
            raise
        self._threads = [
            threading.Thread(target=self._serve, args=arguments, name=name, daemon=True)
            for name, arguments in (
                ("book-writer", (databases[0], self._queues[0], databases[0].transaction)),
                ("book-reader", (databases[1], self._queues[1], databases[1].reading)),
            )
        ]
        for thread in self._threads:
            thread.start()

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in the writing thread; what it did is on disk when this returns, or undone when it raises.

        Work is not repeated: it may touch the disk as well, and cleans up what it raises after. Raises: what `work`
        raises; StoreError where the commit failed, whatever `work` said.
        """
        return await self._ask(0, work)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on one state of the book. Raises: what `work` raises; StoreError."""
        return await self._ask(1, work)

    async def close(self) -> None:
        """Finish what was asked for and close the book; gives a wedged disk half a second."""
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 0.5)

    async def _ask(self, which: int, work: Callable[[sqlite3.Connection], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._queues[which].put(_Job(work, future))
        return await future

    def _serve(
        self,
        database: Database,
        waiting: queue.SimpleQueue[_Job | None],
        begin: Callable[[], AbstractContextManager[sqlite3.Connection]],
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
                with begin() as db:
                    for one in batch:
                        _run(db, one)
            except BaseException as error:
                for one in batch:
                    one.error = one.error or _as_told(error)
            try:
                self._loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:
                break  # the loop has ended and nobody waits
            if last:
                break
        database.close()


def _as_told(error: BaseException) -> FlatmountError:
    return error if isinstance(error, FlatmountError) else StoreError(f"the store's book: {error}")


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
