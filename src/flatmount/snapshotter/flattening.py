"""When which chain gets its flat tree: in the background, one at a time for each, and the rest waits for none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from flatmount.errors import FlatmountError

log = logging.getLogger("flatmount.snapshotter")

_AT_ONCE = 2


class Flattening:
    """Which chains are flat, and the work on those that are to be. Belongs to one event loop.

    A chain is given as its snapshots' numbers, nearest first, and called by the first. `flats` are those whose tree is
    on disk, `running` those that are being made.
    """

    def __init__(self, make: Callable[[Sequence[int]], Awaitable[None]], after_s: float) -> None:
        """`make` makes one tree; a chain that was committed waits `after_s` for another layer on top of it."""
        self.flats: set[int] = set()
        self.running: dict[int, asyncio.Task[None]] = {}
        self.made = 0
        self.failed = 0
        self._make = make
        self._after_s = after_s
        self._waiting: dict[int, asyncio.TimerHandle] = {}
        self._limit = asyncio.Semaphore(_AT_ONCE)

    def soon(self, chain: Sequence[int]) -> None:
        """Make it when nothing was put on top of it for a while."""
        if len(chain) > 1 and chain[0] not in self.flats:
            loop = asyncio.get_running_loop()
            self._waiting[chain[0]] = loop.call_later(self._after_s, self.begin, tuple(chain))

    def put_off(self, number: int) -> None:
        """Another layer is coming on top of it: not this one, then."""
        timer = self._waiting.pop(number, None)
        if timer is not None:
            timer.cancel()

    def forget(self, number: int) -> None:
        """The snapshot is gone."""
        self.put_off(number)
        self.flats.discard(number)

    def begin(self, chain: Sequence[int]) -> None:
        """Make it in the background, unless it is there or being made; a single layer is flat as it is."""
        self.put_off(chain[0])
        if len(chain) > 1 and chain[0] not in self.flats and chain[0] not in self.running:
            self._start(tuple(chain))

    async def now(self, chain: Sequence[int]) -> None:
        """Make it and wait for it. Raises: what the making raises."""
        self.put_off(chain[0])
        if chain[0] not in self.flats:
            await asyncio.shield(self.running.get(chain[0]) or self._start(tuple(chain)))

    def close(self) -> None:
        """Start no more. What runs is finished, or taken away by the next start."""
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()
        for task in self.running.values():
            task.cancel()

    def _start(self, chain: tuple[int, ...]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(chain))
        self.running[chain[0]] = task
        task.add_done_callback(lambda done: self._done(chain[0], done))
        return task

    async def _run(self, chain: tuple[int, ...]) -> None:
        async with self._limit:
            await self._make(chain)
        self.flats.add(chain[0])
        self.made += 1
        log.info("flat tree made", extra={"snapshot": chain[0], "layers": len(chain)})

    def _done(self, number: int, task: asyncio.Task[None]) -> None:
        self.running.pop(number, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            # Containers start all the same, with every layer as a lower; the next start tries again.
            self.failed += 1
            line = error.line() if isinstance(error, FlatmountError) else repr(error)
            log.warning("no flat tree", extra={"snapshot": number, "reason": line})
