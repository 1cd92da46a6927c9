"""The snapshot service itself, without its wire: what each request does to the book, the trees and the mounts.

Order is everything for a process that may be killed at any moment: directories before the book knows them, files synced
before they count as committed, the book before anything is taken away. What a kill leaves is unknown to the book, and
`start` takes it away.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from collections.abc import Mapping as Labels
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from flatmount.errors import FlatmountError, InUse, StoreError
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.snapshotter import book
from flatmount.snapshotter.desk import Desk
from flatmount.snapshotter.filters import parse_filters
from flatmount.snapshotter.flattening import Flattening
from flatmount.snapshotter.forms import (
    bind_answer,
    form_for,
    helper_answer,
    helper_plan,
    keeps_host_ids,
    lowers_of,
    plain_answer,
)
from flatmount.snapshotter.model import (
    GID_LABEL,
    REF_LABEL,
    UID_LABEL,
    Form,
    Info,
    InvalidRequest,
    Kind,
    Mount,
    Precondition,
    Snapshot,
    Usage,
)
from flatmount.snapshotter.ranges import Ranges
from flatmount.snapshotter.roots import Roots
from flatmount.snapshotter.trees import Trees
from flatmount.store.disk import Disk
from flatmount.store.reserve import Reserve

log = logging.getLogger("flatmount.snapshotter")
T = TypeVar("T")

# overlayfs takes 500 lowers and mount(2) 4,095 bytes of options, which it cuts without a word; containerd shortens what
# is longer than 3,584. A chain whose lowers are more than this gets a flat tree before containerd is answered.
MOST_LOWERS = 100
MOST_LOWER_BYTES = 3200
_WORKERS = 16

HELPER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernel", "flatmount-assemble")


class Snapshots:
    """The snapshots of one store. Belongs to the event loop it is started on; one process at a time.

    Every method may be cancelled at any point: what it began is finished, or taken away by `cleanup`.
    """

    def __init__(self, disk: Disk, run: str, facts: HostFacts, form: Form, *, flatten_after_s: float = 1.0) -> None:
        """Serve the store at `disk` (borrowed) with attach points below the run directory `run` (absolute).

        Args:
            form: what containers are answered with from now on; those that live keep theirs.
            flatten_after_s: how long a chain must be at rest before its flat tree is made.
        """
        self.form = form
        self._disk = disk
        self._run = run
        self._facts = facts
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="work")
        self._trees = Trees(disk)
        self.ranges = Ranges(disk.data, run)
        self.roots = Roots(disk.data, run, facts)
        self._plans = os.path.join(run, "plans")
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        # Chains by name, as they are in the book: of what was answered, and of the parents of that.
        self._known: dict[str, book.Chain] = {}
        # Numbers of copies that a commit is about to enter in the book.
        self._copies: set[int] = set()
        self._lock_fd = -1
        self.flattening = Flattening(self._flatten_now, flatten_after_s)
        self._sync: asyncio.Task[None] | None = None
        self._next_sync: asyncio.Task[None] | None = None

    # Life.

    async def start(self) -> None:
        """Take the store, and put right what a kill or a power cut left. Raises: StoreError, InUse."""
        self._lock_fd = os.open(
            "snapshotter.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._disk.base_fd
        )
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"another snapshotter serves the store at {self._disk.root}", hint="stop it, or name another --root"
            ) from None
        os.makedirs(self._plans, mode=0o700, exist_ok=True)
        self._desk = Desk(os.path.join(self._disk.base, "state.db"), Reserve(self._disk.base))
        snapshots = await self._desk.read(lambda db: [book.chain(db, s.info.name) for s in book.everything(db)])
        await self._in_pool(lambda: self._recover(snapshots))
        log.info("recovered", extra={"snapshots": len(snapshots), "ranges": self.ranges.attached})

    def _recover(self, chains: list[book.Chain]) -> None:
        numbers = {chain.snapshot.number for chain in chains}
        hidden = self._trees.hide_unknown(numbers, lambda number: False)
        if hidden:
            log.info("took away what no snapshot owns", extra={"trees": hidden})
        for chain in chains:
            try:
                if self._trees.repair(chain.snapshot, chain.parents[0] if chain.parents else None):
                    log.warning("made an empty upper again", extra={"key": chain.snapshot.info.name})
            except FlatmountError as error:
                log.error(error.line())
        committed = [chain.snapshot.number for chain in chains if chain.snapshot.info.kind is Kind.COMMITTED]
        self.flattening.flats = self._trees.flats(committed)
        snapshots = [chain.snapshot for chain in chains]
        self.ranges.recover({s.number: s.mapping for s in snapshots if s.mapping is not None and _uses_range(s)})
        for line in self.roots.recover(s.number for s in snapshots if _uses_root(s)):
            log.warning(line)
        for name in set(os.listdir(self._plans)) - {str(number) for number in numbers}:
            os.unlink(os.path.join(self._plans, name))

    async def close(self) -> None:
        """Let go of the store. No mount is undone, and running containers notice nothing.

        What still works on trees by then is left to the next start; the caller ends the process over it.
        """
        self._trees.stopping = True
        self.flattening.close()
        await self._desk.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.roots.close()
        os.close(self._lock_fd)

    # Requests.

    async def create(self, kind: Kind, key: str, parent: str, labels: Labels[str, str]) -> Mount:
        """Prepare (active) or View: a new snapshot on `parent`, and what to mount for it.

        On disk: snapshots/N/{fs,work}, and the book. Raises: SnapshotError by case, MappingError, StoreError.
        """
        if not key:
            raise InvalidRequest("a snapshot needs a key")
        mapping = mapping_of(labels)
        if mapping is not None and key.endswith("-remap"):
            raise book.remap_refused(key)
        info = Info(key, parent, kind, 0, 0, labels)
        form = form_for(info, self.form)
        host_ids = keeps_host_ids(info, mapping, form, idmapped_upper=self._facts.idmapped_upper)

        known = self._known.get(parent)

        def enter(db: sqlite3.Connection) -> book.Chain:
            (number,) = db.execute("UPDATE numbers SET last = last + 1 RETURNING last").fetchone()
            chain = book.create(db, Snapshot(number, info, mapping, form, host_ids, remapped=False), known)
            self._trees.make(chain.snapshot, chain.parents[0] if chain.parents else None)
            return chain

        async with self._locked(key):
            chain = await self._desk.write(enter, growing=True)
            self._known[key] = chain
            if chain.parents:
                if REF_LABEL in labels:
                    self.flattening.put_off(chain.parents[0])
                else:
                    self.flattening.begin(chain.parents)
                if known is None:
                    self._known[parent] = await self._desk.read(lambda db: book.chain(db, parent))
            return await self._answer(chain)

    def mounts_at_once(self, key: str) -> Mount | None:
        """What `mounts` would answer, where that takes no waiting for anything: no disk, no lock, no mount."""
        chain = self._known.get(key)
        if chain is None or key in self._locks or chain.snapshot.info.kind is Kind.COMMITTED:
            return None
        return self._answer_at_once(chain)

    async def mounts(self, key: str) -> Mount:
        """What to mount for an active snapshot or a view, as often as it is asked. Raises: Precondition for others."""
        async with self._locked(key):
            chain = await self._desk.read(lambda db: book.chain(db, key))
            if chain.snapshot.info.kind is Kind.COMMITTED:
                raise Precondition(f"snapshot {key!r} is neither active nor a view")
            self._known[key] = chain
            return await self._answer(chain)

    async def commit(self, name: str, key: str, parent: str, labels: Labels[str, str]) -> None:
        """Make an active snapshot a committed one that others can have as parent. Its files are on disk by then."""
        if not name:
            raise InvalidRequest("a committed snapshot needs a name")
        async with self._locked(key):
            active = await self._desk.read(lambda db: book.find(db, key))
            if active.info.kind is not Kind.ACTIVE:
                raise Precondition(f"snapshot {key!r} is not active")
            if active.unpacked:
                on = await self._desk.read(lambda db: book.find(db, parent).number if parent else None)
                await self._in_pool(lambda: self._trees.rebase(active, on))
            async with self._copy(active) as number:
                place = active.fs if number is None else f"snapshots/{number}/fs"
                usage = await self._in_pool(lambda: self._trees.measure(place))
                await self._synced()
                if active.number <= self._trees.lost:
                    raise StoreError(
                        f"snapshot {key!r}: its files may not have reached the disk, a write to which failed",
                        hint="remove it and pull again",
                    )
                made = await self._desk.write(
                    lambda db: book.commit(
                        db, key=key, name=name, parent=parent, labels=labels, usage=usage, number=number
                    ),
                    growing=True,
                )
            self._known.pop(key, None)
            await self._let_go(active)
            chain = await self._desk.read(lambda db: book.chain(db, made.info.name))
            if chain.parents:
                self.flattening.put_off(chain.parents[0])
            self.flattening.soon((made.number, *chain.parents))

    @asynccontextmanager
    async def _copy(self, active: Snapshot) -> AsyncIterator[int | None]:
        """The number of a copy of an upper of host ids in the container's, for the block to enter; None for others.

        A copy that the block does not enter is gone afterwards.
        """
        if not active.host_ids:
            yield None
            return

        def next_number(db: sqlite3.Connection) -> int:
            return int(db.execute("UPDATE numbers SET last = last + 1 RETURNING last").fetchone()[0])

        number = await self._desk.write(next_number)
        self._copies.add(number)
        copying = asyncio.ensure_future(self._in_pool(lambda: self._trees.copy_to_container_ids(active, number)))
        try:
            await asyncio.shield(copying)
            yield number
        except Exception:
            self._copies.discard(number)
            # Whatever this leaves the next cleanup takes away.
            with suppress(FlatmountError, OSError):
                await self._desk.write(self._hide_unknown)
                await self._in_pool(self._trees.empty_trash)
            raise
        finally:
            # A request that is cancelled leaves the copying behind, and nobody takes it away under its hands.
            copying.add_done_callback(lambda done: self._copies.discard(number))

    async def remove(self, key: str) -> None:
        """Forget a snapshot. Its mount goes now, its files in `cleanup`."""
        async with self._locked(key):
            gone = await self._desk.write(lambda db: book.remove(db, key))
            self._known.pop(key, None)
            self.flattening.forget(gone.number)
        await self._let_go(gone)

    async def stat(self, key: str) -> Info:
        """What is known of a snapshot."""
        return (await self._desk.read(lambda db: book.find(db, key))).info

    async def update(self, key: str, labels: Labels[str, str], paths: Sequence[str]) -> Info:
        """Change labels; `paths` as in a field mask."""
        return await self._desk.write(lambda db: book.update(db, key, labels, paths))

    async def list(self, filters: Sequence[str]) -> list[Info]:
        """Every snapshot that one of the filters wants."""
        wanted = parse_filters(filters)
        found = await self._desk.read(lambda db: [snapshot.info for snapshot in book.everything(db)])
        return [info for info in found if wanted(info)]

    async def usage(self, key: str) -> Usage:
        """What a snapshot takes: measured now for an active one, when it was committed for others."""
        snapshot = await self._desk.read(lambda db: book.find(db, key))
        if snapshot.info.kind is Kind.ACTIVE:
            return await self._in_pool(lambda: self._trees.measure(snapshot.fs))
        return await self._desk.read(lambda db: book.stored_usage(db, snapshot.number))

    async def cleanup(self) -> None:
        """Delete the files of snapshots that were removed, and try again what could not be taken off.

        Raises: StoreError, naming what could not be deleted; the rest is gone.
        """
        left = await self._in_pool(self.roots.retry)
        await self._desk.write(self._hide_unknown)
        left += await self._in_pool(self._trees.empty_trash)
        if left:
            raise StoreError(
                f"cleanup left {len(left)}: {'; '.join(left[:3])}",
                hint="unmount what uses them and clean up again",
            )

    def _hide_unknown(self, db: sqlite3.Connection) -> int:
        # In the writing thread: whoever makes directories does so there, and is in the book or not yet begun; those of
        # a commit's copy are made elsewhere, and known before that.
        known = {number for (number,) in db.execute("SELECT number FROM snapshots")} | self._copies
        return self._trees.hide_unknown(known, lambda n: n in self.flattening.running or self.roots.holds(n))

    async def counts(self) -> dict[str, int]:
        """Snapshots by kind."""
        rows = await self._desk.read(
            lambda db: db.execute("SELECT kind, count(*) FROM snapshots GROUP BY kind").fetchall()
        )
        found = {Kind(kind).name.lower(): int(count) for kind, count in rows}
        return {kind.name.lower(): found.get(kind.name.lower(), 0) for kind in Kind}

    # Within.

    def _answer_at_once(self, chain: book.Chain) -> Mount | None:
        snapshot, mapping, tree = chain.snapshot, chain.snapshot.mapping, self._disk.data
        if snapshot.form is not Form.OVERLAY:
            return None
        lowers = lowers_of(chain.parents, self.flattening.flats)
        if mapping is not None:
            attached = self.ranges.acquire_attached(snapshot.number, mapping)
            if attached is None:
                return None
            tree = attached
        if _too_long(tree, lowers):
            return None
        return plain_answer(snapshot, lowers, data=self._disk.data, tree=tree)

    async def _answer(self, chain: book.Chain) -> Mount:
        if (ready := self._answer_at_once(chain)) is not None:
            return ready
        snapshot = chain.snapshot
        data = self._disk.data
        mapping = snapshot.mapping
        tree = data
        if mapping is not None and snapshot.form is Form.OVERLAY:
            tree = await self._in_pool(lambda: self.ranges.acquire(snapshot.number, mapping))
        lowers = lowers_of(chain.parents, self.flattening.flats)
        if _too_long(tree, lowers):
            await self.flattening.now(chain.parents)
            lowers = lowers_of(chain.parents, self.flattening.flats)
        if snapshot.form is Form.BIND:
            return bind_answer(await self._in_pool(lambda: self.roots.ensure(snapshot, lowers)))
        if snapshot.form is Form.HELPER:
            plan = os.path.join(self._plans, str(snapshot.number))
            text = helper_plan(snapshot, lowers, data=data, detached=self._facts.detached_layers)
            await self._in_pool(lambda: _write(plan, text))
            return helper_answer(HELPER, plan)
        return plain_answer(snapshot, lowers, data=data, tree=tree)

    async def _let_go(self, gone: Snapshot) -> None:
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

        if gone.form is Form.OVERLAY and (
            gone.mapping is None or self.ranges.release_shared(gone.number, gone.mapping)
        ):
            return
        try:
            await self._in_pool(release)
        except FlatmountError as error:
            log.warning(error.line(), extra={"key": gone.info.name})

    async def _flatten_now(self, parents: Sequence[int]) -> None:
        """Make the flat tree of the chain whose nearest snapshot is `parents[0]`."""
        sources = lowers_of(parents, self.flattening.flats)
        await self._in_pool(lambda: self._trees.flatten(parents[0], sources))

    async def _synced(self) -> None:
        """Everything written before this call is on disk when it returns; many who wait share one syncfs."""
        if self._next_sync is None:
            self._next_sync = asyncio.create_task(self._sync_after(self._sync))
        await asyncio.shield(self._next_sync)

    async def _sync_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._sync, self._next_sync = self._next_sync, None
        await self._in_pool(self._trees.sync)

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[None]:
        """One request at a time for each key."""
        lock, waiting = self._locks.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._locks[key] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._locks[key]
            if waiting == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, waiting - 1)


def mapping_of(labels: Labels[str, str]) -> Mapping | None:
    """The user range that a snapshot is wanted for. Raises: MappingError; InvalidRequest for half of one."""
    uids, gids = labels.get(UID_LABEL), labels.get(GID_LABEL)
    if uids is None and gids is None:
        return None
    if not uids or not gids:
        raise InvalidRequest(f"a mapping needs both {UID_LABEL} and {GID_LABEL}")
    return Mapping.parse(uids, gids)


def _too_long(tree: str, lowers: Sequence[str]) -> bool:
    return len(lowers) > MOST_LOWERS or sum(len(tree) + len(lower) + 2 for lower in lowers) > MOST_LOWER_BYTES


def _uses_range(snapshot: Snapshot) -> bool:
    return snapshot.mapping is not None and snapshot.form is Form.OVERLAY


def _uses_root(snapshot: Snapshot) -> bool:
    return snapshot.info.kind is Kind.ACTIVE and snapshot.form is Form.BIND


def _write(path: str, text: str) -> None:
    """Whole or not at all: containerd may be reading the one before."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)
