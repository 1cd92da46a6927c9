"""The snapshot service where something was refused or has failed: nothing is lost by what comes after that."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from flatmount.errors import StoreError
from flatmount.plan.facts import HostFacts
from flatmount.snapshotter import ahead, trees
from flatmount.snapshotter.model import REF_LABEL, Kind
from flatmount.snapshotter.trees import Trees, Upper
from flatmount.store.database import SCHEMA
from tests.kernel.test_snapshot_commits import clear, served
from tests.kernel.test_snapshot_desk import Faults, Kept, booked, faults, names, soon

__all__ = ["faults"]


def test_a_cleanup_beside_a_refused_removal_keeps_the_files(tmp_path: Path, facts: HostFacts, faults: Faults) -> None:
    """What is out of memory and not out of the book is a snapshot still."""

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "layer", "", {})
            await snapshots.commit("base", "layer", "", {})
            files = f"{snapshots._disk.data}/{snapshots._index.find('base').snapshot.fs}"
            faults.gate, writes = threading.Event(), faults.writes
            faults.refused = lambda text: text != "([], [], [])"
            removing = asyncio.create_task(snapshots.remove("base"))
            await soon(lambda: faults.writes > writes)
            cleaning = asyncio.create_task(snapshots.cleanup())
            await asyncio.sleep(0.1)
            faults.gate.set()
            with pytest.raises(StoreError):
                await removing
            await cleaning
            assert await booked(snapshots) == {"base"}
            assert os.path.isdir(files)
            faults.refused = lambda text: False
            await clear(snapshots)
            assert not os.path.exists(files)

    asyncio.run(play())


def test_a_newer_store_is_written_by_nobody(tmp_path: Path, facts: HostFacts) -> None:
    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "old", "", {})
            book = os.path.join(snapshots._disk.base, "state.db")
        with closing(sqlite3.connect(book)) as db:
            db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
        async with served(tmp_path / "store", facts) as snapshots:
            for work in snapshots.update("old", {"a": "b"}, ()), snapshots.remove("old"):
                with pytest.raises(StoreError, match="newer"):
                    await work
            assert await names(snapshots) == ["old"]
            assert (await snapshots.stat("old")).labels == {}

    asyncio.run(play())


def test_a_look_at_the_disk_that_fails_keeps_nobody_waiting(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roots that are known may be forgotten by the writer's thread this moment."""

    def entries(own: Trees, uppers: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            monkeypatch.setattr(Trees, "entries", entries)
            await asyncio.wait_for(snapshots.create(Kind.ACTIVE, "key", "", {}), 5)
            await asyncio.wait_for(snapshots.remove("key"), 5)

    asyncio.run(play())


def test_what_was_made_ahead_of_a_failed_write_is_given_to_nobody(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directories may be what is lost, and a commit on them would be told that all is well."""
    failing = [errno.EIO]

    def sync(fd: int) -> None:
        if failing:
            raise OSError(failing.pop(), "Input/output error")

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "a", "", {})
            await soon(lambda: len(snapshots._ahead._ready) == ahead.READY)
            made = snapshots._ahead.held()
            with pytest.raises(StoreError, match="Input/output error"):
                await snapshots.commit("layer-a", "a", "", {})
            await snapshots.create(Kind.ACTIVE, "b", "", {})
            assert snapshots._index.find("b").snapshot.number not in made
            await snapshots.commit("layer-b", "b", "", {})
            await clear(snapshots)

    monkeypatch.setattr(trees, "sync_filesystem", sync)
    asyncio.run(play())


def test_a_number_that_was_noted_is_not_forgotten_for_a_lower_one(tmp_path: Path, facts: HostFacts) -> None:
    """A copy's, by a worker, while the event loop hands over a batch with a higher one: `lost` is taken from it."""

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            trees = snapshots._trees
            upper = Upper(2_000_000, "", None, None, made=False, work=True, none=False)
            other = threading.Thread(target=trees.entries, args=([upper],))

            class Slow(int):
                def __gt__(self, value: int) -> bool:
                    other.start()
                    other.join(0.2)
                    return int(self) > value

            trees._make_top(Slow(1_000_000))
            await asyncio.to_thread(other.join)
            assert trees.highest == 2_000_000

    asyncio.run(play())


def test_an_answer_from_before_the_flat_tree_is_given_no_more(tmp_path: Path, facts: HostFacts) -> None:
    """A container that is created while its image is merged, and started later, has one lower as well."""

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            kept = Kept()
            snapshots.keep_answers(kept)
            for name, parent in (("one", ""), ("two", "one")):
                await snapshots.create(Kind.ACTIVE, f"layer-{name}", parent, {REF_LABEL: name})
                await snapshots.commit(name, f"layer-{name}", parent, {})
            merge = asyncio.Event()
            make = snapshots.flattening._make

            async def later(chain: Sequence[int]) -> None:
                await merge.wait()
                await make(chain)

            snapshots.flattening._make = later
            before = await snapshots.create(Kind.ACTIVE, "container", "two", {})
            assert kept["container"] == before
            merge.set()
            await soon(lambda: snapshots.flattening.flats)
            after = kept.get("container") or await snapshots.mounts("container")
            assert any(option.endswith("/flat") for option in after.options), after
            assert kept["container"] == after
            await clear(snapshots)

    asyncio.run(play())


def test_who_keeps_answers_no_more_has_none(tmp_path: Path, facts: HostFacts) -> None:
    """It would not be told of what is forgotten from then on."""

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            first, second = Kept(), Kept()
            snapshots.keep_answers(first)
            await snapshots.create(Kind.ACTIVE, "key", "", {})
            assert first.keys() == {"key"}
            snapshots.keep_answers(second)
            assert first == {}
            await snapshots.mounts("key")
            snapshots.keep_answers(None)
            assert second == {}
            await clear(snapshots)

    asyncio.run(play())
