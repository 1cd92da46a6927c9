"""The snapshots in memory: what there is, and what may be done with it.

Names, kinds, parents and labels behave as containerd's own metadata does; what goes wrong is told in the same words of
status. Nothing here touches a disk: the book (flatmount.snapshotter.book) has the same on disk, a moment later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Labels
from contextlib import contextmanager
from dataclasses import dataclass

from flatmount.plan.mapping import Mapping
from flatmount.snapshotter.model import (
    REF_LABEL,
    Info,
    InvalidRequest,
    Kind,
    Mount,
    Precondition,
    Snapshot,
    SnapshotExists,
    SnapshotNotFound,
    Usage,
)

_NOTHING = Usage(0, 0)


@dataclass(slots=True, eq=False)
class Entry:
    """One snapshot, what it stands on, and how many stand on it.

    `answer` is the last that was given for it, behind the tree and the lowers that it was made of.
    """

    snapshot: Snapshot
    parent: Entry | None
    usage: Usage
    children: int = 0
    chain_known: tuple[int, ...] | None = None
    answer: tuple[str, tuple[str, ...], Mount] | None = None

    @property
    def chain(self) -> tuple[int, ...]:
        """Its number and those of the committed snapshots beneath it, nearest first."""
        if self.chain_known is None:
            above: list[Entry] = []
            one: Entry | None = self
            while one is not None and one.chain_known is None:
                above.append(one)
                one = one.parent
            beneath = one.chain_known if one is not None and one.chain_known is not None else ()
            self.chain_known = (*(entry.snapshot.number for entry in above), *beneath)
        return self.chain_known

    @property
    def parents(self) -> tuple[int, ...]:
        """The numbers of what is beneath it, nearest first."""
        return () if self.parent is None else self.parent.chain

    @property
    def parent_number(self) -> int | None:
        """What its row names as parent."""
        return None if self.parent is None else self.parent.snapshot.number


class Index:
    """Every snapshot of a store by name. Belongs to one thread."""

    def __init__(self, found: Iterable[tuple[Snapshot, Usage]] = ()) -> None:
        """`found` are the snapshots that the book has, parents before children or after."""
        self._entries: dict[str, Entry] = {}
        # Committed content by reference and parent, and names that a commit is about to give.
        self._content: Counter[tuple[str, int | None]] = Counter()
        self._promised: set[str] = set()
        for snapshot, usage in found:
            self._entries[snapshot.info.name] = Entry(snapshot, None, usage)
        for entry in self._entries.values():
            info = entry.snapshot.info
            if info.parent:
                entry.parent = self._entries[info.parent]
                entry.parent.children += 1
            self._note(entry, 1)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """In the order in which they were made, or made committed ones; what one clock tick made by number."""
        return iter(sorted(self._entries.values(), key=_made))

    def numbers(self) -> set[int]:
        """The numbers of all of them."""
        return {entry.snapshot.number for entry in self._entries.values()}

    def get(self, name: str) -> Entry | None:
        """The snapshot called `name`, if there is one."""
        return self._entries.get(name)

    def find(self, name: str) -> Entry:
        """The snapshot called `name`. Raises: SnapshotNotFound."""
        entry = self._entries.get(name)
        if entry is None:
            raise SnapshotNotFound(f"snapshot {name!r} does not exist")
        return entry

    def check(self, info: Info, mapping: Mapping | None) -> Entry | None:
        """Whether an active snapshot or a view may be entered; its parent. Changes nothing.

        Raises: SnapshotNotFound for its parent; InvalidRequest, when that is not committed; Precondition, when its
        owners were changed already and a mapping is asked for; SnapshotExists, also when the labels ask for content
        that is committed on the same parent already.
        """
        parent: Entry | None = None
        if info.parent:
            parent = self._entries.get(info.parent)
            if parent is None:
                raise SnapshotNotFound(f"missing parent {info.parent!r} of snapshot {info.name!r}")
            if parent.snapshot.info.kind is not Kind.COMMITTED:
                raise InvalidRequest(f"parent {info.parent!r} is not a committed snapshot")
            if parent.snapshot.remapped and mapping is not None:
                raise remap_refused(info.name)
        reference = info.labels.get(REF_LABEL)
        if reference and (reference, None if parent is None else parent.snapshot.number) in self._content:
            raise SnapshotExists(f"target {reference!r} of snapshot {info.name!r} is committed already")
        if info.name in self._entries or info.name in self._promised:
            raise SnapshotExists(f"snapshot {info.name!r} exists already")
        return parent

    def enter(self, snapshot: Snapshot, parent: Entry | None) -> Entry:
        """Enter what `check` found to be right."""
        entry = Entry(snapshot, parent, _NOTHING)
        self._entries[snapshot.info.name] = entry
        if parent is not None:
            parent.children += 1
        return entry

    def remove(self, name: str) -> Entry:
        """Take a snapshot out; its files are somebody else's business.

        Raises: SnapshotNotFound; Precondition, while another one has it as parent.
        """
        entry = self.find(name)
        if entry.children:
            child = next((one.snapshot.info.name for one in self._entries.values() if one.parent is entry), None)
            told = "that is being committed" if child is None else repr(child)
            raise Precondition(
                f"cannot remove snapshot {name!r} with child {told}", hint="remove what was made on it first"
            )
        self._take_out(entry)
        return entry

    @contextmanager
    def committing(
        self, key: str, name: str, parent: str, labels: Labels[str, str], usage: Usage, number: int
    ) -> Iterator[Entry]:
        """The active snapshot `key` as the committed `name`, whose labels replace those of the active one.

        The name and the parent are kept for it until the block is left; `commit` makes it so.

        Args:
            parent: "" for the one it has; another one for a snapshot that was made without.
            number: the directory that holds its files from now on.

        Raises: what `check_commit` raises.
        """
        made = self._committed(key, name, parent, labels, usage, number)
        self._promised.add(name)
        if made.parent is not None:
            made.parent.children += 1
        try:
            yield made
        finally:
            self._promised.discard(name)
            if made.parent is not None:
                made.parent.children -= 1

    def check_commit(self, key: str, name: str, parent: str) -> Entry | None:
        """Whether the active snapshot `key` may become `name`, on `parent` if one is told; its parent. Changes nothing.

        Raises: SnapshotExists for the name; SnapshotNotFound; Precondition, when it is not active or its parent is not
        committed; InvalidRequest for another parent than it has.
        """
        active = self.find(key)
        if active.snapshot.info.kind is not Kind.ACTIVE:
            raise Precondition(f"snapshot {key!r} is not active")
        if name in self._entries or name in self._promised:
            raise SnapshotExists(f"committed snapshot {name!r} exists already")
        on = active.parent
        if parent:
            if on is not None and on.snapshot.info.name != parent:
                raise InvalidRequest(f"cannot change the parent of active snapshot {key!r} on commit")
            on = self.find(parent)
            if on.snapshot.info.kind is not Kind.COMMITTED:
                raise Precondition(f"parent {parent!r} of snapshot {key!r} is not committed")
        return on

    def _committed(
        self, key: str, name: str, parent: str, labels: Labels[str, str], usage: Usage, number: int
    ) -> Entry:
        on = self.check_commit(key, name, parent)
        active = self.find(key)
        now = time.time_ns()
        info = Info(
            name=name,
            parent="" if on is None else on.snapshot.info.name,
            kind=Kind.COMMITTED,
            created_ns=now,
            updated_ns=now,
            labels=without_empty(labels),
        )
        remapped = key.endswith("-remap")
        snapshot = active.snapshot._replace(number=number, info=info, mapping=None, host_ids=False, remapped=remapped)
        return Entry(snapshot, on, usage)

    def commit(self, key: str, made: Entry) -> None:
        """Put a committed snapshot in the place of the active one, within the block of `committing`."""
        self._take_out(self._entries[key])
        self._entries[made.snapshot.info.name] = made
        if made.parent is not None:
            made.parent.children += 1
        self._note(made, 1)

    def update(self, name: str, labels: Labels[str, str], paths: Sequence[str]) -> Entry:
        """Change labels: those that `paths` name (`labels`, `labels.KEY`), or all of them; an empty value removes one.

        Raises: SnapshotNotFound; InvalidRequest for anything but labels.
        """
        entry = self.find(name)
        info = entry.snapshot.info
        changed = dict(info.labels) if paths else dict(labels)
        for path in paths:
            if path == "labels":
                changed = dict(labels)
            elif path.startswith("labels."):
                key = path.removeprefix("labels.")
                changed[key] = labels.get(key, "")
            else:
                raise InvalidRequest(
                    f"cannot update field {path!r} of snapshot {name!r}", hint="only labels can change"
                )
        # The clock may step back; a snapshot is never updated before it was made.
        now = max(time.time_ns(), info.created_ns)
        self._note(entry, -1)
        entry.snapshot = entry.snapshot._replace(info=info._replace(labels=without_empty(changed), updated_ns=now))
        self._note(entry, 1)
        return entry

    def _take_out(self, entry: Entry) -> None:
        del self._entries[entry.snapshot.info.name]
        if entry.parent is not None:
            entry.parent.children -= 1
        self._note(entry, -1)

    def _note(self, entry: Entry, times: int) -> None:
        info = entry.snapshot.info
        reference = info.labels.get(REF_LABEL)
        if reference and info.kind is Kind.COMMITTED:
            content = (reference, entry.parent_number)
            self._content[content] += times
            if not self._content[content]:
                del self._content[content]


def _made(entry: Entry) -> tuple[int, int]:
    return entry.snapshot.info.created_ns, entry.snapshot.number


def without_empty(labels: Labels[str, str]) -> dict[str, str]:
    """Labels as they are kept: an empty value is none."""
    return {key: value for key, value in labels.items() if value}


def remap_refused(name: str) -> Precondition:
    """What a client is told that has changed owners itself and wants them mapped as well."""
    return Precondition(
        f"snapshot {name!r}: containerd has changed the owners of a copy of the image and asks for a mapping as well",
        hint='add capabilities = ["remap-ids"] to the proxy plugin in containerd\'s configuration, restart containerd'
        " and remove the snapshots whose keys end in -remap; `flatmount containerd install` does the first",
    )


def check_name(name: str) -> None:
    """Whether a snapshot can be called so. Raises: InvalidRequest."""
    if not name:
        raise InvalidRequest("a snapshot needs a key")
    if "\0" in name:
        raise InvalidRequest(f"{name!r} cannot be the name of a snapshot")
