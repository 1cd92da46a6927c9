"""What containers are told to mount, and what stands for it on the host: attached ranges, roots, the helper's plans."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from flatmount.errors import FlatmountError
from flatmount.plan.facts import HostFacts
from flatmount.snapshotter.flattening import Flattening
from flatmount.snapshotter.forms import bind_answer, helper_answer, helper_plan, lowers_of, plain_answer
from flatmount.snapshotter.index import Entry
from flatmount.snapshotter.model import Form, Kind, Mount, Snapshot
from flatmount.snapshotter.ranges import Ranges, range_name
from flatmount.snapshotter.roots import Roots

log = logging.getLogger("flatmount.snapshotter")

# overlayfs takes 500 lowers and mount(2) 4,095 bytes of options, which it cuts without a word; containerd shortens what
# is longer than 3,584. A chain whose lowers are more than this gets a flat tree before containerd is answered.
MOST_LOWERS = 100
MOST_LOWER_BYTES = 3200


class Keeps(Protocol):
    """Whoever can answer `mounts` for us, and does for a key from `keep` to `forget`, which without keys is for all."""

    def keep(self, key: str, mount: Mount) -> None: ...

    def forget(self, *keys: str) -> None: ...


class Answers:
    """The answers for one store's snapshots. Belongs to the event loop; `ranges` and `roots` are any thread's."""

    def __init__(
        self,
        data: str,
        run: str,
        facts: HostFacts,
        helper: str,
        flattening: Flattening,
        in_pool: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        """Answer for the data directory `data`, with attach points below the run directory `run` (both absolute).

        `helper` is the path of the program that mounts for containerd in the form of that name.
        """
        self.ranges = Ranges(data, run)
        self.roots = Roots(data, run, facts)
        self._data = data
        self._facts = facts
        self._flattening = flattening
        self._in_pool = in_pool
        self._helper = helper
        self._plans = os.path.join(run, "plans")
        # Ranges whose tree is being attached, by name.
        self._attaching: dict[str, asyncio.Future[str]] = {}

    def recover(self, snapshots: Sequence[Snapshot]) -> None:
        """Find again what stands for these snapshots, and take off what stands for others."""
        os.makedirs(self._plans, mode=0o700, exist_ok=True)
        self.ranges.recover({s.number: s.mapping for s in snapshots if s.mapping is not None and _uses_range(s)})
        for line in self.roots.recover(s.number for s in snapshots if _uses_root(s)):
            log.warning(line)
        for name in set(os.listdir(self._plans)) - {str(snapshot.number) for snapshot in snapshots}:
            os.unlink(os.path.join(self._plans, name))

    def at_once(self, entry: Entry) -> Mount | None:
        """What to mount, where nothing has to be made for it first."""
        snapshot, mapping, tree = entry.snapshot, entry.snapshot.mapping, self._data
        if snapshot.form is not Form.OVERLAY:
            return None
        lowers = lowers_of(entry.parents, self._flattening.flats)
        if mapping is not None:
            attached = self.ranges.acquire_attached(snapshot.number, mapping)
            if attached is None:
                return None
            tree = attached
        known = entry.answer
        if known is not None and known[0] == tree and known[1] == lowers:
            return known[2]
        if _too_long(tree, lowers):
            return None
        answer = plain_answer(snapshot, lowers, data=self._data, tree=tree)
        entry.answer = (tree, lowers, answer)
        return answer

    async def make(self, entry: Entry) -> Mount:
        """What to mount, with what has to stand for it. Raises: what the mounting and the flattening raise."""
        snapshot, data, mapping = entry.snapshot, self._data, entry.snapshot.mapping
        tree = data
        if mapping is not None and snapshot.form is Form.OVERLAY:
            tree = await self._in_pool(lambda: self.ranges.acquire(snapshot.number, mapping))
        lowers = lowers_of(entry.parents, self._flattening.flats)
        if _too_long(tree, lowers):
            await self._flattening.now(entry.parents)
            lowers = lowers_of(entry.parents, self._flattening.flats)
        if snapshot.form is Form.BIND:
            return bind_answer(await self._in_pool(lambda: self.roots.ensure(snapshot, lowers)))
        if snapshot.form is Form.HELPER:
            plan = os.path.join(self._plans, str(snapshot.number))
            text = helper_plan(snapshot, lowers, data=data, detached=self._facts.detached_layers)
            await self._in_pool(lambda: _write(plan, text))
            return helper_answer(self._helper, plan)
        return plain_answer(snapshot, lowers, data=data, tree=tree)

    def attaching(self, entry: Entry) -> asyncio.Future[str] | None:
        """The attaching of the tree that `at_once` lacks for an entry, begun now if it was not.

        A burst of containers in one range has one of them attach it, and the others wait. None where it is not lacking.
        """
        snapshot, mapping = entry.snapshot, entry.snapshot.mapping
        if mapping is None or snapshot.form is not Form.OVERLAY:
            return None
        if self.ranges.acquire_attached(snapshot.number, mapping) is not None:
            return None
        name = range_name(mapping)
        attaching = self._attaching.get(name)
        if attaching is None:
            attaching = asyncio.ensure_future(self._in_pool(lambda: self.ranges.acquire(snapshot.number, mapping)))
            self._attaching[name] = attaching
            attaching.add_done_callback(lambda done: self._attaching.pop(name))
        return attaching

    def let_go_at_once(self, gone: Snapshot) -> bool:
        """Whether nothing stands for a snapshot that must be taken off, or others need it as well."""
        return gone.form is Form.OVERLAY and (
            gone.mapping is None or self.ranges.release_shared(gone.number, gone.mapping)
        )

    async def let_go(self, gone: Snapshot) -> None:
        """Take off what stood for a snapshot. What cannot go now is told and goes with a later cleanup."""

        def release() -> None:
            mapping = gone.mapping
            if mapping is not None and _uses_range(gone):
                self.ranges.release(gone.number, mapping)
            if gone.form is Form.BIND:
                self.roots.take_off(gone.number)
            if gone.form is Form.HELPER:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._plans, str(gone.number)))

        try:
            await self._in_pool(release)
        except FlatmountError as error:
            log.warning(error.line(), extra={"key": gone.info.name})


def _too_long(tree: str, lowers: Sequence[str]) -> bool:
    room = MOST_LOWER_BYTES - (len(tree) + 2) * len(lowers)
    return len(lowers) > MOST_LOWERS or sum(map(len, lowers)) > room


def _uses_range(snapshot: Snapshot) -> bool:
    return snapshot.mapping is not None and snapshot.form is Form.OVERLAY


def _uses_root(snapshot: Snapshot) -> bool:
    return snapshot.info.kind is Kind.ACTIVE and snapshot.form is Form.BIND


def _write(path: str, text: str) -> None:
    """Whole or not at all: containerd may be reading the one before."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)
