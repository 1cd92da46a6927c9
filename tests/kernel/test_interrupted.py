"""An interrupt right behind a commit: what the book has by then is not undone."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from images import file, layout_of

from flatmount.image import open_source
from flatmount.store import FlatForm, Store
from flatmount.store.database import Database

LAYERS = [[file("a", "content")], [file("b")]]
_transaction = Database.transaction


@contextmanager
def interrupted(self: Database, *, growing: bool = False) -> Iterator[sqlite3.Connection]:
    """Control-C when COMMIT has returned; new numbers are had before."""
    with _transaction(self, growing=growing) as db:
        yield db
    if not growing:
        raise KeyboardInterrupt


@pytest.fixture
def source(tmp_path: Path) -> str:
    return layout_of(str(tmp_path / "layout"), LAYERS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store"), create=True) as opened:
        yield opened


def test_an_import_that_is_in_the_book_stays(store: Store, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Database, "transaction", interrupted)
        store.import_image(source, name="web")
    assert len(store.image("web").layers) == 2
    assert store.check().findings == ()


@pytest.mark.parametrize("form", list(FlatForm))
def test_a_flat_tree_that_is_in_the_book_stays(
    store: Store, source: str, monkeypatch: pytest.MonkeyPatch, form: FlatForm
) -> None:
    image = store.import_image(source, name="web")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Database, "transaction", interrupted)
        store.ensure_flat(image, form)
    tree = store.flat_tree(image, form)
    assert tree is not None and os.path.exists(os.path.join(store.data, tree))
    assert store.check().findings == ()


def test_a_repair_that_is_in_the_book_stays(store: Store, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = store.import_image(source, name="web")
    Path(store.data, image.layers[0].path, "a").write_text("changed")
    findings = store.check().findings
    again = open_source(source)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Database, "transaction", interrupted)
            store.repair(findings, [again])
    finally:
        again.close()
    with Store.open(store.root) as later:  # which sweeps the bad layer
        assert Path(later.data, later.image("web").layers[0].path, "a").read_text() == "content"
        assert later.check().findings == ()


def test_without_the_book_an_undoing_deletes_nothing(store: Store) -> None:
    number = store._database.next_numbers(1)[0]
    assert store._database.unbooked("layers", [number]) == (number,)
    store._database._connection.execute("ALTER TABLE layers RENAME TO elsewhere")
    assert store._database.unbooked("layers", [number]) == ()
