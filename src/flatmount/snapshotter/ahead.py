"""Numbers of snapshots to come, and directories that are made for them ahead.

Making directories is what a burst of starts would wait for longest (kernel time, on ext4 some 100 us for the three of a
snapshot), so some are there already. They are made again when nobody has asked for one for a moment, and beside the
calls where these go on until few are left; always behind what is to be written.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable

from flatmount.errors import FlatmountError
from flatmount.snapshotter.trees import Trees

log = logging.getLogger("flatmount.snapshotter")

READY = 256  # snapshots whose directories are there, at most
_FEW = 128
_QUIET_S = 0.05
# Nothing is tried again so soon where it could not be done.
_AGAIN_S = 1.0
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
        make: Callable[[list[int]], bool],
        is_roomy: Callable[[], Awaitable[bool]],
    ) -> None:
        """`numbers` reserves as many in the book; `make` begins to make the directories of some, if anybody does.

        How far that has come `made` is told. Nothing is made on a disk that is not `is_roomy`.
        """
        self.last = 0
        self._trees = trees
        self._numbers = numbers
        self._make = make
        self._is_roomy = is_roomy
        self._blocks: deque[range] = deque()
        self._ready: deque[int] = deque()
        self._making: deque[int] = deque()
        self._more: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._filling: asyncio.Task[None] | None = None
        self._not_before_s = 0.0
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
        if ready and len(self._ready) < _FEW:
            self._fill_now()
        else:
            self._fill_soon()
        while ready and self._ready:
            number = self._ready.popleft()
            # After a failed write the older numbers are those of snapshots that may have lost something.
            if number > self._trees.lost:
                return number, True
        other = self._next()
        return None if other is None else (other, False)

    def made(self, count: int, error: int) -> None:
        """So many more are made, and the others will not be where there is an `error`, an errno."""
        for _ in range(count):
            self._ready.append(self._making.popleft())
        if error:
            # Whoever comes makes their own, and is told; what is there of these goes with a cleanup.
            log.warning("no directories are made ahead", extra={"reason": os.strerror(error)})
            self._making.clear()
            self._put_off()
        elif not self._making:
            self._fill_soon()

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

    def _fill_now(self) -> None:
        if self._filling is not None or self._making or self._closed:
            return
        if asyncio.get_running_loop().time() >= self._not_before_s:
            self._filling = asyncio.create_task(self._fill())

    def _put_off(self) -> None:
        self._not_before_s = asyncio.get_running_loop().time() + _AGAIN_S

    def _fill_soon(self) -> None:
        """When it has been quiet for a moment; every request puts it off."""
        if self._timer is None and len(self._ready) < READY and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_QUIET_S, self._quiet, len(self._ready), self.last)

    def _quiet(self, ready: int, last: int) -> None:
        self._timer = None
        if (len(self._ready), self.last) != (ready, last):
            self._fill_soon()
        elif len(self._ready) < READY:
            self._fill_now()

    async def _fill(self) -> None:
        try:
            if not await self._is_roomy():
                self._put_off()
                return
            wanted = range(READY - len(self._ready))
            numbers = [number for _ in wanted if (number := self._next()) is not None]
            if not numbers:
                await self.more()
                self._fill_soon()
                return
            # A write that fails from now on may be that of their directories.
            self._trees.note(numbers[-1])
            if self._make(numbers):
                self._making.extend(numbers)
            else:
                self._closed = True
        except FlatmountError as error:
            log.warning(error.line())
            self._put_off()
        finally:
            self._filling = None


def _told(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.warning("no numbers for snapshots to come", extra={"reason": str(task.exception())})
