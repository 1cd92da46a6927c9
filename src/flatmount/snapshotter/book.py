"""The snapshots in the store's book: rows, and what is read of them. What may be written is decided by the index."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from flatmount.plan.mapping import IdRange, Mapping, parse_ranges
from flatmount.snapshotter.model import REF_LABEL, Form, Info, Kind, Snapshot, SnapshotNotFound, Usage

_COLUMNS: Final = (
    "s.number, s.name, ifnull(p.name, ''), s.kind, s.created_ns, s.updated_ns, s.labels,"
    " s.uid_map, s.gid_map, s.form, s.host_ids, s.remapped, s.size_bytes, s.inodes"
)
_FROM: Final = "snapshots s LEFT JOIN snapshots p ON p.number = s.parent"
_WRITTEN: Final = (
    "number, name, kind, parent, created_ns, updated_ns, labels, reference, uid_map, gid_map, form, host_ids, remapped,"
    " size_bytes, inodes"
)

# What a batch of requests changes, each kind of change by one statement that is run for each of its rows.
WRITE: Final = (
    "DELETE FROM snapshots WHERE number = ?",
    f"INSERT INTO snapshots ({_WRITTEN}) VALUES ({', '.join('?' * (_WRITTEN.count(',') + 1))})",
    "UPDATE snapshots SET labels = ?, reference = ?, updated_ns = ? WHERE number = ?",
)

Row = tuple[str | int | None, ...]


@dataclass(slots=True)
class Rows:
    """What one request changes in the book: snapshots that go, that come, and that get other labels, in this order."""

    delete: int | None = None
    insert: Row | None = None
    update: Row | None = None


def rows_of(changes: Iterable[Rows]) -> tuple[list[Row], list[Row], list[Row]]:
    """The rows for each of `WRITE`, of changes that do not depend on each other but for parents that go after their
    children."""
    gone: list[Row] = []
    come: list[Row] = []
    changed: list[Row] = []
    for rows in changes:
        if rows.delete is not None:
            gone.append((rows.delete,))
        if rows.insert is not None:
            come.append(rows.insert)
        if rows.update is not None:
            changed.append(rows.update)
    return gone, come, changed


def row_of(snapshot: Snapshot, parent: int | None, usage: Usage) -> Row:
    """The row of a snapshot."""
    number, info, mapping, form, host_ids, remapped = snapshot
    labels = info.labels
    return (
        number,
        info.name,
        info.kind,
        parent,
        info.created_ns,
        info.updated_ns,
        _json(labels) if labels else "{}",
        labels.get(REF_LABEL),
        None if mapping is None else _ranges(mapping.uids),
        None if mapping is None else _ranges(mapping.gids),
        form.value,
        host_ids,
        remapped,
        usage.size_bytes,
        usage.inodes,
    )


_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


@lru_cache(maxsize=1024)
def _ranges(ranges: tuple[IdRange, ...]) -> str:
    return ",".join(map(str, ranges))


def labels_row(snapshot: Snapshot) -> Row:
    """The row that changes a snapshot's labels to those it has."""
    info = snapshot.info
    return (_json(info.labels), info.labels.get(REF_LABEL), info.updated_ns, snapshot.number)


def next_numbers(db: sqlite3.Connection, count: int) -> range:
    """Numbers that nothing in this store has had or will have."""
    (last,) = db.execute("UPDATE numbers SET last = last + ? RETURNING last", (count,)).fetchone()
    return range(int(last) - count + 1, int(last) + 1)


def find(db: sqlite3.Connection, name: str) -> Snapshot:
    """The snapshot called `name`. Raises: SnapshotNotFound."""
    row = db.execute(f"SELECT {_COLUMNS} FROM {_FROM} WHERE s.name = ?", (name,)).fetchone()
    if row is None:
        raise SnapshotNotFound(f"snapshot {name!r} does not exist")
    return _read(row)[0]


def everything(db: sqlite3.Connection) -> Iterator[Snapshot]:
    """All snapshots in the order in which they were made, or made committed ones."""
    return (snapshot for snapshot, _ in with_usage(db))


def with_usage(db: sqlite3.Connection) -> Iterator[tuple[Snapshot, Usage]]:
    """All snapshots and what was measured when they were committed; ordered as `everything`."""
    for row in db.execute(f"SELECT {_COLUMNS} FROM {_FROM} ORDER BY s.created_ns, s.number"):
        yield _read(row)


def _read(row: tuple[object, ...]) -> tuple[Snapshot, Usage]:
    number, name, parent, kind, created, updated, labels, uids, gids, form, host_ids, remapped, size, inodes = row
    snapshot = Snapshot(
        number=_int(number),
        info=Info(str(name), str(parent), Kind(_int(kind)), _int(created), _int(updated), json.loads(str(labels))),
        mapping=None if uids is None or gids is None else Mapping(parse_ranges(str(uids)), parse_ranges(str(gids))),
        form=Form(form),
        host_ids=bool(host_ids),
        remapped=bool(remapped),
    )
    return snapshot, Usage(_int(size), _int(inodes))


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value
