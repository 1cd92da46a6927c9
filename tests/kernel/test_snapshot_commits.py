"""Commits of the snapshot service on a disk that fails, and of mapped containers beside other commands."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError, StoreError
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.snapshotter import trees
from flatmount.snapshotter.model import Form, Kind, SnapshotExists, Usage
from flatmount.snapshotter.ranges import Ranges
from flatmount.snapshotter.snapshots import Snapshots
from flatmount.store import Store
from flatmount.store.disk import Disk
from tests.snapshotting import kept_trees

RANGE = {f"containerd.io/snapshot/{kind}mapping": "0:500000:65536" for kind in ("uid", "gid")}


@asynccontextmanager
async def served(root: Path, facts: HostFacts) -> AsyncIterator[Snapshots]:
    Store.open(str(root), create=True).close()
    disk = Disk.open(str(root), create=False)
    try:
        snapshots = Snapshots(disk, str(root.parent / "run"), facts, Form.OVERLAY)
        await snapshots.start()
        try:
            yield snapshots
        finally:
            await snapshots.close()
    finally:
        disk.close()


async def clear(snapshots: Snapshots) -> None:
    for info in reversed(await snapshots.list([])):
        await snapshots.remove(info.name)
    await snapshots.cleanup()


def test_a_write_that_failed_is_told_to_every_commit_that_it_concerns(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [errno.EIO]

    def sync(fd: int) -> None:
        if failing:  # as the kernel does, which tells each open file once
            raise OSError(failing.pop(), "Input/output error")

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "a", "", {})
            await snapshots.create(Kind.ACTIVE, "b", "", {})
            with pytest.raises(StoreError, match="Input/output error"):
                await snapshots.commit("layer-a", "a", "", {})
            for key in ("a", "b"):
                with pytest.raises(StoreError, match="may not have reached the disk"):
                    await snapshots.commit(f"layer-{key}", key, "", {})
            await snapshots.create(Kind.ACTIVE, "c", "", {})
            await snapshots.commit("layer-c", "c", "", {})
            await clear(snapshots)

    monkeypatch.setattr(trees, "sync_filesystem", sync)
    asyncio.run(play())


def test_a_flat_tree_is_not_taken_whose_writing_may_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.open(str(tmp_path), create=True).close()
    disk = Disk.open(str(tmp_path), create=False)
    try:
        own = trees.Trees(disk)
        os.makedirs(f"{disk.data}/snapshots/1/fs/directory")

        def flatten(fd: int, sources: tuple[str, ...], target: str, *, root_source: int) -> None:
            os.mkdir(target, dir_fd=fd)
            with pytest.raises(StoreError), monkeypatch.context() as patch:  # a commit beside it gets the error
                patch.setattr(trees, "sync_filesystem", lambda fd: os.close(-1))
                own.sync()

        monkeypatch.setattr(trees, "flatten", flatten)
        with pytest.raises(StoreError, match="failed meanwhile"):
            own.flatten(1, ("snapshots/1/fs",))
        assert os.listdir(f"{disk.data}/snapshots/1") == ["fs"]
    finally:
        disk.close()


def test_a_mapped_commit_survives_another_command_and_leaves_nothing_when_it_fails(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    measure = trees.Trees.measure

    def measured(self: trees.Trees, path: str) -> Usage:
        Store.open(str(root)).close()  # what any other command does first, and sweeps
        return measure(self, path)

    async def play() -> None:
        async with served(root, facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "base", "", {})
            await snapshots.commit("image", "base", "", {})
            await snapshots.create(Kind.ACTIVE, "one", "image", RANGE)
            data = root / "v1/data"
            (mount,) = [await snapshots.mounts("one")]
            (upper,) = [Path(word[9:]) for word in mount.options if word.startswith("upperdir=")]
            (upper / "file").write_text("content")
            os.chown(upper / "file", 500007, 500007)
            before = kept_trees(data / "snapshots")
            with pytest.raises(SnapshotExists):
                await snapshots.commit("image", "one", "", {})
            assert kept_trees(data / "snapshots") == before
            assert not os.listdir(data / "staging")
            assert not os.listdir(data / "trash")
            await snapshots.commit("changed", "one", "", {})
            (copy,) = kept_trees(data / "snapshots") - before
            status = (data / f"snapshots/{copy}/fs/file").stat()
            assert (status.st_uid, status.st_gid) == (7, 7)
            await snapshots.cleanup()
            assert (data / f"snapshots/{copy}/fs/file").read_text() == "content"
            await clear(snapshots)

    monkeypatch.setattr(trees.Trees, "measure", measured)
    asyncio.run(play())


def test_of_a_burst_in_one_range_one_attaches_its_tree(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    acquire = Ranges.acquire

    def acquiring(self: Ranges, number: int, mapping: Mapping) -> str:
        asked.append(number)
        return acquire(self, number, mapping)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "base", "", {})
            await snapshots.commit("image", "base", "", {})
            keys = [f"c-{number}" for number in range(40)]
            mounts = await asyncio.gather(*(snapshots.create(Kind.ACTIVE, key, "image", RANGE) for key in keys))
            (lower,) = {word for mount in mounts for word in mount.options if word.startswith("lowerdir=")}
            assert "/run/ranges/" in lower
            assert len(asked) == 1
            assert snapshots.ranges.attached == 1
            # All of them are counted: the tree goes with the last.
            await asyncio.gather(*(snapshots.remove(key) for key in keys[1:]))
            assert snapshots.ranges.attached == 1
            await snapshots.remove(keys[0])
            assert snapshots.ranges.attached == 0
            await clear(snapshots)

    monkeypatch.setattr(Ranges, "acquire", acquiring)
    asyncio.run(play())


def test_a_tree_that_cannot_be_attached_is_told_to_all_who_wait_for_it_and_tried_again(
    tmp_path: Path, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [True]
    asked: list[int] = []
    attach = Ranges._attach

    def attaching(self: Ranges, mapping: Mapping, path: str) -> None:
        asked.append(1)
        if refused[0]:
            raise FlatmountError("no user namespace")
        attach(self, mapping, path)

    async def play() -> None:
        async with served(tmp_path / "store", facts) as snapshots:
            await snapshots.create(Kind.ACTIVE, "base", "", {})
            await snapshots.commit("image", "base", "", {})
            keys = [f"c-{number}" for number in range(20)]
            creating = (snapshots.create(Kind.ACTIVE, key, "image", RANGE) for key in keys)
            results = await asyncio.gather(*creating, return_exceptions=True)
            assert {str(result) for result in results} == {"no user namespace"}
            assert len(asked) < 5, "not once for each of them"
            refused[0] = False
            mounts = await asyncio.gather(*(snapshots.mounts(key) for key in keys))
            assert len({word for mount in mounts for word in mount.options if word.startswith("lowerdir=")}) == 1
            assert snapshots.ranges.attached == 1
            await clear(snapshots)
            assert snapshots.ranges.attached == 0

    monkeypatch.setattr(Ranges, "_attach", attaching)
    asyncio.run(play())
