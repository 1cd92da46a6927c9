"""The snapshot service itself, without its wire: what each request does to the index, the book, the trees, the mounts.

Order is everything for a process that may be killed at any moment: directories before the book knows them, files synced
before they count as committed, the book before anything is taken away. What a kill leaves is unknown to the book, and
`start` takes it away.

The calls of a burst are decided in memory, one after the other, and written to the book together. An active snapshot is
answered when the book has it, which a kill does not undo; against a loss of power it is as durable as what a container
writes into it, that is, a moment later. A commit is answered when all of it is on disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from collections.abc import Mapping as Labels
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from flatmount.errors import FlatmountError, InUse, StoreError
from flatmount.plan.facts import HostFacts
from flatmount.snapshotter import book
from flatmount.snapshotter.ahead import Ahead
from flatmount.snapshotter.answers import Answers, Keeps
from flatmount.snapshotter.copies import Copies, Copy
from flatmount.snapshotter.desk import Change, Desk
from flatmount.snapshotter.filters import parse_filters
from flatmount.snapshotter.flattening import Flattening
from flatmount.snapshotter.forms import form_for, keeps_host_ids, lowers_of, mapping_of
from flatmount.snapshotter.index import Entry, Index, check_name, remap_refused, without_empty
from flatmount.snapshotter.model import (
    REF_LABEL,
    Form,
    Info,
    InvalidRequest,
    Kind,
    Mount,
    Precondition,
    Snapshot,
    Usage,
)
from flatmount.snapshotter.trees import Trees, Upper
from flatmount.snapshotter.turns import Shared, Turns
from flatmount.store.disk import Disk
from flatmount.store.reserve import Reserve

log = logging.getLogger("flatmount.snapshotter")
T = TypeVar("T")
Done = Callable[[Any], None]

_WORKERS = 16
# A disk that has been at work on one commit for so long does not answer.
_STUCK_S = 5.0

HELPER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernel", "flatmount-assemble")


class Snapshots:
    """The snapshots of one store. Belongs to the event loop it is started on; one process at a time.

    Every method may be cancelled at any point: what it began is finished, or taken away by `cleanup`. Those that end in
    `_soon` never wait: they tell `done` the result or the error, now or later, or return False where the request has to
    wait for its turn, which the method of the same name without that does.
    """

    def __init__(self, disk: Disk, run: str, facts: HostFacts, form: Form, *, flatten_after_s: float = 1.0) -> None:
        """Serve the store at `disk` (borrowed) with attach points below the run directory `run` (absolute).

        Args:
            form: what containers are answered with from now on; those that live keep theirs.
            flatten_after_s: how long a chain must be at rest before its flat tree is made.
        """
        self.form = form
        self._disk = disk
        self._facts = facts
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="work")
        self._trees = Trees(disk)
        self._index = Index()
        self._turns = Turns(self._read_again)
        self._held = self._turns.held
        self._tasks: set[asyncio.Task[None]] = set()
        # Numbers of removed snapshots that the book still has, and may keep.
        self._going: set[int] = set()
        self._lock_fd = -1
        self.flattening = Flattening(self._flatten_now, flatten_after_s)
        self._answers = Answers(disk.data, run, facts, HELPER, self.flattening, self._in_pool)
        self.ranges, self.roots = self._answers.ranges, self._answers.roots
        self._keeps: Keeps | None = None
        self._synced = Shared(lambda: self._in_pool(self._trees.sync))

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
        path, self._reserve = os.path.join(self._disk.base, "state.db"), Reserve(self._disk.base)
        self._desk = Desk(path, self._disk.data_fd, self._reserve, self._trees, self._refuse, self._made_ahead)
        self._ahead = Ahead(self._trees, self._desk.numbers, self._desk.make_ahead, self._roomy)
        self._copies = Copies(self._trees, self._ahead, self._in_pool)
        await self._read_again()
        entries = list(self._index)
        await self._in_pool(lambda: self._recover(entries))
        self._ahead.last = self._trees.highest
        try:
            await self._ahead.start()
        except StoreError as error:
            log.warning(error.line())
        log.info("recovered", extra={"snapshots": len(entries), "ranges": self.ranges.attached})

    def _recover(self, entries: list[Entry]) -> None:
        numbers = {entry.snapshot.number for entry in entries}
        self._trees.highest = max(numbers, default=0)
        hidden = self._trees.hide_unknown(numbers, sys.maxsize, lambda number: False)
        if hidden:
            log.info("took away what no snapshot owns", extra={"trees": hidden})
        for entry in entries:
            try:
                if self._trees.repair(entry.snapshot, entry.parent_number):
                    log.warning("made an empty upper again", extra={"key": entry.snapshot.info.name})
            except FlatmountError as error:
                log.error(error.line())
        snapshots = [entry.snapshot for entry in entries]
        self.flattening.flats = self._trees.flats(s.number for s in snapshots if s.info.kind is Kind.COMMITTED)
        self._answers.recover(snapshots)

    async def close(self) -> None:
        """Let go of the store. No mount is undone, and running containers notice nothing.

        What still works on trees by then is left to the next start; the caller ends the process over it.
        """
        self._trees.stopping = True
        self.flattening.close()
        self._ahead.close()
        await self._desk.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.roots.close()
        os.close(self._lock_fd)

    def keep_answers(self, keeps: Keeps | None) -> None:
        """Have somebody answer `mounts` where nothing has to be done for it, and whoever did before no more."""
        self._forget()
        self._keeps = keeps

    # Requests.

    def create_soon(self, kind: Kind, key: str, parent: str, labels: Labels[str, str], done: Done) -> bool:
        """Prepare (active) or View: a new snapshot on `parent`; `done` gets what to mount for it.

        On disk: snapshots/N/{fs,work}, and the book. Raises, before anything is done: SnapshotError by case,
        MappingError. To `done`: StoreError, and what the mounting raises.
        """
        check_name(key)
        labels = without_empty(labels)
        mapping = mapping_of(labels)
        if mapping is not None and key.endswith("-remap"):
            raise remap_refused(key)
        if self._turns.stale or key in self._held:
            return False
        now = time.time_ns()
        info = Info(key, parent, kind, now, now, labels)
        on = self._index.check(info, mapping)
        own_number = self._ahead.take(ready=kind is Kind.ACTIVE and (on is not None or REF_LABEL not in labels))
        if own_number is None:
            return False
        number, made = own_number
        form = form_for(info, self.form)
        host_ids = keeps_host_ids(info, mapping, form, idmapped_upper=self._facts.idmapped_upper)
        index = self._index
        entry = index.enter(Snapshot(number, info, mapping, form, host_ids, remapped=False), on)
        self._held[key] = deque()

        def entered(error: BaseException | None) -> None:
            if self._index is not index:
                self._refuse()  # it may have been read before this was written
            if error is not None:
                if self._stands(index):
                    index.remove(key)
                self._turns.release(key)
                done(error)
                return
            if on is not None:
                if REF_LABEL in labels:
                    self.flattening.put_off(on.snapshot.number)
                else:
                    self.flattening.begin(on.chain)
            self._answer_soon(entry, done)

        rows = book.Rows(insert=book.row_of(entry.snapshot, entry.parent_number, entry.usage))
        upper = Upper.of(entry.snapshot, entry.parent_number, made=made)
        self._desk.submit(Change(rows, entered, upper, growing=True))
        return True

    async def create(self, kind: Kind, key: str, parent: str, labels: Labels[str, str]) -> Mount:
        """As `create_soon`, when its turn has come. Raises all of it."""
        mount: Mount = await self._in_turn(key, lambda done: self.create_soon(kind, key, parent, labels, done))
        return mount

    def mounts_soon(self, key: str, done: Done) -> bool:
        """What to mount for an active snapshot or a view, as often as it is asked. Raises: Precondition for others."""
        if self._turns.stale or key in self._held:
            return False
        entry = self._index.find(key)
        if entry.snapshot.info.kind is Kind.COMMITTED:
            raise Precondition(f"snapshot {key!r} is neither active nor a view")
        ready = self._answers.at_once(entry)
        if ready is not None:
            self._keep(key, ready)
            done(ready)
        else:
            self._held[key] = deque()
            self._answer_soon(entry, done)
        return True

    async def mounts(self, key: str) -> Mount:
        """As `mounts_soon`, when its turn has come. Raises all of it."""
        mount: Mount = await self._in_turn(key, lambda done: self.mounts_soon(key, done))
        return mount

    def remove_soon(self, key: str, done: Done) -> bool:
        """Forget a snapshot. Its mount goes now, its files in `cleanup`. `done` gets None.

        Raises: SnapshotNotFound; Precondition, while another one stands on it. To `done`: StoreError.
        """
        if self._turns.stale or key in self._held:
            return False
        gone = self._index.remove(key).snapshot
        self._forget(key)
        self._going.add(gone.number)
        self._held[key] = deque()

        def removed(error: BaseException | None) -> None:
            self._going.discard(gone.number)
            self._turns.release(key)
            if error is not None:
                done(error)
                return
            self.flattening.forget(gone.number)
            if self._answers.let_go_at_once(gone):
                done(None)
            else:
                self._start(let_go())

        async def let_go() -> None:
            try:
                await self._answers.let_go(gone)
            finally:
                done(None)

        self._desk.submit(Change(book.Rows(delete=gone.number), removed))
        return True

    async def remove(self, key: str) -> None:
        """As `remove_soon`, when its turn has come. Raises all of it."""
        await self._in_turn(key, lambda done: self.remove_soon(key, done))

    async def commit(self, name: str, key: str, parent: str, labels: Labels[str, str]) -> None:
        """Make an active snapshot a committed one that others can have as parent. All of it is on disk by then."""
        if not name:
            raise InvalidRequest("a committed snapshot needs a name")
        check_name(name)
        await self._turns.to_its_end(self._commit(name, key, parent, labels))

    async def _commit(self, name: str, key: str, parent: str, labels: Labels[str, str]) -> None:
        async with self._turns.locked(key, name):
            self._forget(key)
            active = self._index.find(key).snapshot
            on = self._index.check_commit(key, name, parent)
            if active.unpacked:
                number_on = None if on is None else on.snapshot.number
                await self._in_pool(lambda: self._trees.rebase(active, number_on))
            async with self._copies.of(active) as copy:
                usage = await self._in_pool(lambda: self._trees.measure(f"snapshots/{copy.number}/fs"))
                await self._synced.run()
                if active.number <= self._trees.lost:
                    raise StoreError(
                        f"snapshot {key!r}: its files may not have reached the disk, a write to which failed",
                        hint="remove it and pull again",
                    )
                made = await self._enter_commit(active, name, parent, labels, usage, copy)
            await self._let_go(active)
            chain = made.chain
            if len(chain) > 1:
                self.flattening.put_off(chain[1])
            self.flattening.soon(chain)

    async def _enter_commit(
        self, active: Snapshot, name: str, parent: str, labels: Labels[str, str], usage: Usage, copy: Copy
    ) -> Entry:
        key = active.info.name
        await self._turns.not_stale()
        index = self._index
        with index.committing(key, name, parent, labels, usage, copy.number) as made:
            rows = book.Rows(delete=active.number, insert=book.row_of(made.snapshot, made.parent_number, usage))
            copy.entered = True
            try:
                await self._desk.write(rows, growing=True)
                # Nobody stands on it before it is there for good.
                await self._desk.durable()
            except BaseException as error:
                self._refuse()  # the book may have it
                if isinstance(error, StoreError):
                    self._start(self._let_go_if_gone(active))
                raise
            if self._stands(index):
                index.commit(key, made)
            else:
                self._refuse()  # it may have been read before this was written
            return made

    async def stat(self, key: str) -> Info:
        """What is known of a snapshot."""
        await self._turns.not_stale()
        return self._index.find(key).snapshot.info

    async def update(self, key: str, labels: Labels[str, str], paths: Sequence[str]) -> Info:
        """Change labels; `paths` as in a field mask."""
        async with self._turns.locked(key):
            entry = self._index.update(key, labels, paths)
            await self._desk.write(book.Rows(update=book.labels_row(entry.snapshot)))
            return entry.snapshot.info

    async def list(self, filters: Sequence[str]) -> list[Info]:
        """Every snapshot that one of the filters wants."""
        wanted = parse_filters(filters)
        await self._turns.not_stale()
        return [entry.snapshot.info for entry in self._index if wanted(entry.snapshot.info)]

    async def usage(self, key: str) -> Usage:
        """What a snapshot takes: measured now for an active one, when it was committed for others."""
        await self._turns.not_stale()
        entry = self._index.find(key)
        if entry.snapshot.info.kind is Kind.ACTIVE:
            return await self._in_pool(lambda: self._trees.measure(entry.snapshot.fs))
        return entry.usage

    async def cleanup(self) -> None:
        """Delete the files of snapshots that were removed, and try again what could not be taken off.

        Raises: StoreError, naming what could not be deleted; the rest is gone.
        """
        left = await self._in_pool(self.roots.retry)
        await self._turns.not_stale()
        # Whoever is given a number after this has a higher one; what was removed until now is out of the book for good
        # before its files go.
        known, last = self._index.numbers() | self._ahead.held() | self._copies.numbers | self._going, self._ahead.last
        await self._desk.durable()
        await self._in_pool(
            lambda: self._trees.hide_unknown(known, last, lambda n: n in self.flattening.running or self.roots.holds(n))
        )
        left += await self._in_pool(self._trees.empty_trash)
        if left:
            raise StoreError(
                f"cleanup left {len(left)}: {'; '.join(left[:3])}",
                hint="unmount what uses them and clean up again",
            )

    def counts(self) -> dict[str, int]:
        """Snapshots by kind."""
        found = Counter(entry.snapshot.info.kind for entry in self._index)
        return {kind.name.lower(): found[kind] for kind in Kind}

    async def check(self) -> None:
        """Whether the store's disk answers. Raises: StoreError, where it says that it does not; may wait for ever."""
        await self._turns.not_stale()
        await self._desk.read(lambda db: db.execute("SELECT last FROM numbers").fetchone())
        if self._desk.stuck_s() > _STUCK_S:
            raise StoreError(f"{self._disk.root}: a commit has taken {self._desk.stuck_s():.0f} s")

    # Within.

    async def _in_turn(self, key: str, begin: Callable[[Done], bool]) -> Any:
        return await self._turns.in_turn(key, begin, self._ahead.more)

    def _refuse(self) -> None:
        self._turns.refuse()
        self._forget()

    def _keep(self, key: str, mount: Mount) -> None:
        if self._keeps is not None:
            self._keeps.keep(key, mount)

    def _forget(self, *keys: str) -> None:
        if self._keeps is not None:
            self._keeps.forget(*keys)

    def _made_ahead(self, count: int, error: int) -> None:
        self._ahead.made(count, error)

    async def _roomy(self) -> bool:
        return await self._in_pool(self._reserve.is_roomy)

    def _stands(self, index: Index) -> bool:
        return self._index is index and not self._turns.stale

    async def _read_again(self) -> None:
        # What was allowed before has been written or refused by then, and nothing new is allowed until the end.
        with suppress(StoreError):
            await self._desk.settled()
        self._index = Index(await self._desk.read(lambda db: list(book.with_usage(db))))

    def _answer_soon(self, entry: Entry, done: Done) -> None:
        """Tell `done` what to mount; the key is held until then."""
        key = entry.snapshot.info.name
        ready = self._answers.at_once(entry)
        if ready is not None:
            self._turns.release(key)
            self._keep(key, ready)
            done(ready)
            return
        attaching = self._answers.attaching(entry)
        if attaching is not None:
            attaching.add_done_callback(partial(self._attached, entry, done))
            return

        async def answer() -> None:
            result: Mount | Exception
            try:
                result = await self._answers.make(entry)
            except Exception as error:
                result = error
            finally:
                self._turns.release(key)
            done(result)

        self._start(answer())

    def _attached(self, entry: Entry, done: Done, attaching: asyncio.Future[str]) -> None:
        if attaching.cancelled():
            return  # the service ends
        error = attaching.exception()
        if error is None:
            self._answer_soon(entry, done)
        else:
            self._turns.release(entry.snapshot.info.name)
            done(error)

    async def _let_go(self, gone: Snapshot) -> None:
        if not self._answers.let_go_at_once(gone):
            await self._answers.let_go(gone)

    async def _let_go_if_gone(self, active: Snapshot) -> None:
        """After a commit that the book may have and that was told to have failed."""
        with suppress(StoreError):
            async with self._turns.locked(active.info.name):
                entry = self._index.get(active.info.name)
                if entry is None or entry.snapshot.number != active.number:
                    await self._let_go(active)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _flatten_now(self, parents: Sequence[int]) -> None:
        """Make the flat tree of the chain whose nearest snapshot is `parents[0]`."""
        sources = lowers_of(parents, self.flattening.flats)
        await self._in_pool(lambda: self._trees.flatten(parents[0], sources))
        # What was told until now names every layer. The tree counts as made before anybody else has a turn.
        self._forget()

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
