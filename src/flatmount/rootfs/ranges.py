"""What all containers of one user range share: its user namespace, and the id-mapped parent of the store's layers."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from flatmount.errors import MAKE_USER_NAMESPACE, from_os_error
from flatmount.kernel.executor import Executable, Outcome
from flatmount.kernel.loop import loop_device
from flatmount.kernel.namespaces import (
    Namespace,
    empty_mount_namespace,
    own_mount_namespace,
    user_namespaces,
)
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import HELPER, HOME, SUPERBLOCK, USER_NAMESPACE, Parameter, Slot, Text
from flatmount.strategies import pin, pin_image, pin_superblock, unpin

# Each detached parent counts against user.max_mnt_namespaces, whose default is a quarter of the thread limit.
DEFAULT_CAPACITY = 4096


class Pin:
    """A clone of a directory's mount that lives as long as this object; an overlay made over it keeps its own.

    Whoever lends `fd` to a run holds the object until the run has ended. `mount_operations` are those in our helper.
    """

    __slots__ = ("__weakref__", "fd", "mount_operations", "place")

    def __init__(self, home: Home, outcome: Outcome, place: str) -> None:
        """Take over what a run of `strategies.pin` made at `place` (in the helper namespace, if it is used)."""
        self.fd = outcome.outputs[0]
        self.place = place
        self.mount_operations = outcome.mount_operations
        weakref.finalize(self, _let_go, self.fd, home, place if outcome.mount_operations else None)


class Home:
    """The namespaces of a pool: where root file systems go, and where parents are kept that cannot stay detached."""

    def __init__(self, facts: HostFacts) -> None:
        self._numbers = itertools.count(1)
        self.lent: dict[Slot, int] = {}
        self._namespaces: list[Namespace] = []
        if not facts.detached_layers:
            for slot, namespace in ((HELPER, empty_mount_namespace()), (HOME, own_mount_namespace())):
                self._namespaces.append(namespace)
                self.lent[slot] = namespace.fileno()

    def place(self) -> str:
        """A directory in the helper namespace that nobody else uses."""
        return f"/{next(self._numbers)}"


def _let_go(fd: int, home: Home, place: str | None) -> None:
    os.close(fd)
    if place is not None:
        Executable(unpin()).run(home.lent, {Parameter.RANGE: place})


def _user_namespaces(mappings: Sequence[Mapping], *, at_once: int = 1) -> list[Namespace]:
    # Here and not where they are made: only here is ENOSPC known to be no disk's.
    try:
        return user_namespaces(mappings, at_once=at_once)
    except OSError as error:
        raise from_os_error(error, MAKE_USER_NAMESPACE) from error


class Range:
    """One user range: its namespace, and on first need the pinned id-mapped parent. Dropped when nobody holds it."""

    __slots__ = ("_ids", "_images", "_lock", "_pin", "_pool", "mapping", "namespace")

    def __init__(self, mapping: Mapping, pool: RangePool) -> None:
        self.mapping = mapping
        self.namespace = _user_namespaces((mapping,))[0]
        self._pool = pool
        self._pin: Pin | None = None
        self._images: dict[str, Pin] = {}
        self._ids: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self._lock = threading.Lock()

    def ids(self, uid: int, gid: int) -> tuple[int, int, int, int]:
        """Host ids for a run: those of the range's first ids, as which files are made, and those of `uid` and `gid`.

        Raises: MappingError where one of these has no host id.
        """
        known = self._ids.get((uid, gid))
        if known is None:
            mapping = self.mapping
            first = (mapping.uids[0].host, mapping.gids[0].host)
            known = self._ids[uid, gid] = (*first, mapping.host_uid(uid), mapping.host_gid(gid))
        return known

    def layers(self) -> Pin:
        """The pinned id-mapped parent of all layers; it stays the range's."""
        if self._pin is None:
            with self._lock:
                if self._pin is None:
                    self._pin = self._pool.pin_layers(self)
        return self._pin

    def image(self, path: str) -> Pin:
        """The id-mapped clone of an EROFS image of the store, `path` relative to its data; it stays the range's."""
        known = self._images.get(path)
        if known is None:
            with self._lock:
                known = self._images.get(path)
                if known is None:
                    known = self._images[path] = self._pool.pin_image(self, path)
        return known

    @property
    def bare(self) -> bool:
        """Whether its parent is not pinned yet."""
        return self._pin is None

    def without(self, path: str) -> bool:
        """Whether it has no clone of an image yet."""
        return path not in self._images

    def adopt(self, made: Pin, image: str | None = None) -> None:
        """Take over what was pinned for it, its parent or a clone of `image`; what it has already stays."""
        with self._lock:
            if image is None:
                self._pin = self._pin or made
            else:
                self._images.setdefault(image, made)


class RangePool:
    """Ranges of one store, kept for as long as the pool lives and shared by their containers.

    Makes no mount in the host's table: parents are detached, or attached in a helper namespace of our own. At most
    `capacity` ranges are kept; those used last stay. A range that a live root file system uses lives as long as that.
    `mount_operations` counts those made for ranges so far, in our helper namespace. Safe to use from any number of
    threads. With detached layers (Linux 6.15) a root file system is attached in the namespace of the thread that
    assembles it; where the helper namespace is used, in that of the thread that made the pool.
    """

    def __init__(self, data: str, facts: HostFacts, *, capacity: int = DEFAULT_CAPACITY) -> None:
        """Serve the store whose data directory is `data` (absolute)."""
        self.data = data
        self.facts = facts
        self.home = Home(facts)
        self._capacity = capacity
        self._kept: OrderedDict[Mapping, Range] = OrderedDict()
        self._directories: dict[str, Pin] = {}
        self._superblocks: dict[str, Pin] = {}
        self._superblock_lock = threading.Lock()
        self._lock = threading.Lock()
        self.mount_operations = 0
        path: Text = (Parameter.DATA,)
        self._pin_mapped = Executable(pin(path, facts, id_mapped=True))
        self._pin_plain = Executable(pin(path, facts, id_mapped=False))
        self._pin_image = Executable(pin_image(facts))

    def get(self, mapping: Mapping) -> Range:
        """The range of a mapping, made on first use.

        Raises: FlatmountError where the user namespace cannot be made; OperationFailed.
        """
        with self._lock:
            known = self._kept.get(mapping)
            if known is not None:
                self._kept.move_to_end(mapping)
                return known
        made = Range(mapping, self)
        with self._lock:
            kept = self._kept.setdefault(mapping, made)
            dropped = self._kept.popitem(last=False) if len(self._kept) > self._capacity else None
        # Out of the lock: closing the last descriptor of a detached mount waits for a grace period.
        del dropped
        return kept

    def prepare(
        self, mappings: Iterable[Mapping], *, pinned: bool = True, image: str | None = None, at_once: int = 1
    ) -> list[Range]:
        """Make ranges for containers to come, and their parents unless they are not `pinned`; `at_once` at a time.

        `image`: an EROFS image of which they are to have their clones as well.

        Raises: FlatmountError; the ranges that were made are kept then, what this call pinned is let go.
        """
        wanted = list(mappings)
        held = _user_namespaces(wanted, at_once=at_once)
        ranges = [self.get(mapping) for mapping in wanted]
        del held
        if pinned:
            bare = [one for one in dict.fromkeys(ranges) if one.bare]
            for one, made in zip(bare, self._pin_many(bare, at_once), strict=True):
                one.adopt(made)
        if image is not None:
            bare = [one for one in dict.fromkeys(ranges) if one.without(image)]
            for one, made in zip(bare, self._pin_many(bare, at_once, image), strict=True):
                one.adopt(made, image)
        return ranges

    def superblock(self, path: str) -> Pin:
        """An EROFS image of the store, mounted; it stays the pool's, and every clone of it shares its page cache.

        Raises: OperationFailed; FlatmountError where no loop device can be had, on a kernel that needs one.
        """
        # A lock of its own: making it reads from disk, and ranges need not wait for that.
        with self._superblock_lock:
            known = self._superblocks.get(path)
            if known is None:
                known = self._superblocks[path] = self._mount_image(path)
            return known

    def _mount_image(self, path: str) -> Pin:
        if self.facts.erofs_files:
            return self._run_superblock(path)
        try:
            with loop_device(os.path.join(self.data, path)) as device:
                return self._run_superblock(device)
        except OSError as error:
            raise from_os_error(error, f"attach {path} to a loop device:") from error

    def _run_superblock(self, source: str) -> Pin:
        place = self.home.place()
        parameters = {Parameter.DATA: self.data, Parameter.RANGE: place, Parameter.IMAGE: source}
        made = Pin(self.home, Executable(pin_superblock(self.facts)).run(self.home.lent, parameters), place)
        with self._lock:
            self.mount_operations += made.mount_operations
        return made

    def pin_image(self, mapped: Range, path: str) -> Pin:
        """Clone and id-map an EROFS image for a range, once more."""
        return self._pin_many([mapped], 1, path)[0]

    def _pin_many(self, ranges: Sequence[Range], at_once: int, image: str | None = None) -> list[Pin]:
        places = [self.home.place() for _ in ranges]
        lent, given, plan = dict(self.home.lent), {Parameter.DATA: self.data}, self._pin_mapped
        shared = None if image is None else self.superblock(image)
        if shared is not None:
            lent[SUPERBLOCK], given[Parameter.SUPERBLOCK_AT], plan = shared.fd, shared.place, self._pin_image
        jobs = [
            plan.job({**lent, USER_NAMESPACE: one.namespace.fileno()}, {**given, Parameter.RANGE: place})
            for one, place in zip(ranges, places, strict=True)
        ]
        outcomes = plan.run_many(jobs, at_once=at_once)
        pins = [
            Pin(self.home, outcome, place)
            for outcome, place in zip(outcomes, places, strict=True)
            if outcome.failure is None
        ]
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        if failures:
            # Out of this frame, which its traceback holds: what was pinned must not stay open until a collection.
            del pins, outcomes
            raise failures.pop()
        with self._lock:
            self.mount_operations += sum(made.mount_operations for made in pins)
        return pins

    def pin_layers(self, mapped: Range) -> Pin:
        """Clone and id-map the parent of all layers, once more."""
        return self._pin_many([mapped], 1)[0]

    def drop(self, mapping: Mapping) -> None:
        """Forget a range now; it goes with the last root file system that uses it."""
        with self._lock:
            dropped = self._kept.pop(mapping, None)
        del dropped

    def directory(self, path: str) -> Pin:
        """A pinned clone of a directory outside the store (uppers); it stays the pool's."""
        with self._lock:
            known = self._directories.get(path)
            if known is None:
                place = self.home.place()
                outcome = self._pin_plain.run(self.home.lent, {Parameter.DATA: path, Parameter.RANGE: place})
                known = self._directories[path] = Pin(self.home, outcome, place)
            return known

    def close(self) -> None:
        """Forget every range and pin. What nobody else holds goes now; root file systems and runs keep their own."""
        with self._lock:
            kept, self._kept = self._kept, OrderedDict()
            directories, self._directories = self._directories, {}
            superblocks, self._superblocks = self._superblocks, {}
        # Out of the lock, as in `get`.
        del kept, directories, superblocks
