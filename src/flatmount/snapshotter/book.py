"""The snapshots in the store's book: each function is one request's part of a transaction.

Names, kinds, parents and labels behave as containerd's own metadata does; what goes wrong is told in the same words of
status. Nothing here touches a tree on disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Labels
from dataclasses import dataclass, replace

from flatmount.plan.mapping import Mapping, parse_ranges
from flatmount.snapshotter.model import (
    REF_LABEL,
    Form,
    Info,
    InvalidRequest,
    Kind,
    Precondition,
    Snapshot,
    SnapshotExists,
    SnapshotNotFound,
    Usage,
)

_COLUMNS = (
    "s.number, s.name, ifnull(p.name, ''), s.kind, s.created_ns, s.updated_ns, s.labels,"
    " s.uid_map, s.gid_map, s.form, s.host_ids, s.remapped"
)
_FROM = "snapshots s LEFT JOIN snapshots p ON p.number = s.parent"
_Row = tuple[int, str, str, int, int, int, str, str | None, str | None, str, int, int]


@dataclass(frozen=True, slots=True)
class Chain:
    """A snapshot and the committed ones beneath it, nearest first."""

    snapshot: Snapshot
    parents: tuple[int, ...]


def find(db: sqlite3.Connection, name: str) -> Snapshot:
    """The snapshot called `name`. Raises: SnapshotNotFound."""
    row = db.execute(f"SELECT {_COLUMNS} FROM {_FROM} WHERE s.name = ?", (name,)).fetchone()
    if row is None:
        raise SnapshotNotFound(f"snapshot {name!r} does not exist")
    return _snapshot(row)


def everything(db: sqlite3.Connection) -> Iterator[Snapshot]:
    """All snapshots in the order in which they were made."""
    for row in db.execute(f"SELECT {_COLUMNS} FROM {_FROM} ORDER BY s.number"):
        yield _snapshot(row)


def chain(db: sqlite3.Connection, name: str) -> Chain:
    """The snapshot called `name` with its parents. Raises: SnapshotNotFound."""
    snapshot = find(db, name)
    return Chain(snapshot, _parents(db, snapshot.number))


def _parents(db: sqlite3.Connection, number: int) -> tuple[int, ...]:
    rows = db.execute(
        "WITH RECURSIVE up(number, parent, depth) AS ("
        " SELECT number, parent, 0 FROM snapshots WHERE number = ?"
        " UNION ALL SELECT s.number, s.parent, depth + 1 FROM snapshots s JOIN up ON s.number = up.parent)"
        " SELECT number FROM up WHERE depth > 0 ORDER BY depth",
        (number,),
    )
    return tuple(row[0] for row in rows)


def create(db: sqlite3.Connection, snapshot: Snapshot, known: Chain | None = None) -> Chain:
    """Enter an active snapshot or a view. Its times are set here.

    Args:
        known: its parent as somebody remembers it, which saves reading it; it may be gone meanwhile.

    Raises: SnapshotNotFound for its parent; InvalidRequest, when that is not committed; Precondition, when its owners
    were changed already and a mapping is asked for; SnapshotExists, also when the labels ask for content that is
    committed on the same parent already.
    """
    info = snapshot.info
    parent: Snapshot | None = None
    if info.parent and known is not None and _is_there(db, known.snapshot):
        parent = known.snapshot
    elif info.parent:
        known = None
        try:
            parent = find(db, info.parent)
        except SnapshotNotFound:
            raise SnapshotNotFound(f"missing parent {info.parent!r} of snapshot {info.name!r}") from None
        if parent.info.kind is not Kind.COMMITTED:
            raise InvalidRequest(f"parent {info.parent!r} is not a committed snapshot")
    if parent is not None and parent.remapped and snapshot.mapping is not None:
        raise remap_refused(info.name)
    reference = info.labels.get(REF_LABEL)
    if reference is not None and _committed_with(db, reference, None if parent is None else parent.number):
        raise SnapshotExists(f"target {reference!r} of snapshot {info.name!r} is committed already")
    labels = {key: value for key, value in info.labels.items() if value}
    now = time.time_ns()
    made = replace(snapshot, info=replace(info, created_ns=now, updated_ns=now, labels=labels))
    try:
        _insert(db, made, None if parent is None else parent.number)
    except sqlite3.IntegrityError:
        raise SnapshotExists(f"snapshot {info.name!r} exists already") from None
    if parent is None:
        return Chain(made, ())
    above = known.parents if known is not None else _parents(db, parent.number)
    return Chain(made, (parent.number, *above))


def _is_there(db: sqlite3.Connection, snapshot: Snapshot) -> bool:
    # A number is used once and what is committed stays what it is, so this says that all of it still holds.
    if snapshot.info.kind is not Kind.COMMITTED:
        return False
    found = db.execute("SELECT 1 FROM snapshots WHERE number = ? AND name = ?", (snapshot.number, snapshot.info.name))
    return found.fetchone() is not None


def remap_refused(name: str) -> Precondition:
    """What a client is told that has changed owners itself and wants them mapped as well."""
    return Precondition(
        f"snapshot {name!r}: containerd has changed the owners of a copy of the image and asks for a mapping as well",
        hint='add capabilities = ["remap-ids"] to the proxy plugin in containerd\'s configuration, restart containerd'
        " and remove the snapshots whose keys end in -remap; `flatmount containerd install` does the first",
    )


def _committed_with(db: sqlite3.Connection, reference: str, parent: int | None) -> bool:
    row = db.execute(
        "SELECT 1 FROM snapshots WHERE reference = ? AND kind = ? AND parent IS ?", (reference, Kind.COMMITTED, parent)
    ).fetchone()
    return row is not None


def _insert(db: sqlite3.Connection, snapshot: Snapshot, parent: int | None) -> None:
    info, mapping = snapshot.info, snapshot.mapping
    db.execute(
        "INSERT INTO snapshots (number, name, kind, parent, created_ns, updated_ns, labels, reference,"
        " uid_map, gid_map, form, host_ids, remapped) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            snapshot.number,
            info.name,
            info.kind,
            parent,
            info.created_ns,
            info.updated_ns,
            json.dumps(dict(info.labels)),
            info.labels.get(REF_LABEL),
            None if mapping is None else ",".join(map(str, mapping.uids)),
            None if mapping is None else ",".join(map(str, mapping.gids)),
            snapshot.form.value,
            snapshot.host_ids,
            snapshot.remapped,
        ),
    )


def commit(
    db: sqlite3.Connection,
    *,
    key: str,
    name: str,
    parent: str,
    labels: Labels[str, str],
    usage: Usage,
    number: int | None = None,
) -> Snapshot:
    """Turn the active snapshot `key` into the committed `name`, whose labels replace those of the active one.

    Args:
        parent: "" for the one it has; another one for a snapshot that was made without.
        number: the directory that holds its files from now on, where they were copied.

    Raises: SnapshotNotFound, SnapshotExists, Precondition, InvalidRequest.
    """
    if db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone() is not None:
        raise SnapshotExists(f"committed snapshot {name!r} exists already")
    active = find(db, key)
    if active.info.kind is not Kind.ACTIVE:
        raise Precondition(f"snapshot {key!r} is not active")
    if parent and active.info.parent not in ("", parent):
        raise InvalidRequest(f"cannot change the parent of active snapshot {key!r} on commit")
    on: Snapshot | None = None
    if parent or active.info.parent:
        on = find(db, parent or active.info.parent)
        if on.info.kind is not Kind.COMMITTED:
            raise Precondition(f"parent {on.info.name!r} of snapshot {key!r} is not committed")
    now = time.time_ns()
    info = Info(
        name=name,
        parent="" if on is None else on.info.name,
        kind=Kind.COMMITTED,
        created_ns=now,
        updated_ns=now,
        labels={key: value for key, value in labels.items() if value},
    )
    made = replace(
        active,
        number=active.number if number is None else number,
        info=info,
        mapping=None,
        host_ids=False,
        remapped=key.endswith("-remap"),
    )
    db.execute("DELETE FROM snapshots WHERE number = ?", (active.number,))
    _insert(db, made, None if on is None else on.number)
    db.execute(
        "UPDATE snapshots SET size_bytes = ?, inodes = ? WHERE number = ?",
        (usage.size_bytes, usage.inodes, made.number),
    )
    return made


def remove(db: sqlite3.Connection, name: str) -> Snapshot:
    """Take a snapshot out of the book; its files are somebody else's business.

    Raises: SnapshotNotFound; Precondition, while another one has it as parent.
    """
    snapshot = find(db, name)
    child = db.execute("SELECT name FROM snapshots WHERE parent = ? LIMIT 1", (snapshot.number,)).fetchone()
    if child is not None:
        raise Precondition(
            f"cannot remove snapshot {name!r} with child {child[0]!r}", hint="remove what was made on it first"
        )
    db.execute("DELETE FROM snapshots WHERE number = ?", (snapshot.number,))
    return snapshot


def update(db: sqlite3.Connection, name: str, labels: Labels[str, str], paths: Sequence[str]) -> Info:
    """Change labels: those that `paths` name (`labels`, `labels.KEY`), or all of them; an empty value removes one.

    Raises: SnapshotNotFound; InvalidRequest for anything but labels.
    """
    info = find(db, name).info
    changed = dict(info.labels) if paths else dict(labels)
    for path in paths:
        if path == "labels":
            changed = dict(labels)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            changed[key] = labels.get(key, "")
        else:
            raise InvalidRequest(f"cannot update field {path!r} of snapshot {name!r}", hint="only labels can change")
    changed = {key: value for key, value in changed.items() if value}
    # The clock may step back; a snapshot is never updated before it was made.
    now = max(time.time_ns(), info.created_ns)
    db.execute(
        "UPDATE snapshots SET labels = ?, reference = ?, updated_ns = ? WHERE name = ?",
        (json.dumps(changed), changed.get(REF_LABEL), now, name),
    )
    return replace(info, labels=changed, updated_ns=now)


def stored_usage(db: sqlite3.Connection, number: int) -> Usage:
    """What was measured when the snapshot was committed."""
    return Usage(*db.execute("SELECT size_bytes, inodes FROM snapshots WHERE number = ?", (number,)).fetchone())


def _snapshot(row: _Row) -> Snapshot:
    number, name, parent, kind, created_ns, updated_ns, labels, uids, gids, form, host_ids, remapped = row
    return Snapshot(
        number=number,
        info=Info(name, parent, Kind(kind), created_ns, updated_ns, json.loads(labels)),
        mapping=None if uids is None or gids is None else Mapping(parse_ranges(uids), parse_ranges(gids)),
        form=Form(form),
        host_ids=bool(host_ids),
        remapped=bool(remapped),
    )
