"""The thread that writes batches without the interpreter."""

from __future__ import annotations

import json
import os
import select
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flatmount.snapshotter._front import Committer

SETUP = (
    "CREATE TEMP VIEW v (a, b, c) AS SELECT NULL, NULL, NULL",
    """CREATE TEMP TRIGGER t INSTEAD OF INSERT ON v BEGIN
        INSERT INTO rows SELECT value FROM json_each(NEW.a);
        DELETE FROM rows WHERE name IN (SELECT value FROM json_each(NEW.b));
    END""",
)
WRITE = "INSERT INTO v VALUES (?, ?, ?)"


@dataclass
class Place:
    book: str
    data: int
    path: Path

    def new(self, *, setup: tuple[str, ...] = SETUP, statement: str = WRITE) -> Committer:
        return Committer(self.book, self.data, setup, statement)

    def rows(self) -> list[str]:
        with sqlite3.connect(self.book) as db:
            found = [row[0] for row in db.execute("SELECT name FROM rows ORDER BY name")]
        db.close()
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    book = str(tmp_path / "book")
    db = sqlite3.connect(book)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE rows (name TEXT UNIQUE)")
    db.close()
    (tmp_path / "snapshots").mkdir()
    data = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield Place(book, data, tmp_path)
    os.close(data)


def wait(committer: Committer) -> str | None:
    assert select.select([committer.fileno()], [], [], 20)[0]
    done, why = committer.take()
    assert done
    assert committer.take() == (False, None)
    return why


def test_directories_and_rows_are_there_when_it_says_so(place: Place) -> None:
    committer = place.new()
    umask = os.umask(0o077)
    try:
        for number in range(50):
            uppers = [(number, False, True, False, 0o1777, 0, 0), (100 + number, False, False, True, 0o755, 0, 0)]
            committer.submit(uppers, (json.dumps([f"n{number}", "\N{SNOWMAN}"]), json.dumps(["\N{SNOWMAN}"]), None))
            assert wait(committer) is None
    finally:
        os.umask(umask)
    assert committer.close(1000)
    assert place.rows() == sorted(f"n{number}" for number in range(50))
    for number in range(50):
        assert sorted(os.listdir(place.path / f"snapshots/{number}")) == ["fs", "work"]
        assert (place.path / f"snapshots/{number}/fs").stat().st_mode & 0o7777 == 0o1777
        assert sorted(os.listdir(place.path / f"snapshots/{100 + number}")) == ["fs", "none"]
        assert (place.path / f"snapshots/{100 + number}/fs").stat().st_mode & 0o7777 == 0o755


def test_what_cannot_be_made_is_told_and_no_row_is_written(place: Place) -> None:
    committer = place.new()
    (place.path / "snapshots/2").mkdir()
    committer.submit([(n, False, True, False, 0o755, 0, 0) for n in (1, 2, 3)], ('["a"]', None, None))
    assert "File exists" in (wait(committer) or "")
    assert place.rows() == []
    committer.submit([], ('["a", "a"]', None, None))
    assert "UNIQUE" in (wait(committer) or "")
    assert place.rows() == []
    committer.submit([], ("no JSON", None, None))
    assert "JSON" in (wait(committer) or "")
    committer.submit([], ('["a"]', None, None))
    assert wait(committer) is None
    assert place.rows() == ["a"]
    committer.close(1000)


def test_one_batch_at_a_time_and_a_disk_that_does_not_answer_is_left_behind(place: Place) -> None:
    committer = place.new(setup=("PRAGMA busy_timeout = 3000", *SETUP))
    other = sqlite3.connect(place.book, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    committer.submit([], ('["a"]', None, None))
    with pytest.raises(ValueError, match="another batch"):
        committer.submit([], ('["b"]', None, None))
    assert not committer.close(100)
    for call in (committer.fileno, committer.take, lambda: committer.submit([], (None, None, None))):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert committer.close(100), "closing again is nothing"
    other.execute("ROLLBACK")
    other.close()


def test_closing_waits_for_what_is_written(place: Place) -> None:
    committer = place.new()
    committer.submit([], (json.dumps([str(n) for n in range(20000)]), None, None))
    assert committer.close(20_000)
    assert len(place.rows()) == 20000


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"setup": ("nonsense",)}, "syntax"), ({"statement": "INSERT INTO missing VALUES (1)"}, "no such table")],
)
def test_what_sqlite_refuses_is_told(changed: dict[str, object], told: str, place: Place) -> None:
    with pytest.raises(RuntimeError, match=told):
        place.new(**changed)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="unable to open"):
        Committer(str(place.path / "none"), place.data, (), "SELECT 1")


def test_nothing_is_left_of_it(place: Place) -> None:
    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    place.new().close(1000)
    before = open_now()
    for _ in range(5):
        committer = place.new()
        committer.submit([], ('["a"]', '["a"]', None))
        wait(committer)
        committer.close(1000)
        place.new()  # dropped
    assert open_now() == before
