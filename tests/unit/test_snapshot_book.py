"""Snapshots in the book: what containerd expects of names, kinds, parents and labels."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.plan.mapping import Mapping
from flatmount.snapshotter import book
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
from flatmount.store.database import Database


class Shelf:
    """A book and the numbers of its snapshots."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.last = 0

    def create(
        self, key: str, parent: str = "", *, kind: Kind = Kind.ACTIVE, mapping: Mapping | None = None, **labels: str
    ) -> book.Chain:
        self.last += 1
        own = {name.replace("_", "."): value for name, value in labels.items()}
        info = Info(key, parent, kind, 0, 0, own)
        return book.create(self.db, Snapshot(self.last, info, mapping, Form.OVERLAY, False, False))

    def commit(self, key: str, name: str, parent: str = "", labels: dict[str, str] | None = None) -> Snapshot:
        return book.commit(
            self.db, key=key, name=name, parent=parent, labels=labels or {}, usage=Usage(4096, 2), number=None
        )

    def committed(self, name: str, parent: str = "", labels: dict[str, str] | None = None) -> Snapshot:
        self.create(f"{name}-key", parent)
        return self.commit(f"{name}-key", name, labels=labels)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    database = Database.create(str(tmp_path / "state.db"))
    with database.transaction() as db:
        yield Shelf(db)
    database.close()


def test_a_chain_names_its_parents_nearest_first(shelf: Shelf) -> None:
    numbers = [shelf.committed("a").number, shelf.committed("b", "a").number, shelf.committed("c", "b").number]
    made = shelf.create("container", "c", mapping=Mapping.single(100000))
    assert made.parents == tuple(reversed(numbers))
    assert book.chain(shelf.db, "container") == made
    assert made.snapshot.mapping == Mapping.single(100000)


def test_a_commit_gives_a_name_and_takes_the_key(shelf: Shelf) -> None:
    made = shelf.create("key", label="old").snapshot
    committed = shelf.commit("key", "name", labels={"label": "new", "empty": ""})
    assert committed.number == made.number
    assert committed.info.kind is Kind.COMMITTED
    assert committed.info.labels == {"label": "new"}
    assert book.stored_usage(shelf.db, committed.number) == Usage(4096, 2)
    with pytest.raises(SnapshotNotFound):
        book.find(shelf.db, "key")


def test_names_are_taken_once(shelf: Shelf) -> None:
    shelf.committed("a")
    for kind in (Kind.ACTIVE, Kind.VIEW):
        with pytest.raises(SnapshotExists):
            shelf.create("a", kind=kind)
    shelf.create("b")
    with pytest.raises(SnapshotExists):
        shelf.commit("b", "a")
    with pytest.raises(SnapshotExists):
        shelf.commit("b", "b")


def test_parents_are_committed_snapshots(shelf: Shelf) -> None:
    with pytest.raises(SnapshotNotFound, match="missing parent"):
        shelf.create("a", "nobody")
    shelf.create("active")
    with pytest.raises(InvalidRequest):
        shelf.create("a", "active")


def test_only_active_snapshots_are_committed(shelf: Shelf) -> None:
    with pytest.raises(SnapshotNotFound):
        shelf.commit("nobody", "x")
    shelf.committed("a")
    shelf.create("view", "a", kind=Kind.VIEW)
    for key in ("a", "view"):
        with pytest.raises(Precondition):
            shelf.commit(key, "x")


def test_a_parent_may_come_with_the_commit(shelf: Shelf) -> None:
    shelf.committed("a")
    shelf.committed("b")
    shelf.create("free")
    assert shelf.commit("free", "on-a", "a").info.parent == "a"
    shelf.create("bound", "a")
    with pytest.raises(InvalidRequest):
        shelf.commit("bound", "x", "b")
    assert shelf.commit("bound", "x", "a").info.parent == "a"
    shelf.create("other")
    shelf.create("active")
    with pytest.raises(Precondition):
        shelf.commit("other", "y", "active")
    with pytest.raises(SnapshotNotFound):
        shelf.commit("other", "y", "nobody")


def test_what_has_a_child_stays(shelf: Shelf) -> None:
    shelf.committed("a")
    shelf.create("b", "a")
    with pytest.raises(Precondition, match="remove"):
        book.remove(shelf.db, "a")
    book.remove(shelf.db, "b")
    book.remove(shelf.db, "a")
    with pytest.raises(SnapshotNotFound):
        book.remove(shelf.db, "a")


def test_only_labels_can_be_updated(shelf: Shelf) -> None:
    created = shelf.create("a", l1="v1", l2="v2").snapshot.info
    info = book.update(shelf.db, "a", {"l1": "new", "l4": "v4"}, ["labels.l1", "labels.l2"])
    assert info.labels == {"l1": "new"}
    assert info.created_ns == created.created_ns
    assert info.updated_ns >= created.updated_ns
    assert book.update(shelf.db, "a", {"l9": "x"}, ["labels"]).labels == {"l9": "x"}
    assert book.update(shelf.db, "a", {}, []).labels == {}
    with pytest.raises(InvalidRequest):
        book.update(shelf.db, "a", {}, ["parent"])
    with pytest.raises(SnapshotNotFound):
        book.update(shelf.db, "nobody", {}, [])


def test_content_that_is_there_is_not_unpacked_again(shelf: Shelf) -> None:
    shelf.committed("ns1/1/base", labels={REF_LABEL: "sha256:base"})
    shelf.committed("ns1/2/top", "ns1/1/base", labels={REF_LABEL: "sha256:top"})
    with pytest.raises(SnapshotExists):
        shelf.create("ns2/1/extract", **{REF_LABEL.replace(".", "_"): "sha256:base"})
    with pytest.raises(SnapshotExists):
        shelf.create("ns2/2/extract", "ns1/1/base", **{REF_LABEL.replace(".", "_"): "sha256:top"})
    # The same content on another parent is another snapshot.
    shelf.create("ns2/3/extract", **{REF_LABEL.replace(".", "_"): "sha256:top"})


def test_owners_that_containerd_has_changed_are_not_mapped_again(shelf: Shelf) -> None:
    shelf.committed("base")
    shelf.create("base-100000-remap", "base")
    shelf.commit("base-100000-remap", "base-100000")
    shelf.create("plain", "base-100000")
    with pytest.raises(Precondition) as refused:
        shelf.create("container", "base-100000", mapping=Mapping.single(100000))
    assert 'capabilities = ["remap-ids"]' in refused.value.hint
    # So it is where the service remembers the parent and does not read it.
    known = book.chain(shelf.db, "base-100000")
    info = Info("remembered", "base-100000", Kind.ACTIVE, 0, 0, {})
    wanted = Snapshot(99, info, Mapping.single(100000), Form.OVERLAY, host_ids=False, remapped=False)
    with pytest.raises(Precondition):
        book.create(shelf.db, wanted, known)
