"""Snapshots in the index and in the book: what containerd expects of names, kinds, parents and labels.

Every change goes into a book as well, and after each test an index that is read from that says the same.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatmount.plan.mapping import Mapping
from flatmount.snapshotter import book
from flatmount.snapshotter.index import Entry, Index, without_empty
from flatmount.snapshotter.model import (
    REF_LABEL,
    Form,
    Info,
    InvalidRequest,
    Kind,
    Precondition,
    Snapshot,
    SnapshotError,
    SnapshotExists,
    SnapshotNotFound,
    Usage,
)
from flatmount.store.database import Database


class Shelf:
    """An index, its book, and the numbers of its snapshots."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.index = Index()
        self.last = 0

    def create(
        self, key: str, parent: str = "", *, kind: Kind = Kind.ACTIVE, mapping: Mapping | None = None, **labels: str
    ) -> Entry:
        own = {name.replace("_", "."): value for name, value in labels.items()}
        info = Info(key, parent, kind, 1, 1, without_empty(own))
        on = self.index.check(info, mapping)
        self.last += 1
        entry = self.index.enter(Snapshot(self.last, info, mapping, Form.OVERLAY, False, False), on)
        self.write(book.Rows(insert=book.row_of(entry.snapshot, entry.parent_number, entry.usage)))
        return entry

    def commit(self, key: str, name: str, parent: str = "", labels: dict[str, str] | None = None) -> Snapshot:
        active = self.index.get(key)
        number = 0 if active is None else active.snapshot.number
        with self.index.committing(key, name, parent, labels or {}, Usage(4096, 2), number) as made:
            row = book.row_of(made.snapshot, made.parent_number, made.usage)
            self.write(book.Rows(delete=number, insert=row))
            self.index.commit(key, made)
        return made.snapshot

    def committed(self, name: str, parent: str = "", labels: dict[str, str] | None = None) -> Snapshot:
        self.create(f"{name}-key", parent)
        return self.commit(f"{name}-key", name, labels=labels)

    def remove(self, name: str) -> None:
        self.write(book.Rows(delete=self.index.remove(name).snapshot.number))

    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> Info:
        entry = self.index.update(name, labels, paths)
        self.write(book.Rows(update=book.labels_row(entry.snapshot)))
        return entry.snapshot.info

    def write(self, rows: book.Rows) -> None:
        for statement, each in zip(book.WRITE, book.rows_of([rows]), strict=True):
            self.db.executemany(statement, each)

    def check_book(self) -> None:
        read = Index(book.with_usage(self.db))
        seen = [(e.snapshot, e.parents, e.children, e.usage) for e in self.index]
        assert [(e.snapshot, e.parents, e.children, e.usage) for e in read] == seen
        assert read._content == self.index._content


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    database = Database.create(str(tmp_path / "state.db"))
    with database.transaction() as db:
        made = Shelf(db)
        yield made
        made.check_book()
    database.close()


def test_a_chain_names_its_parents_nearest_first(shelf: Shelf) -> None:
    numbers = [shelf.committed("a").number, shelf.committed("b", "a").number, shelf.committed("c", "b").number]
    made = shelf.create("container", "c", mapping=Mapping.single(100000))
    assert made.parents == tuple(reversed(numbers))
    assert shelf.index.find("container") is made
    assert made.chain == (made.snapshot.number, *made.parents)
    assert book.find(shelf.db, "container") == made.snapshot
    assert made.snapshot.mapping == Mapping.single(100000)


def test_a_commit_gives_a_name_and_takes_the_key(shelf: Shelf) -> None:
    made = shelf.create("key", label="old").snapshot
    committed = shelf.commit("key", "name", labels={"label": "new", "empty": ""})
    assert committed.number == made.number
    assert committed.info.kind is Kind.COMMITTED
    assert committed.info.labels == {"label": "new"}
    assert shelf.index.find("name").usage == Usage(4096, 2)
    for find in (shelf.index.find, lambda key: book.find(shelf.db, key)):
        with pytest.raises(SnapshotNotFound):
            find("key")


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
        shelf.remove("a")
    shelf.remove("b")
    shelf.remove("a")
    with pytest.raises(SnapshotNotFound):
        shelf.remove("a")


def test_only_labels_can_be_updated(shelf: Shelf) -> None:
    created = shelf.create("a", l1="v1", l2="v2").snapshot.info
    info = shelf.update("a", {"l1": "new", "l4": "v4"}, ["labels.l1", "labels.l2"])
    assert info.labels == {"l1": "new"}
    assert info.created_ns == created.created_ns
    assert info.updated_ns >= created.updated_ns
    assert shelf.update("a", {"l9": "x"}, ["labels"]).labels == {"l9": "x"}
    assert shelf.update("a", {}, []).labels == {}
    with pytest.raises(InvalidRequest):
        shelf.update("a", {}, ["parent"])
    with pytest.raises(SnapshotNotFound):
        shelf.update("nobody", {}, [])


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


def test_a_commit_under_way_keeps_its_name_and_its_parent(shelf: Shelf) -> None:
    shelf.committed("parent")
    active = shelf.create("free").snapshot
    shelf.create("other")
    with shelf.index.committing("free", "name", "parent", {}, Usage(0, 0), active.number):
        for wanted in (lambda: shelf.create("name"), lambda: shelf.commit("other", "name")):
            with pytest.raises(SnapshotExists):
                wanted()
        with pytest.raises(Precondition, match="being committed"):
            shelf.index.remove("parent")
        assert shelf.index.get("name") is None, "nobody stands on it before it is there"
    # It was given up: all is as before.
    shelf.commit("other", "name")
    shelf.remove("parent")


def test_a_chain_of_thousands_is_walked_once(shelf: Shelf) -> None:
    parent = ""
    for number in range(3000):
        shelf.create(f"k{number}", parent)
        parent = shelf.commit(f"k{number}", f"c{number}").info.name
    assert len(shelf.index.find(parent).chain) == 3000


NAMES = st.sampled_from(["a", "b", "c", "d"])
LABELS = st.dictionaries(
    st.sampled_from(["x", REF_LABEL, "\N{SNOWMAN}"]), st.sampled_from(["", "1", "\U0001f600", "\0"])
)
STEPS = st.one_of(
    st.tuples(
        st.just("create"), NAMES, st.one_of(st.just(""), NAMES), st.sampled_from([Kind.ACTIVE, Kind.VIEW]), LABELS
    ),
    st.tuples(st.just("commit"), NAMES, NAMES, st.one_of(st.just(""), NAMES), LABELS),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("update"), NAMES, LABELS, st.lists(st.sampled_from(["labels", "labels.x", "nothing"]))),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(STEPS, max_size=30))
def test_whatever_is_asked_the_book_says_what_the_index_says(steps: list[tuple[object, ...]], tmp_path: Path) -> None:
    database = Database.create(str(tmp_path / "state.db"))
    with database.transaction() as db:
        db.execute("DELETE FROM snapshots")
        shelf = Shelf(db)
        for what, *words in steps:
            try:
                if what == "create":
                    key, parent, kind, labels = words
                    info = Info(str(key), str(parent), kind, 1, 1, without_empty(labels))  # type: ignore[arg-type]
                    on = shelf.index.check(info, None)
                    shelf.last += 1
                    entry = shelf.index.enter(Snapshot(shelf.last, info, None, Form.BIND, False, False), on)
                    row = book.row_of(entry.snapshot, entry.parent_number, entry.usage)
                    shelf.write(book.Rows(insert=row))
                else:
                    getattr(shelf, str(what))(*words)  # as commit(key, name, parent, labels)
            except SnapshotError:
                pass
            shelf.check_book()
    database.close()
