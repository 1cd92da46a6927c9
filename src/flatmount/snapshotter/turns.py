"""Whose turn it is: one request at a time for a key, none on what the book has refused, one run for many who wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_Done = Callable[[Any], None]


class Turns:
    """The keys with a request under way, and whether what is in memory may be believed. Belongs to one event loop.

    `held` has for each such key who waits for it, first come first. Who finds `stale` False and a key that is not held
    may take it at once: `held[key] = deque()`, and `release` at the end. `stale` is set from a refusal until what the
    book says has been read, all of it after the last refusal.
    """

    def __init__(self, read: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`read` has the memory say what the book says, or raises."""
        self.held: dict[str, deque[asyncio.Future[None]]] = {}
        self.stale = False
        self._read = read
        self._refusals = 0
        self._reading: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def refuse(self) -> None:
        """The book does not have what the memory has, or may have what that has not."""
        self.stale = True
        self._refusals += 1

    async def not_stale(self) -> None:
        """Read what the book says where the memory is not to be believed. Raises: what the reading raises."""
        while self.stale:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read_again())
                self._reading.add_done_callback(_seen)
            await asyncio.shield(self._reading)

    async def _read_again(self) -> None:
        # Nothing is decided until the end: what was decided meanwhile would be known to the one and not to the other.
        refusals = self._refusals
        await self._read()
        self.stale = self._refusals != refusals

    async def take(self, key: str) -> None:
        """Hold `key` when everyone who came before has had it."""
        waiting = self.held.get(key)
        if waiting is None:
            self.held[key] = deque()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(key)
            raise

    def release(self, key: str) -> None:
        """Let the next one have `key`, where somebody waits."""
        waiting = self.held[key]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self.held[key]

    @asynccontextmanager
    async def locked(self, *keys: str) -> AsyncIterator[None]:
        """Hold all of `keys`, on a memory that is not stale. Raises: what reading it again raises."""
        taken: list[str] = []
        try:
            for key in sorted({*keys}):  # all in one order, or two would wait for each other
                await self.take(key)
                taken.append(key)
            await self.not_stale()
            yield
        finally:
            for key in taken:
                self.release(key)

    async def in_turn(self, key: str, begin: Callable[[_Done], bool], otherwise: Callable[[], Awaitable[None]]) -> Any:
        """Call `begin` when it is the turn of `key`, and wait for what it tells the function that it is given.

        `begin` takes the key itself, where it needs it for longer, and returns False where it cannot: the memory is
        stale, or it lacks what `otherwise` provides. Raises: what those raise, and what `begin` tells.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any) -> None:
            if future.done():
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        while True:
            await self.take(key)
            if self._begun(key, begin, done):
                return await future
            if self.stale:
                await self.not_stale()
            else:
                await otherwise()

    def _begun(self, key: str, begin: Callable[[_Done], bool], done: _Done) -> bool:
        waiting = self.held.pop(key)
        try:
            return begin(done)
        finally:
            goes_on = key in self.held
            self.held[key] = waiting
            if not goes_on:
                self.release(key)

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, and not half of it: a caller that is cancelled leaves it behind."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_seen)
        return await asyncio.shield(task)


class Shared:
    """Work that many wait for at once: who asks while it runs waits for the next run, which is one for all of them."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Wait for a run that began after this call. Raises: what it raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
            self._next.add_done_callback(_seen)
        await asyncio.shield(self._next)

    async def _after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        await self._work()


def _seen(task: asyncio.Task[Any]) -> None:
    """Whoever waits is told; where all of them have left, nobody needs to be."""
    if not task.cancelled():
        task.exception()
