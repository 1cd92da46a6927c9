"""The mount table from both sources, the kernel's events for known work, and following its changes."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from own_namespace import (
    MNT_DETACH,
    MS_BIND,
    MS_MOVE,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
    attach,
    detached_clone,
    in_own_namespace,
    mount,
    umount,
)

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel import mounts
from flatmount.kernel.mounts import EventCounts, MountAttributes, MountEvents, TableSource
from tests.waiting import until

needs_statmount = pytest.mark.skipif(
    mounts.table_source() is not TableSource.STATMOUNT, reason="this kernel has no complete statmount (6.13)"
)
BOTH = [pytest.param(TableSource.STATMOUNT, marks=needs_statmount), TableSource.MOUNTINFO]
PRIVATE = ["unshare", "--mount", "--propagation", "private"]


@pytest.fixture
def dirs(tmp_path: Path) -> list[str]:
    """Ten empty directories, named with what mountinfo escapes."""
    made = [tmp_path / f"a b\t{i}\\n\u00e9\n#\r" for i in range(10)]
    for path in made:
        path.mkdir()
    return [str(path) for path in made]


@pytest.fixture
def needs_events() -> None:
    try:
        MountEvents().close()
    except MissingFeature as missing:
        pytest.skip(missing.line())


def by_mount_point(table: tuple[mounts.MountEntry, ...]) -> dict[str, mounts.MountEntry]:
    return {entry.mount_point: entry for entry in table}


@needs_statmount
@in_own_namespace
def test_both_sources_give_the_same_entries(dirs: list[str]) -> None:
    mount("so urce", dirs[0], "tmpfs", options="size=1m,mode=700")
    os.mkdir(f"{dirs[0]}/sub dir")
    mount(f"{dirs[0]}/sub dir", dirs[1], flags=MS_BIND)
    mount("ro", dirs[2], "tmpfs", flags=1 | 2 | 4 | 8 | 1024 | 2048)
    mount("strict", dirs[3], "tmpfs", flags=1 << 24)
    mount("none", dirs[0], flags=MS_SHARED)
    mount(dirs[0], dirs[4], flags=MS_BIND)
    mount("none", dirs[4], flags=MS_SLAVE)
    mount("none", dirs[4], flags=MS_SHARED)
    mount("none", dirs[2], flags=MS_UNBINDABLE)

    statmount = mounts.read_table(source=TableSource.STATMOUNT)
    mountinfo = mounts.read_table(source=TableSource.MOUNTINFO)

    without = [dataclasses.replace(entry, unique_id=None, parent_unique_id=None) for entry in statmount]
    assert sorted(mountinfo, key=lambda e: e.id) == sorted(without, key=lambda e: e.id)
    at = by_mount_point(statmount)
    assert (at[dirs[0]].source, at[dirs[0]].fs_type, at[dirs[0]].root) == ("so urce", "tmpfs", "/")
    assert at[dirs[0]].options == "size=1024k,mode=700"
    assert at[dirs[1]].root == "/sub dir"
    assert at[dirs[1]].device == at[dirs[0]].device
    assert at[dirs[2]].attributes == (
        MountAttributes.READ_ONLY
        | MountAttributes.NO_SUID
        | MountAttributes.NO_DEV
        | MountAttributes.NO_EXEC
        | MountAttributes.NO_ATIME
        | MountAttributes.NO_DIR_ATIME
    )
    assert at[dirs[3]].attributes == MountAttributes.STRICT_ATIME
    assert [at[d].propagation for d in dirs[:5]] == [
        "shared",
        "private",
        "unbindable",
        "private",
        "slave,shared",
    ]
    assert at[dirs[4]].master == at[dirs[0]].peer_group != at[dirs[4]].peer_group
    unique = {entry.id: entry.unique_id for entry in statmount}
    assert at[dirs[1]].parent_unique_id == unique[at[dirs[1]].parent_id]


@pytest.mark.parametrize("source", BOTH)
@in_own_namespace
def test_count_and_ids_grow_by_what_was_attached(source: TableSource, dirs: list[str]) -> None:
    before, ids = mounts.mount_count(source=source), mounts.mount_ids(source=source)
    for path in dirs:
        mount("t", path, "tmpfs")
    assert mounts.mount_count(source=source) == before + len(dirs)
    assert len(set(mounts.mount_ids(source=source)) - set(ids)) == len(dirs)
    assert len(mounts.read_table(source=source)) == before + len(dirs)


@needs_statmount
@in_own_namespace
def test_a_table_longer_than_one_listing_is_complete(dirs: list[str]) -> None:
    before = mounts.mount_count()
    mount("t", dirs[0], "tmpfs")
    os.mkdir(f"{dirs[0]}/m")
    for _ in range(1200):
        mount(f"{dirs[0]}/m", f"{dirs[0]}/m", flags=MS_BIND)
    assert mounts.mount_count() == len(mounts.mount_ids()) == before + 1201
    entries = mounts.read_table()
    assert len({entry.unique_id for entry in entries}) == before + 1201
    umount(dirs[0], MNT_DETACH)
    assert mounts.mount_count() == before


@needs_statmount
def test_another_namespace_by_descriptor_and_by_process(tmp_path: Path) -> None:
    script = f"mount -t tmpfs elsewhere {tmp_path} && echo ready && read line"
    with subprocess.Popen([*PRIVATE, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert str(tmp_path) not in by_mount_point(mounts.read_table())
        namespace = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
        try:
            tables = [
                mounts.read_table(namespace_fd=namespace),
                mounts.read_table(pid=process.pid),
                mounts.read_table(pid=process.pid, source=TableSource.MOUNTINFO),
            ]
            assert [by_mount_point(table)[str(tmp_path)].source for table in tables] == ["elsewhere"] * 3
            count = mounts.mount_count(namespace_fd=namespace)
            assert count == mounts.mount_count(pid=process.pid) == mounts.mount_count() + 1
        finally:
            os.close(namespace)
        process.communicate(b"\n", timeout=10)


def test_a_process_that_is_gone_and_a_wrong_descriptor_are_one_line(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(FlatmountError, match=f"/proc/{gone.pid}"):
        mounts.read_table(pid=gone.pid)
    with pytest.raises(FlatmountError, match=f"/proc/{gone.pid}"):
        mounts.mount_count(pid=gone.pid, source=TableSource.MOUNTINFO)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(MissingFeature, match="descriptor"):
            mounts.mount_count(namespace_fd=directory)
        with pytest.raises(MissingFeature, match="mount events"):
            MountEvents(directory)
    finally:
        os.close(directory)


@pytest.mark.usefixtures("needs_events")
@in_own_namespace
def test_events_of_a_hundred_binds_and_their_unmounts_are_exact(dirs: list[str]) -> None:
    with MountEvents() as events:
        assert events.counts() == EventCounts(0, 0)
        for _ in range(10):
            for path in dirs:
                mount(dirs[0], path, flags=MS_BIND)
        assert events.counts() == EventCounts(100, 0)
        for _ in range(10):
            for path in dirs:
                umount(path)
        assert events.counts() == EventCounts(100, 100)
        assert events.counts() == EventCounts(100, 100)


@pytest.mark.usefixtures("needs_events")
@in_own_namespace
def test_a_detached_tree_counts_when_it_is_attached(dirs: list[str]) -> None:
    with MountEvents() as events:
        trees = [detached_clone(dirs[0]) for _ in range(5)]
        os.close(trees.pop())
        assert events.counts() == EventCounts(0, 0)
        for tree, path in zip(trees, dirs, strict=False):
            attach(tree, path)
            os.close(tree)
        assert events.counts() == EventCounts(4, 0)
        for path in dirs[:4]:
            umount(path, MNT_DETACH)
        assert events.counts() == EventCounts(4, 4)


@pytest.mark.usefixtures("needs_events")
@in_own_namespace
def test_a_moved_mount_counts_on_both_sides(dirs: list[str]) -> None:
    mount("t", dirs[0], "tmpfs")
    with MountEvents() as events:
        mount(dirs[0], dirs[1], flags=MS_MOVE)
        assert events.counts() == EventCounts(1, 1)


@pytest.mark.usefixtures("needs_events")
@in_own_namespace
def test_events_of_another_namespace_are_not_counted(dirs: list[str]) -> None:
    with MountEvents() as events:
        subprocess.run([*PRIVATE, "mount", "-t", "tmpfs", "t", dirs[0]], check=True)
        assert events.counts() == EventCounts(0, 0)


@in_own_namespace
def test_following_the_table_counts_its_changes(dirs: list[str]) -> None:
    before = mounts.mount_count()
    stop_read, stop_write = os.pipe()
    mountinfo = os.open("/proc/thread-self/mountinfo", os.O_RDONLY)
    followed: list[mounts.FollowedTable] = []
    reader = threading.Thread(target=lambda: followed.append(mounts.follow_mountinfo(mountinfo, stop_read)))
    reader.start()

    def read_bytes() -> int:
        return int(Path(f"/proc/self/task/{reader.native_id}/io").read_text().split()[1])

    try:
        for path in dirs:
            due = read_bytes() + len(Path("/proc/thread-self/mountinfo").read_bytes())
            mount("t", path, "tmpfs")
            until(lambda due=due: read_bytes() >= due)
    finally:
        os.close(stop_write)
        reader.join(60)
        os.close(mountinfo)
        os.close(stop_read)
    (result,) = followed
    assert 1 <= result.rereads <= len(dirs)
    assert before * result.rereads < result.entries <= (before + len(dirs)) * result.rereads
    assert result.bytes > 20 * result.entries


def test_a_process_dies_with_its_parent() -> None:
    child = (
        "import os, time; from flatmount.kernel.mounts import die_with_parent; "
        "die_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        try:
            process.kill()
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(60_000), "the child outlived its parent"
        finally:
            os.close(pidfd)


def test_a_process_whose_parent_is_gone_already_dies_at_once() -> None:
    code = "import os; from flatmount.kernel.mounts import die_with_parent; die_with_parent(os.getpid())"
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == -signal.SIGKILL
