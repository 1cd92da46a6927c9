"""What a commit enters in the place of an upper that holds host ids: a copy of it in the container's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from flatmount.snapshotter.ahead import Ahead
from flatmount.snapshotter.model import Snapshot
from flatmount.snapshotter.trees import Trees


@dataclass(slots=True)
class Copy:
    """The number of the directory that a commit enters, and whether the book may have it."""

    number: int
    entered: bool = False


class Copies:
    """The copies of one store. Belongs to one event loop. `numbers` are those that a commit is about to enter."""

    def __init__(self, trees: Trees, ahead: Ahead, in_pool: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self.numbers: set[int] = set()
        self._trees = trees
        self._ahead = ahead
        self._in_pool = in_pool

    @asynccontextmanager
    async def of(self, active: Snapshot) -> AsyncIterator[Copy]:
        """A copy of an upper of host ids in the container's, for the block to enter; for others what they have.

        A copy that the block fails to begin to enter is gone afterwards. One that the book may have is left: where it
        has not, a cleanup takes it away.
        """
        if not active.host_ids:
            yield Copy(active.number)
            return
        while (taken := self._ahead.take(ready=False)) is None:
            await self._ahead.more()
        copy = Copy(taken[0])
        self.numbers.add(copy.number)
        try:
            await self._in_pool(lambda: self._trees.copy_to_container_ids(active, copy.number))
            yield copy
        except Exception:
            if not copy.entered:
                await self._in_pool(lambda: self._trees.discard(copy.number))
            raise
        finally:
            self.numbers.discard(copy.number)
