"""The thread that writes batches without the interpreter."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flatmount.snapshotter._front import Committer
from tests.waiting import until

WRITE = ("DELETE FROM rows WHERE name = ?", "INSERT INTO rows (name, number, other) VALUES (?, ?, ?)")
UPPER = (False, True, False, 0o755, 0, 0)


def new(*names: str) -> list[tuple[str | int | None, ...]]:
    return [(name, 1, None) for name in names]


@dataclass
class Place:
    book: str
    data: int
    path: Path

    def new(self, *, setup: tuple[str, ...] = (), statements: tuple[str, ...] = WRITE) -> Committer:
        return Committer(self.book, self.data, setup, statements)

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
    db.execute("CREATE TABLE rows (name TEXT UNIQUE, number INTEGER, other TEXT)")
    db.close()
    (tmp_path / "snapshots").mkdir()
    data = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield Place(book, data, tmp_path)
    os.close(data)


def wait(committer: Committer) -> str | None:
    assert select.select([committer.fileno()], [], [], 20)[0]
    done, why, ahead, error = committer.take()
    assert (done, ahead, error) == (True, 0, 0)
    assert committer.take() == (False, None, 0, 0)
    return why


def test_directories_and_rows_are_there_when_it_says_so(place: Place) -> None:
    committer = place.new()
    umask = os.umask(0o077)
    try:
        for number in range(50):
            uppers = [(number, False, True, False, 0o1777, 0, 0), (100 + number, False, False, True, 0o755, 0, 0)]
            committer.submit(uppers, ([(f"n{number - 1}",)], new(f"n{number}", f"kept{number}\N{SNOWMAN}")))
            assert wait(committer) is None
    finally:
        os.umask(umask)
    assert committer.close(1000)
    assert place.rows() == sorted([*(f"kept{number}\N{SNOWMAN}" for number in range(50)), "n49"])
    for number in range(50):
        assert sorted(os.listdir(place.path / f"snapshots/{number}")) == ["fs", "work"]
        assert (place.path / f"snapshots/{number}/fs").stat().st_mode & 0o7777 == 0o1777
        assert sorted(os.listdir(place.path / f"snapshots/{100 + number}")) == ["fs", "none"]
        assert (place.path / f"snapshots/{100 + number}/fs").stat().st_mode & 0o7777 == 0o755


def test_values_are_what_they_were(place: Place) -> None:
    committer = place.new()
    values = [("", 0, None), ("\0x", -(1 << 63), "\0"), ("x" * 100_000, (1 << 63) - 1, ""), ("y", True, "\U0001f40b")]
    # Of a batch without a letter as well.
    for rows in values[:1], values[1:]:
        committer.submit([], ([], rows))
        assert wait(committer) is None
    for rows in ([("z", 1 << 63, None)], [("z", 1, "\udcff")], [("z", 1.5, None)], [("z", 1), ("z", 1, None)], ["z"]):
        with pytest.raises((OverflowError, UnicodeEncodeError, TypeError, ValueError)):
            committer.submit([], ([], rows))  # type: ignore[arg-type]
    for short in ((), ([],), ([], [], [])):
        with pytest.raises(ValueError, match="each statement"):
            committer.submit([], short)
    committer.close(1000)
    with sqlite3.connect(place.book) as db:
        assert db.execute("SELECT * FROM rows").fetchall() == values
    db.close()


def test_nothing_of_a_batch_stays_bound(place: Place) -> None:
    committer = place.new()
    for row in ("a", 1, "other" * 1000), ("b", 1):
        committer.submit([], ([], [row]))
        assert wait(committer) is None
    committer.close(1000)
    with sqlite3.connect(place.book) as db:
        assert db.execute("SELECT other FROM rows WHERE name = 'b'").fetchall() == [(None,)]
    db.close()


def test_a_transaction_that_stands_open_is_ended(place: Place) -> None:
    """As where a ROLLBACK had no memory: nobody else could write to the book any more."""
    committer = place.new(setup=("BEGIN IMMEDIATE", "INSERT INTO rows (name) VALUES ('half')"))
    committer.submit([], ([], new("a")))
    assert "within a transaction" in (wait(committer) or "")
    with sqlite3.connect(place.book, timeout=0) as db:
        db.execute("INSERT INTO rows (name) VALUES ('other')")
    db.close()
    committer.submit([], ([], new("a")))
    assert wait(committer) is None
    committer.close(1000)
    assert place.rows() == ["a", "other"]


_WITHOUT_MEMORY = """
#define _GNU_SOURCE
#include <stdio.h>
int asprintf(char **text, const char *format, ...) { return -1; }
int __asprintf_chk(char **text, int flag, const char *format, ...) { return -1; }
"""


def test_what_was_not_written_is_never_taken_for_written(place: Place) -> None:
    """Not even without memory to tell why."""
    library = place.path / "library.so"
    subprocess.run(
        ["cc", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=_WITHOUT_MEMORY, text=True, check=True
    )
    program = f"""
import os, select
import sqlite3
from flatmount.snapshotter._front import Committer
data = os.open({str(place.path)!r}, os.O_RDONLY)
committer = Committer({place.book!r}, data, (), {WRITE!r})
committer.submit([], ([], [("a", 1, None), ("a", 1, None)]))
select.select([committer.fileno()], [], [], 20)
print(committer.take())
try:
    Committer({place.book!r}, data, ("nonsense",), {WRITE!r})
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert told.stdout == "(True, 'no memory', 0, 0)\nno memory\n"
    assert place.rows() == []


def test_what_cannot_be_made_is_told_and_no_row_is_written(place: Place) -> None:
    committer = place.new()
    (place.path / "snapshots/2").mkdir()
    committer.submit([(n, *UPPER) for n in (1, 2, 3)], ([], new("a")))
    assert "File exists" in (wait(committer) or "")
    assert place.rows() == []
    committer.submit([], ([], new("a", "b", "a")))
    assert "UNIQUE" in (wait(committer) or "")
    assert place.rows() == []
    committer.submit([], ([], [("a", 1)]))
    assert wait(committer) is None, "what was bound before is not bound again"
    assert place.rows() == ["a"]
    committer.submit([], ([("a", 1)], []))
    assert "range" in (wait(committer) or "")
    committer.submit([], ([("a",)], new("b")))
    assert wait(committer) is None
    assert place.rows() == ["b"]
    committer.close(1000)


def test_one_batch_at_a_time_and_a_disk_that_does_not_answer_is_left_behind(place: Place) -> None:
    committer = place.new(setup=("PRAGMA busy_timeout = 3000",))
    other = sqlite3.connect(place.book, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    committer.submit([], ([], new("a")))
    with pytest.raises(ValueError, match="another batch"):
        committer.submit([], ([], new("b")))
    committer.ahead([1, 2])
    assert not committer.close(100)
    calls = committer.fileno, committer.take, lambda: committer.submit([], ([], [])), lambda: committer.ahead([3])
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()
    assert committer.close(100), "closing again is nothing"
    other.execute("ROLLBACK")
    other.close()


def made_ahead(committer: Committer, wanted: int) -> int:
    """Waits for so many, or for an errno, which it returns."""
    count = 0
    while count < wanted:
        assert select.select([committer.fileno()], [], [], 20)[0]
        _, why, ahead, error = committer.take()
        assert why is None
        count += ahead
        if error:
            return error
    assert count == wanted
    return 0


def test_directories_are_made_ahead_in_their_order_and_batches_come_first(place: Place) -> None:
    committer = place.new()
    top = place.path / "snapshots"
    committer.ahead([])
    committer.ahead(list(range(1, 400)))
    committer.ahead([400])
    committer.submit([(1000, *UPPER)], ([], new("a")))
    ahead = None
    while ahead is None:
        assert select.select([committer.fileno()], [], [], 20)[0]
        done, why, count, error = committer.take()
        assert (why, error) == (None, 0)
        if done:
            ahead = count
    assert ahead < 400, "the batch did not wait for all of them"
    assert made_ahead(committer, 400 - ahead) == 0
    assert sorted(map(int, os.listdir(top))) == [*range(1, 401), 1000]
    assert {tuple(sorted(os.listdir(top / str(number)))) for number in range(1, 401)} == {("fs", "work")}
    assert (top / "7/fs").stat().st_mode & 0o7777 == 0o755
    (top / "503").mkdir()
    committer.ahead(list(range(501, 600)))
    assert made_ahead(committer, 99) == errno.EEXIST
    assert not (top / "504").exists(), "the others are not made"
    committer.ahead([601])
    assert made_ahead(committer, 1) == 0
    committer.close(1000)


def test_what_is_not_made_ahead_by_the_end_is_not_made(place: Place) -> None:
    committer = place.new()
    committer.ahead(list(range(1, 100_000)))
    assert committer.close(10_000)
    assert len(os.listdir(place.path / "snapshots")) < 99_999


def test_closing_waits_for_what_is_written(place: Place) -> None:
    committer = place.new()
    committer.submit([], ([], new(*map(str, range(20000)))))
    assert committer.close(20_000)
    assert len(place.rows()) == 20000


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"setup": ("nonsense",)}, "syntax"), ({"statements": ("INSERT INTO missing VALUES (1)",)}, "no such table")],
)
def test_what_sqlite_refuses_is_told(changed: dict[str, object], told: str, place: Place) -> None:
    with pytest.raises(RuntimeError, match=told):
        place.new(**changed)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="unable to open"):
        Committer(str(place.path / "none"), place.data, (), ("SELECT 1",))
    with pytest.raises(ValueError, match="too many"):
        place.new(statements=("SELECT 1",) * 9)


def test_signals_are_for_the_interpreters_own_threads(place: Place) -> None:
    """Each one that it can block is: what a system call of its own would end with EINTR."""
    before = set(os.listdir("/proc/self/task"))
    own = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    committer = place.new()
    try:
        (task,) = set(os.listdir("/proc/self/task")) - before
        status = Path(f"/proc/self/task/{task}/status").read_text()
    finally:
        committer.close(1000)
    blocked = int(re.search(r"^SigBlk:\s*(\w+)$", status, re.M)[1], 16)  # type: ignore[index]
    never = {signal.SIGKILL, signal.SIGSTOP}
    assert {number for number in signal.valid_signals() - never if not blocked >> (number - 1) & 1} == set()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == own


def test_nothing_is_left_of_it(place: Place) -> None:
    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = open_now()
    place.new().close(1000)
    until(lambda: open_now() == before)
    for _ in range(5):
        committer = place.new()
        committer.submit([], ([("a",)], new("a")))
        wait(committer)
        committer.close(1000)
        place.new()  # dropped
    until(lambda: open_now() == before)  # a thread that was waited for is listed for a moment more
