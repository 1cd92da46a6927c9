"""Numbers of snapshots to come, and directories that are made for them ahead.

Making directories is what a burst of starts would wait for longest (kernel time, on ext4 some 100 us for the three of a
snapshot), so a few are there already. They are made again when nobody has asked for one for a moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

from flatmount.errors import FlatmountError
from flatmount.snapshotter.trees import Trees

log = logging.getLogger("flatmount.snapshotter")

READY = 128  # such directories at most
_AT_ONCE = 16
_QUIET_S = 0.05
_BLOCK = 4096
_LOW = 1024


class Ahead:
    """What the next snapshots get. Belongs to one event loop.

    `last` is the highest number that anybody was given.
    """

    def __init__(
        self,
        trees: Trees,
        numbers: Callable[[int], Awaitable[range]],
        in_pool: Callable[[Callable[[], bool]], Awaitable[bool]],
        is_roomy: Callable[[], bool],
    ) -> None:
        """`numbers` reserves as many in the book; `in_pool` runs work on another thread.

        Nothing is made on a disk that is not `is_roomy`, which is asked there.
        """
        self.last = 0
        self._trees = trees
        self._numbers = numbers
        self._in_pool = in_pool
        self._is_roomy = is_roomy
        self._blocks: deque[range] = deque()
        self._ready: deque[int] = deque()
        self._making: set[int] = set()
        self._more: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._filling: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Reserve the first numbers. Raises: StoreError, on a full disk for one: they are asked for again then."""
        await self.more()
        self._fill_soon()

    def close(self) -> None:
        """Make no more. What is ready is taken away by the next start."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._filling is not None:
            self._filling.cancel()

    def held(self) -> set[int]:
        """The numbers whose directories are there, or are being made, for nobody yet."""
        return {*self._ready, *self._making}

    def take(self, *, ready: bool) -> tuple[int, bool] | None:
        """A number, and whether its directories are made, which only who can use those asks for.

        None where no number is left: wait for `more`.
        """
        self._fill_soon()
        while ready and self._ready:
            number = self._ready.popleft()
            # After a failed write the older numbers are those of snapshots that may have lost something.
            if number > self._trees.lost:
                return number, True
        other = self._next()
        return None if other is None else (other, False)

    async def more(self) -> None:
        """Reserve more numbers. Raises: StoreError."""
        if self._more is None or self._more.done():
            self._more = asyncio.create_task(self._reserve())
        await asyncio.shield(self._more)

    async def _reserve(self) -> None:
        self._blocks.append(await self._numbers(_BLOCK))

    def _next(self) -> int | None:
        while self._blocks:
            block = self._blocks[0]
            if not block or block[-1] <= self._trees.lost:
                self._blocks.popleft()
                continue
            number = max(block[0], self._trees.lost + 1)
            self._blocks[0] = range(number + 1, block[-1] + 1)
            self.last = max(self.last, number)
            if len(self._blocks) == 1 and len(block) < _LOW and (self._more is None or self._more.done()):
                self._more = asyncio.create_task(self._reserve())
                self._more.add_done_callback(_told)
            return number
        return None

    def _fill_soon(self) -> None:
        """When it has been quiet for a moment; every request puts it off."""
        if self._timer is None and self._filling is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_QUIET_S, self._quiet, len(self._ready), self.last)

    def _quiet(self, ready: int, last: int) -> None:
        self._timer = None
        if (len(self._ready), self.last) != (ready, last):
            self._fill_soon()
        elif len(self._ready) < READY:
            self._filling = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        again = True
        try:
            while len(self._ready) < READY and not self._closed:
                wanted = min(_AT_ONCE, READY - len(self._ready))
                numbers = [number for _ in range(wanted) if (number := self._next()) is not None]
                if not numbers:
                    await self.more()
                    continue
                self._making.update(numbers)
                before = len(self._ready)
                made = await self._in_pool(partial(self._make, numbers))
                self._making.difference_update(numbers)
                if not made:
                    again = False
                    break
                self._ready.extend(numbers)
                if len(self._ready) < before + len(numbers):
                    break  # somebody wants them: not now
            else:
                again = False
        except FlatmountError as error:
            # Whoever comes makes their own, and is told; what is there of these goes with a cleanup.
            log.warning(error.line())
            self._making.clear()
            again = False
        finally:
            self._filling = None
        if again and not self._closed:
            self._fill_soon()

    def _make(self, numbers: list[int]) -> bool:
        if not self._is_roomy():
            return False
        self._trees.make_ahead(numbers)
        return True


def _told(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.warning("no numbers for snapshots to come", extra={"reason": str(task.exception())})
