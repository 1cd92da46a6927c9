"""The snapshot service's index and book on a disk that fails, fills or hangs, or loses power: what callers are told."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flatmount.errors import FlatmountError, StoreError
from flatmount.plan.facts import HostFacts
from flatmount.snapshotter import ahead, book, desk
from flatmount.snapshotter.model import REF_LABEL, Kind, Mount, SnapshotExists, SnapshotNotFound
from flatmount.snapshotter.snapshots import Snapshots
from flatmount.snapshotter.trees import Trees
from flatmount.store import Store
from flatmount.store.database import Database
from flatmount.store.reserve import Reserve
from tests.disks import mounted_disk, new_disk
from tests.kernel.test_snapshot_commits import RANGE, clear, served

WAIT_S = 60


class Faults:
    """What goes wrong from now on. `refused` looks at the text of a write's rows; `gate` is waited at before each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: Callable[[str], bool] = lambda text: False
        self.gate: threading.Event | None = None
        self.writes = 0
        self.log_errors: list[int] = []
        write, fdatasync = Database.write, os.fdatasync

        def writing(
            own: Database, statements: Sequence[str], rows: Sequence[Sequence[book.Row]], *, growing: bool = False
        ) -> None:
            self.writes += 1
            if self.gate is not None:
                self.gate.wait(WAIT_S)
            if self.refused(str(rows)):
                raise StoreError("disk I/O error")
            write(own, statements, rows, growing=growing)

        def syncing(fd: int) -> None:
            if self.log_errors and os.readlink(f"/proc/self/fd/{fd}").endswith("-wal"):
                raise OSError(self.log_errors.pop(), "Input/output error")
            fdatasync(fd)

        def no_committer(*_: object) -> None:
            raise RuntimeError("what it writes is not seen here")

        monkeypatch.setattr(desk, "Committer", no_committer)
        monkeypatch.setattr(Database, "write", writing)
        monkeypatch.setattr(os, "fdatasync", syncing)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


async def names(snapshots: Snapshots) -> list[str]:
    return [info.name for info in await snapshots.list([])]


async def booked(snapshots: Snapshots) -> set[str]:
    return {
        str(row[0]) for row in await snapshots._desk.read(lambda db: list(db.execute("SELECT name FROM snapshots")))
    }


async def soon(what: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


def test_nothing_is_decided_while_the_index_is_read_again(
    tmp_path: Path, facts: HostFacts, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reading, slow = threading.Event(), threading.Event(), [False]
    real = book.with_usage

    def with_usage(db: sqlite3.Connection) -> Any:
        found = list(real(db))
        if slow[0]:
            reading.set()
            gate.wait(WAIT_S)
        return iter(found)

    monkeypatch.setattr(book, "with_usage", with_usage)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "old", "", {})
            faults.refused = lambda text: True
            with pytest.raises(StoreError):
                await snapshots.remove("old")
            faults.refused, slow[0] = (lambda text: False), True
            reader = asyncio.create_task(snapshots.stat("old"))
            await asyncio.to_thread(reading.wait, WAIT_S)
            assert not snapshots.create_soon(Kind.ACTIVE, "new", "", {}, print)
            creating = asyncio.create_task(snapshots.create(Kind.ACTIVE, "new", "", {}))
            await asyncio.sleep(0.1)
            assert not creating.done()
            slow[0] = False
            gate.set()
            assert (await reader).name == "old"
            mount = await creating
            assert set(await names(snapshots)) == await booked(snapshots) == {"old", "new"}
            await snapshots.cleanup()
            assert os.path.isdir(mount.source)
            await clear(snapshots)

    asyncio.run(play())


def test_a_commit_that_the_book_may_have_keeps_its_files(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "key", "", {})
            await snapshots.commit("base", "key", "", {})
            await snapshots.create(Kind.ACTIVE, "container", "base", RANGE)
            entry = snapshots._index.find("container")
            entry.snapshot = entry.snapshot._replace(host_ids=True)

            def sync(own: Database) -> None:
                raise StoreError("write to disk: Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(Database, "sync", sync)
                with pytest.raises(StoreError, match="Input/output error"):
                    await snapshots.commit("top", "container", "", {})
            assert set(await names(snapshots)) == await booked(snapshots) == {"base", "top"}
            await snapshots.cleanup()
            assert os.path.isdir(f"{snapshots._disk.data}/{snapshots._index.find('top').snapshot.fs}")
            await soon(lambda: not snapshots._tasks)
            await clear(snapshots)

    asyncio.run(play())


def test_an_error_that_the_keeper_was_told_is_no_success_for_a_commit(
    tmp_path: Path, facts: HostFacts, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel tells of it once; until the log has been emptied on disk nothing counts as being there."""
    emptied: list[bool] = []
    real = Database._empty_log

    def empty(own: Database) -> None:
        emptied.append(True)
        if len(emptied) == 1:
            raise StoreError("still not")
        real(own)

    monkeypatch.setattr(Database, "_empty_log", empty)
    monkeypatch.setattr(Database, "checkpoint", lambda own: False)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            log = Path(snapshots._disk.base, "state.db-wal")
            await snapshots.create(Kind.ACTIVE, "one", "", {})
            await snapshots.create(Kind.ACTIVE, "two", "", {})
            await asyncio.sleep(1)
            faults.log_errors.append(errno.EIO)
            await snapshots.update("one", {"a": "b"}, ())
            await soon(lambda: not faults.log_errors)
            assert "may undo what was changed last" in caplog.text
            assert "nothing was changed" not in caplog.text
            with pytest.raises(StoreError, match="still not"):
                await snapshots.commit("layer-one", "one", "", {})
            assert log.stat().st_size
            await snapshots.commit("layer-two", "two", "", {})
            assert len(emptied) == 2
            assert log.stat().st_size == 0
            with closing(sqlite3.connect(f"file:{log.with_name('state.db')}?mode=ro&immutable=1", uri=True)) as alone:
                rows = alone.execute("SELECT name FROM snapshots ORDER BY name").fetchall()
            assert rows == [("layer-one",), ("layer-two",)], "it is in the book itself"
            await snapshots.create(Kind.ACTIVE, "three", "", {})
            await snapshots.commit("layer-three", "three", "", {})
            assert len(emptied) == 2
            await clear(snapshots)

    asyncio.run(play())


def test_the_log_that_is_synced_is_the_one_that_is_there(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    first = Database.create(path)
    first.sync()
    inode = os.stat(f"{path}-wal").st_ino
    first._connection.close()  # the last one takes the log away
    assert not os.path.exists(f"{path}-wal")
    first.sync()
    second = Database(path)
    second.next_numbers(1)
    first.sync()
    assert os.fstat(first._log_fd).st_ino == os.stat(f"{path}-wal").st_ino == first._log_inode
    assert inode
    second.close()
    first.close()


def test_what_is_refused_fails_alone(tmp_path: Path, facts: HostFacts, faults: Faults) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            for number in range(5):
                await snapshots.create(Kind.ACTIVE, f"old-{number}", "", {})
            faults.refused = lambda text: "'bad'" in text
            results = await asyncio.gather(
                snapshots.create(Kind.ACTIVE, "bad", "", {}),
                *(snapshots.remove(f"old-{number}") for number in range(5)),
                *(snapshots.create(Kind.ACTIVE, f"new-{number}", "", {}) for number in range(5)),
                return_exceptions=True,
            )
            failed = [place for place, result in enumerate(results) if isinstance(result, BaseException)]
            assert failed == [0], results
            assert all(isinstance(results[place], StoreError) for place in failed)
            assert set(await names(snapshots)) == await booked(snapshots) == {f"new-{number}" for number in range(5)}
            await clear(snapshots)

    asyncio.run(play())


def test_what_waits_behind_a_refused_write_is_tried(tmp_path: Path, facts: HostFacts, faults: Faults) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "gone", "", {})
            faults.gate, faults.refused = threading.Event(), lambda text: "'bad'" in text
            bad = asyncio.create_task(snapshots.create(Kind.ACTIVE, "bad", "", {}))
            await soon(lambda: faults.writes >= 2)
            removing = asyncio.create_task(snapshots.remove("gone"))
            await asyncio.sleep(0)
            faults.gate.set()
            await removing
            with pytest.raises(StoreError):
                await bad
            assert await names(snapshots) == []

    asyncio.run(play())


def test_a_disk_that_does_not_answer_is_not_asked_for_each_change(
    tmp_path: Path, facts: HostFacts, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_TRY_FOR_S", 0.0)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "first", "", {})
            writes, faults.refused = faults.writes, lambda text: True
            results = await asyncio.gather(
                *(snapshots.create(Kind.ACTIVE, f"new-{number}", "", {}) for number in range(10)),
                return_exceptions=True,
            )
            assert all(isinstance(result, StoreError) for result in results)
            assert faults.writes == writes + 1
            faults.refused = lambda text: False
            assert await names(snapshots) == ["first"]

    asyncio.run(play())


def test_one_who_cannot_be_told_keeps_no_other_from_being_told(
    tmp_path: Path, facts: HostFacts, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(result: object) -> None:
        raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            told: list[object] = []
            assert snapshots.create_soon(Kind.ACTIVE, "a", "", {}, broken)
            assert snapshots.create_soon(Kind.ACTIVE, "b", "", {}, told.append)
            await soon(lambda: told)
            assert "cannot be told" in caplog.text
            await asyncio.wait_for(snapshots.remove("a"), WAIT_S)
            await asyncio.wait_for(snapshots.remove("b"), WAIT_S)

    asyncio.run(play())


def test_a_name_that_a_commit_is_about_to_give_is_waited_for(tmp_path: Path, facts: HostFacts, faults: Faults) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            for key in ("one", "two"):
                await snapshots.create(Kind.ACTIVE, key, "", {})
            faults.gate, writes, fails = threading.Event(), faults.writes, [True, False]
            faults.refused = lambda text: fails.pop(0) if fails else False
            first = asyncio.create_task(snapshots.commit("name", "one", "", {}))
            await soon(lambda: faults.writes > writes)
            others = [
                asyncio.create_task(snapshots.commit("name", "two", "", {})),
                asyncio.create_task(snapshots.create(Kind.ACTIVE, "name", "", {})),
            ]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in others)
            faults.gate.set()
            with pytest.raises(StoreError):
                await first
            await others[0]
            with pytest.raises(SnapshotExists):
                await others[1]
            with pytest.raises(SnapshotExists):
                await snapshots.commit("name", "one", "", {})
            assert set(await names(snapshots)) == {"one", "name"}
            await clear(snapshots)

    asyncio.run(play())


def test_a_commit_whose_caller_has_gone_is_entered_or_not_but_never_half(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, syncing, real = threading.Event(), threading.Event(), Database.sync

    def sync(own: Database) -> None:
        syncing.set()
        gate.wait(WAIT_S)
        real(own)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "key", "", {})
            await snapshots._desk.durable()
            monkeypatch.setattr(Database, "sync", sync)
            commit = asyncio.create_task(snapshots.commit("name", "key", "", {}))
            await soon(syncing.is_set)
            commit.cancel()
            with pytest.raises(asyncio.CancelledError):
                await commit
            assert {"key", "name"} <= snapshots._turns.held.keys()
            removing = asyncio.create_task(snapshots.remove("key"))
            await asyncio.sleep(0.05)
            assert not removing.done(), "its key is still held"
            gate.set()
            with pytest.raises(SnapshotNotFound):
                await removing
            assert set(await names(snapshots)) == await booked(snapshots) == {"name"}
            await clear(snapshots)

    asyncio.run(play())


def test_a_commit_is_refused_before_any_work_for_it(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            for key in ("one", "two", "three"):
                await snapshots.create(Kind.ACTIVE, key, "", {REF_LABEL: key})
            await snapshots.commit("name", "one", "", {})
            for method in ("rebase", "measure", "sync"):
                monkeypatch.setattr(Trees, method, lambda *_: pytest.fail("work for nothing"))
            for name, parent in (("name", ""), ("other", "nobody"), ("other", "three")):
                with pytest.raises(FlatmountError):
                    await snapshots.commit(name, "two", parent, {})

    asyncio.run(play())


def test_what_waits_at_the_end_is_written_and_on_disk(
    tmp_path: Path, facts: HostFacts, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_CLOSE_S", WAIT_S)
    synced: list[int] = []
    real = Database.sync

    async def play() -> None:
        told: list[object] = []
        async with served(tmp_path / "store", facts) as snapshots:
            with closing(sqlite3.connect(f"{snapshots._disk.base}/state.db")) as other:
                other.execute("SELECT * FROM snapshots").fetchall()  # so that the last close moves nothing
                await soon(lambda: snapshots._desk._keeper_told is False)
                faults.gate, writes = threading.Event(), faults.writes
                assert snapshots.create_soon(Kind.ACTIVE, "a", "", {}, told.append)
                await soon(lambda: faults.writes > writes)
                assert snapshots.create_soon(Kind.ACTIVE, "b", "", {}, told.append)
                monkeypatch.setattr(Database, "sync", lambda own: (synced.append(faults.writes), real(own))[1])
                monkeypatch.setattr(Database, "checkpoint", lambda own: False)
                threading.Timer(0.1, faults.gate.set).start()
                await snapshots.close()
                assert len(told) == 2
                assert synced[-1:] == [faults.writes], "made sure of after the last write"
                monkeypatch.setattr(snapshots, "close", lambda: asyncio.sleep(0))
        with closing(sqlite3.connect(tmp_path / "store/v1/state.db")) as db:
            assert len(db.execute("SELECT * FROM snapshots").fetchall()) == 2

    asyncio.run(play())


def test_a_wedged_disk_holds_the_end_up_for_half_a_second(
    tmp_path: Path, facts: HostFacts, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_CLOSE_S", 0.05)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            faults.gate, writes = threading.Event(), faults.writes
            assert snapshots.create_soon(Kind.ACTIVE, "a", "", {}, print)
            await soon(lambda: faults.writes > writes)
            threads = snapshots._desk._threads
        assert threads[0].is_alive(), "it is left"
        faults.gate.set()
        for thread in threads:
            await asyncio.to_thread(thread.join, WAIT_S)
            assert not thread.is_alive()

    asyncio.run(play())


@pytest.mark.parametrize("mapping", [{}, RANGE])
def test_what_the_committer_is_refused_is_tried_one_by_one(
    tmp_path: Path, facts: HostFacts, mapping: dict[str, str]
) -> None:
    """Its directories are there already then."""

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            assert snapshots._desk._committer is not None
            await snapshots.create(Kind.ACTIVE, "key", "", {})
            await snapshots.commit("base", "key", "", {})
            await snapshots.create(Kind.ACTIVE, "first", "base", mapping)
            with closing(sqlite3.connect(f"{snapshots._disk.base}/state.db")) as other, other:
                other.execute(
                    "INSERT INTO snapshots (number, name, kind, created_ns, updated_ns, labels, form, host_ids,"
                    " remapped) VALUES (1000000, 'bad', 3, 1, 1, '{}', 'overlay', 0, 0)"
                )
            snapshots._ahead._ready.clear()
            wanted = [f"new-{number}" for number in range(5)]
            results = await asyncio.gather(
                *(snapshots.create(Kind.ACTIVE, key, "base", mapping) for key in ("bad", *wanted)),
                snapshots.remove("first"),
                return_exceptions=True,
            )
            failed = [result for result in results if isinstance(result, BaseException)]
            assert len(failed) == 1, results
            assert "UNIQUE" in str(failed[0])
            assert set(await names(snapshots)) == {"base", "bad", *wanted}
            for key in wanted:
                assert os.path.isdir(f"{snapshots._disk.data}/{snapshots._index.find(key).snapshot.work}")
            await clear(snapshots)

    asyncio.run(play())


def test_what_a_power_cut_took_of_a_fresh_snapshot_is_made_again(tmp_path: Path, facts: HostFacts) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            data = Path(snapshots._disk.data)
            await snapshots.create(Kind.ACTIVE, "key", "", {})
            root = data / snapshots._index.find("key").snapshot.fs
            root.chmod(0o1777)
            os.chown(root, 7, 8)
            await snapshots.commit("base", "key", "", {})
            for key in ("bare", "used", "filled", "gone"):
                await snapshots.create(Kind.ACTIVE, key, "base", {})
            await snapshots.create(Kind.ACTIVE, "layer", "", {REF_LABEL: "content"})
            found = {entry.snapshot.info.name: entry.snapshot for entry in snapshots._index}
        for key in ("bare", "used"):  # as they were made ahead
            (data / found[key].fs).chmod(0o755)
            os.chown(data / found[key].fs, 0, 0)
        (data / found["used"].work / "work").mkdir()  # overlayfs was there: it is its container's own
        (data / found["filled"].fs / "file").write_text("content")
        (data / found["filled"].work).rmdir()
        (data / found["gone"].work).rmdir()
        (data / found["gone"].fs).rmdir()
        (data / found["layer"].nothing).rmdir()
        async with served(tmp_path / "store", facts) as snapshots:
            status = {key: (data / found[key].fs).stat() for key in found}
            seen = {key: (one.st_mode & 0o7777, one.st_uid, one.st_gid) for key, one in status.items()}
            assert seen["bare"] == seen["filled"] == seen["gone"] == (0o1777, 7, 8)
            assert seen["used"] == (0o755, 0, 0)
            assert (data / found["filled"].fs / "file").read_text() == "content"
            assert all((data / found[key].work).is_dir() for key in ("bare", "used", "filled", "gone", "layer"))
            assert (data / found["layer"].nothing).is_dir()
            await clear(snapshots)

    asyncio.run(play())


def test_snapshots_are_listed_in_the_order_in_which_they_were_made(tmp_path: Path, facts: HostFacts) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await soon(lambda: snapshots._ahead._ready)
            await snapshots.create(Kind.VIEW, "first", "", {})
            await snapshots.create(Kind.ACTIVE, "second", "", {})
            numbers = [snapshots._index.find(name).snapshot.number for name in ("first", "second")]
            assert numbers[0] > numbers[1], "the other has one whose directories were made ahead"
            assert await names(snapshots) == ["first", "second"]
            read = await snapshots._desk.read(lambda db: list(book.everything(db)))
            assert [snapshot.info.name for snapshot in read] == ["first", "second"]

    asyncio.run(play())


def test_the_log_does_not_grow_while_changes_never_stop(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_LONG_BYTES", 64 << 10)
    monkeypatch.setattr(desk, "_SYNC_AFTER_S", 0.01)
    movers: list[str] = []
    real = Database.checkpoint

    def checkpoint(own: Database) -> bool:
        movers.append(threading.current_thread().name)
        return real(own)

    monkeypatch.setattr(Database, "checkpoint", checkpoint)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            until = time.monotonic() + WAIT_S
            while "book-writer" not in movers:
                assert time.monotonic() < until
                await snapshots.create(Kind.ACTIVE, "key", "", {"label": "x" * 4000})
                await snapshots.remove("key")

    asyncio.run(play())


def test_the_reserve_comes_back_without_a_further_change(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_RESERVE_EVERY_S", 0.1)
    low = [True]
    monkeypatch.setattr(Reserve, "is_low", lambda own: low[0])
    monkeypatch.setattr(Reserve, "is_roomy", lambda own: not low[0])

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            kept = Path(snapshots._disk.base, "reserve")
            await snapshots.create(Kind.ACTIVE, "key", "", {})
            await snapshots.remove("key")
            assert not list(kept.iterdir()) if kept.exists() else True
            assert not snapshots._ahead._ready, "nothing is made ahead on such a disk"
            await asyncio.sleep(0.3)
            low[0] = False
            await soon(lambda: kept.exists() and len(os.listdir(kept)) == 4)

    asyncio.run(play())


def test_the_end_comes_while_directories_are_made_ahead(
    tmp_path: Path, facts: HostFacts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "READY", 20_000)

    async def play() -> None:
        unseen: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
        async with served(tmp_path / "store", facts) as snapshots:
            await soon(lambda: snapshots._ahead._making)
            assert len(snapshots._ahead._ready) < 4096
        await asyncio.sleep(0.2)
        assert unseen == []
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.cleanup()
            assert await names(snapshots) == []

    asyncio.run(play())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_directories_are_made_ahead_while_calls_never_stop(tmp_path: Path, facts: HostFacts) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await soon(lambda: len(snapshots._ahead._ready) == ahead.READY)
            last = snapshots._ahead.last
            for number in range(ahead.READY):
                await snapshots.create(Kind.ACTIVE, f"key-{number}", "", {})
            assert snapshots._ahead.last > last, "more were begun"
            await soon(lambda: len(snapshots._ahead._ready) == ahead.READY)
            held = snapshots._ahead.held() | snapshots._index.numbers()
            assert held <= set(map(int, os.listdir(f"{snapshots._disk.data}/snapshots")))
            await clear(snapshots)

    asyncio.run(play())


def test_what_cannot_be_made_ahead_is_told_and_not_tried_at_every_call(
    tmp_path: Path, facts: HostFacts, caplog: pytest.LogCaptureFixture
) -> None:
    told = "no directories are made ahead"

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await soon(lambda: len(snapshots._ahead._ready) == ahead.READY)
            data, begun = Path(snapshots._disk.data), snapshots._ahead.last
            (data / f"snapshots/{begun + 3}").mkdir()
            for number in range(ahead.READY):
                await snapshots.create(Kind.ACTIVE, f"key-{number}", "", {})
            await soon(lambda: told in caplog.text and not snapshots._ahead._making)
            for number in range(20):
                await snapshots.create(Kind.ACTIVE, f"more-{number}", "", {})
            assert caplog.text.count(told) == 1
            await clear(snapshots)
            assert set(map(int, os.listdir(data / "snapshots"))) == snapshots._ahead.held()

    asyncio.run(play())


@pytest.mark.timeout(120)
def test_a_full_ext4_of_a_gigabyte_is_emptied(tmp_path: Path, facts: HostFacts) -> None:
    """Of what it calls free 16 MiB are nobody's, so that it never says that it is full."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    new_disk(image, 1 << 30)

    async def play() -> None:
        async with served(place / "store", facts) as snapshots:
            for number in range(60):
                await snapshots.create(Kind.ACTIVE, f"old-{number}", "", {"label": "x" * 3000})
            await asyncio.sleep(1.2)
            snapshots._ahead.close()
            fill(place / "filler")
            found = os.statvfs(place)
            assert found.f_bfree * found.f_frsize > 4 << 20, "which root would be given, were it there"
            refused = 0
            for number in range(300):
                try:
                    await snapshots.create(Kind.ACTIVE, f"new-{number}", "", {"label": "x" * 3000})
                except StoreError as error:
                    assert "free space" in error.line() or "No space" in error.line(), error.line()
                    refused += 1
                    break
            assert refused
            for name in await names(snapshots):
                await snapshots.remove(name)
            await snapshots.cleanup()
        fill(place / "filler-again")
        async with served(place / "store", facts) as snapshots:
            assert await names(snapshots) == []
        # So does what any other command writes.
        path, reserve = str(place / "store/v1/state.db"), Reserve(str(place / "store/v1"))
        for filler in place.glob("filler*"):
            filler.unlink()
        book_of_store = Database(path, reserve=reserve)
        with book_of_store.transaction(growing=True) as db:
            db.executemany("INSERT INTO documents VALUES (?, ?)", [(f"{n}", bytes(1000)) for n in range(1000)])
        book_of_store.close()
        assert reserve.keep()
        fill(place / "filler-again")
        assert reserve.is_low()
        book_of_store = Database(path, reserve=reserve)
        with book_of_store.transaction() as db:
            db.execute("DELETE FROM documents WHERE rowid <= 50")
        book_of_store.close()

    def fill(path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        at = 0
        try:
            for step in (64 << 20, 1 << 20, 4096):
                with pytest.raises(OSError, match="No space"):
                    while True:
                        os.posix_fallocate(fd, at, step)
                        at += step
        finally:
            os.close(fd)

    with mounted_disk(image, place):
        Store.open(str(place / "store"), create=True).close()
        asyncio.run(play())
        subprocess.run(["sync", "-f", place], check=True)


class Kept(dict[str, Mount]):
    """Answers that somebody else gives."""

    def keep(self, key: str, mount: Mount) -> None:
        self[key] = mount

    def forget(self, *keys: str) -> None:
        for key in keys or tuple(self):
            self.pop(key, None)


@pytest.mark.parametrize("mapping", [{}, RANGE])
def test_an_answer_is_kept_for_as_long_as_it_is_right(
    tmp_path: Path, facts: HostFacts, faults: Faults, mapping: dict[str, str]
) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            kept = Kept()
            snapshots.keep_answers(kept)
            await snapshots.create(Kind.ACTIVE, "layer", "", {})
            assert kept.keys() == {"layer"}
            faults.gate = threading.Event()
            committing = asyncio.create_task(snapshots.commit("base", "layer", "", {}))
            await soon(lambda: faults.writes >= 2)
            assert kept == {}, "nobody is told of it while it is committed"
            faults.gate.set()
            await committing
            with pytest.raises(SnapshotNotFound):
                await snapshots.mounts("layer")
            with pytest.raises(FlatmountError):
                await snapshots.mounts("base")
            assert kept == {}
            for key in ("one", "two"):
                mount = await snapshots.create(Kind.ACTIVE, key, "base", mapping)
                if key in kept:  # the first of a range has it attached, and is answered after that
                    assert kept[key] == mount
                assert await snapshots.mounts(key) == kept[key] == mount
            assert kept.keys() == {"one", "two"}
            with pytest.raises(FlatmountError):
                await snapshots.remove("base")
            with pytest.raises(SnapshotExists):
                await snapshots.create(Kind.ACTIVE, "one", "base", mapping)
            assert kept.keys() == {"one", "two"}
            faults.gate, writes = threading.Event(), faults.writes
            removing = asyncio.create_task(snapshots.remove("one"))
            await soon(lambda: faults.writes > writes)
            assert kept.keys() == {"two"}
            faults.gate.set()
            await removing
            faults.refused = lambda text: True
            with pytest.raises(StoreError):
                await snapshots.remove("two")
            assert kept == {}
            faults.refused = lambda text: False
            assert await snapshots.mounts("two") == kept["two"]
            faults.refused = lambda text: "'bad'" in text
            with pytest.raises(StoreError):
                await snapshots.create(Kind.ACTIVE, "bad", "base", {})
            assert kept == {}, "nothing is believed after a refusal"
            snapshots.keep_answers(None)
            await snapshots.mounts("two")
            await clear(snapshots)
            assert kept == {}

    asyncio.run(play())
