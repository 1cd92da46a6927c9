"""Putting right what `fsck` found, one tree at a time; whatever is not bad is not touched."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flatmount.errors import BadImage, FlatmountError, InUse, RegistryError, StoreError, from_os_error
from flatmount.image import ImageSource
from flatmount.store.database import Database
from flatmount.store.disk import Disk
from flatmount.store.fsck import Finding, Part
from flatmount.store.importing import layer_facts, unpack_layer
from flatmount.store.unpack import Unpacked


@dataclass(frozen=True, slots=True)
class Repair:
    """What became of a finding: `done` says what was changed; otherwise `why` says what is in the way."""

    finding: Finding
    done: str = ""
    why: str = ""


def repair(
    disk: Disk, database: Database, findings: Sequence[Finding], sources: Sequence[ImageSource]
) -> tuple[Repair, ...]:
    """Put right what can be, lower layers first.

    A layer is unpacked again from the first of `sources` which has it, under a new number, and takes the place of the
    bad one in all images; their flat trees are taken away and built again when they are next needed. Nothing that
    a container or a mount holds is replaced beneath it.
    """
    return tuple(_outcome(disk, database, finding, sources) for finding in findings)


def _outcome(disk: Disk, database: Database, finding: Finding, sources: Sequence[ImageSource]) -> Repair:
    acts: dict[Part, Callable[[], str]] = {
        Part.LAYER: lambda: _replace_layer(disk, database, finding, sources),
        Part.FLAT: lambda: _drop_tree(disk, database, finding),
        Part.SHIFTED: lambda: _drop_tree(disk, database, finding),
        Part.ROOT: lambda: _drop_tree(disk, database, finding),
        Part.STRAY: lambda: _sweep(disk, database, finding),
    }
    act = acts.get(finding.part)
    if act is None:
        return Repair(finding, why="the book itself is damaged: import the images into a new store")
    try:
        return Repair(finding, done=act())
    except FlatmountError as error:
        return Repair(finding, why=error.line())
    except OSError as error:
        return Repair(finding, why=from_os_error(error, "repair").line())


# The derived trees: where they are, and the table that knows them.
_DERIVED = {"flat": "flats", "erofs": "erofs", "shifted": "shifted", "roots": "roots"}
_USERS = {"layers": "SELECT image FROM image_layers WHERE layer = ?"} | {
    kind: f"SELECT digest FROM images WHERE chain_id IN (SELECT chain_id FROM {table} WHERE number = ?)"
    for kind, table in _DERIVED.items()
}


def _refuse_held(db: sqlite3.Connection, kind: str, number: int) -> None:
    query = f"SELECT holder FROM leases WHERE image IN ({_USERS[kind]}) ORDER BY holder LIMIT 1"
    held = db.execute(query, (number,)).fetchone()
    if held is not None:
        raise InUse(f"it is used by {held[0]}", hint="unmount what uses it, and repair again")


def _replace_layer(disk: Disk, database: Database, finding: Finding, sources: Sequence[ImageSource]) -> str:
    old = finding.number
    with database.reading() as db:
        _refuse_held(db, "layers", old)
        row = db.execute("SELECT diff_id FROM layers WHERE number = ?", (old,)).fetchone()
        if row is None:
            return "it was removed meanwhile"
        (diff_id,) = row
        below = [
            f"layers/{lower}"
            for (lower,) in db.execute(
                "SELECT lower.layer FROM image_layers AS upper JOIN image_layers AS lower"
                " ON lower.image = upper.image AND lower.position < upper.position"
                " WHERE upper.layer = ? AND upper.image = (SELECT min(image) FROM image_layers WHERE layer = ?)"
                " ORDER BY lower.position DESC",
                (old, old),
            )
        ]
    (new,) = database.next_numbers(1)
    with disk.working():
        try:
            unpacked = _unpack_again(disk, diff_id, sources, new, below)
            disk.sync()
            disk.publish("layers", [new])
            with database.transaction() as db:
                _refuse_held(db, "layers", old)
                # Both ends of a reference change here, one after the other.
                db.execute("PRAGMA defer_foreign_keys = ON")
                trees = _drop_flat_trees(db, old)
                db.execute("UPDATE image_layers SET layer = ? WHERE layer = ?", (new, old))
                db.execute(
                    "UPDATE layers SET number = ?, entries = ?, files = ?, size_bytes = ?, dropped_xattrs = ?,"
                    " owners = ?, root = ? WHERE number = ?",
                    (new, *layer_facts(unpacked), old),
                )
        except BaseException:
            for number in database.unbooked("layers", [new]):
                for tree in (f"staging/{number}", f"layers/{number}"):
                    disk.discard(tree)
                disk.drop_entries(number)
            raise
        for tree in (*trees, f"layers/{old}"):
            disk.discard(tree)
        disk.drop_entries(old)
    return f"unpacked again, as data/layers/{new}"


def _unpack_again(
    disk: Disk, diff_id: str, sources: Sequence[ImageSource], number: int, below: Sequence[str]
) -> Unpacked:
    """From the first source that has the layer and gives it; of its image, only this layer is asked for."""
    fitting = [
        (source, source.config.diff_ids.index(diff_id)) for source in sources if diff_id in source.config.diff_ids
    ]
    if not fitting:
        raise StoreError(
            f"no source has layer {diff_id}", hint="name an image that has it: --source PATH or --from REGISTRY/NAME"
        )
    for at, (source, position) in enumerate(fitting, 1):
        source.expect([position], disk.keeping())
        try:
            unpacked = unpack_layer(disk, source, position, number, below)
        except (BadImage, RegistryError):
            disk.discard(f"staging/{number}")
            disk.drop_entries(number)
            if at == len(fitting):
                raise
        except StoreError:
            source.forget(position)
            raise
        else:
            source.forget(position)
            return unpacked
    raise AssertionError("the last one was had or raised")


def _drop_flat_trees(db: sqlite3.Connection, layer: int) -> list[str]:
    """Take the trees made of a layer out of the book; returns them, still on disk."""
    chains = "SELECT chain_id FROM images JOIN image_layers ON image = digest WHERE layer = ?"
    return [
        f"{kind}/{number}"
        for kind, table in _DERIVED.items()
        for (number,) in db.execute(f"DELETE FROM {table} WHERE chain_id IN ({chains}) RETURNING number", (layer,))
    ]


def _drop_tree(disk: Disk, database: Database, finding: Finding) -> str:
    kind = finding.subject.split("/")[1]
    with disk.working():
        with database.transaction() as db:
            _refuse_held(db, kind, finding.number)
            db.execute(f"DELETE FROM {_DERIVED[kind]} WHERE number = ?", (finding.number,))
        disk.discard(f"{kind}/{finding.number}")
    return "taken away; it is built again when it is next needed"


def _sweep(disk: Disk, database: Database, finding: Finding) -> str:
    with disk.alone() as alone:
        if not alone:
            raise InUse("somebody works in the store", hint="repair again when they are done")
        known = database.known_trees()
        disk.sweep(known)
        if finding.subject in disk.strays(known):
            raise StoreError("it cannot be deleted", hint="something may be mounted in it")
    return "deleted"
