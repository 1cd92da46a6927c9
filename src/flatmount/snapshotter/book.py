"""The snapshots in the store's book: rows, and what is read of them. What may be written is decided by the index."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Labels
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

# What a batch of requests changes is one statement, each kind of change one piece of JSON: one call of SQLite's, and so
# one wait for the interpreter's lock, for all of it. It is its own transaction where none was begun.
# A connection that writes is made ready with `SETUP` first.
SETUP: Final = (
    "CREATE TEMP VIEW changes (gone, come, changed) AS SELECT NULL, NULL, NULL",
    f"""CREATE TEMP TRIGGER make_changes INSTEAD OF INSERT ON changes BEGIN
        DELETE FROM snapshots WHERE number IN (SELECT value FROM json_each(NEW.gone));
        INSERT INTO snapshots ({_WRITTEN})
        SELECT {", ".join(f"json_extract(value, '$[{place}]')" for place in range(_WRITTEN.count(",") + 1))}
        FROM json_each(NEW.come);
        UPDATE snapshots SET labels = json_extract(j.value, '$[1]'), reference = json_extract(j.value, '$[2]'),
            updated_ns = json_extract(j.value, '$[3]')
        FROM json_each(NEW.changed) j WHERE number = json_extract(j.value, '$[0]');
    END""",
)
WRITE: Final = "INSERT INTO changes VALUES (?, ?, ?)"

# Labels are an object within, of which SQLite keeps the text.
Row = tuple[str | int | Labels[str, str] | None, ...]


_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


@dataclass(slots=True)
class Rows:
    """What one request changes in the book: snapshots that go, that come, and that get other labels, in this order."""

    delete: int | None = None
    insert: Row | None = None
    update: Row | None = None


def parameters(changes: Iterable[Rows]) -> tuple[str | None, str | None, str | None]:
    """What `WRITE` takes for changes that do not depend on each other, but for parents that go after their children."""
    gone: list[int] = []
    come: list[Row] = []
    changed: list[Row] = []
    for rows in changes:
        if rows.delete is not None:
            gone.append(rows.delete)
        if rows.insert is not None:
            come.append(rows.insert)
        if rows.update is not None:
            changed.append(rows.update)
    return (
        _json(gone) if gone else None,
        _json(come) if come else None,
        _json(changed) if changed else None,
    )


def row_of(snapshot: Snapshot, parent: int | None, usage: Usage) -> Row:
    """The row of a snapshot."""
    info, mapping = snapshot.info, snapshot.mapping
    return (
        snapshot.number,
        info.name,
        int(info.kind),
        parent,
        info.created_ns,
        info.updated_ns,
        info.labels,
        info.labels.get(REF_LABEL),
        None if mapping is None else _ranges(mapping.uids),
        None if mapping is None else _ranges(mapping.gids),
        snapshot.form.value,
        int(snapshot.host_ids),
        int(snapshot.remapped),
        usage.size_bytes,
        usage.inodes,
    )


@lru_cache(maxsize=1024)
def _ranges(ranges: tuple[IdRange, ...]) -> str:
    return ",".join(map(str, ranges))


def labels_row(snapshot: Snapshot) -> Row:
    """The row that changes a snapshot's labels to those it has."""
    info = snapshot.info
    return (snapshot.number, info.labels, info.labels.get(REF_LABEL), info.updated_ns)


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
