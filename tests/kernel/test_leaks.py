"""Leaks made for real: found with who holds them, taken off without touching a file, and none where none is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from flatmount.kernel.mounts import read_table
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.kernel.process import owned_name
from flatmount.observe.leak_results import Found, Kind
from flatmount.observe.leaks import LAYER_WORK_S, clean, find_leaks
from flatmount.observe.owners import Owner
from flatmount.report.leaks import as_data, render_leaks
from tests.waiting import until_named

COUNT = 50


@contextmanager
def process_in_a_copy(*options: str) -> Iterator[int]:
    """A process in a private copy of this mount namespace."""
    with subprocess.Popen(
        ["unshare", "-m", *options, "sh", "-c", "echo there; exec sleep 60"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            if "--pid" not in options:
                until_named(holder.pid, "sleep")
            yield holder.pid
        finally:
            holder.kill()


@contextmanager
def on_one_processor() -> Iterator[None]:
    """This thread, and what it starts, on one processor."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def busy_in(pid: int, point: Path) -> Iterator[None]:
    """Another process in that one's mount namespace, with a file below `point` open."""
    command = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "sh", "-c", f"exec 3<{point}/file; echo there; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as busy:
        assert busy.stdout
        busy.stdout.readline()
        try:
            yield
        finally:
            busy.kill()


def members_of(pid: int) -> set[int]:
    namespace = os.readlink(f"/proc/{pid}/ns/mnt")
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{name}/ns/mnt") == namespace:
                found.add(int(name))
    return found


def own_mounts() -> set[str]:
    return {entry.mount_point for entry in read_table()}


def leak(ram: Path, count: int = COUNT) -> list[Path]:
    """Bind mounts as containerd's temporary ones, over a layer with a file in it."""
    layer = ram / "layer"
    layer.mkdir()
    (layer / "file").write_text("kept")
    points = [ram / f"ovl-idmapped{1000 + i}" for i in range(count)]
    for point in points:
        point.mkdir()
        subprocess.run(["mount", "--bind", layer, point], check=True)
    return points


def of(ram: Path, found: Found) -> list[str]:
    return sorted(leak.where for leak in found.leaks if leak.where.startswith(f"{ram}/"))


def test_leaks_are_found_with_their_owner_and_taken_off_and_no_file_goes(ram: Path) -> None:
    points = leak(ram)
    busy = os.open(points[0] / "file", os.O_RDONLY)
    try:
        with process_in_a_copy() as pid:
            found = find_leaks(apart_s=0.1)
            assert of(ram, found) == sorted(map(str, points))
            mine = [one for one in found.leaks if one.where.startswith(f"{ram}/")]
            assert {(one.kind, one.owner, one.here) for one in mine} == {(Kind.TEMPORARY, Owner.CONTAINERD, True)}
            assert all(pid in [holder.pid for holder in one.holders] for one in mine)
            assert f"held by the mount namespace of sleep [{pid}]" in render_leaks(found, None, may_clean=True)
            cleaned = clean(mine)
            assert mounts_of(pid) == 0
    finally:
        os.close(busy)
    refused = [one for one in cleaned if one.refused]
    assert [one.leak.where for one in refused] == [str(points[0])]
    assert "EBUSY" in refused[0].refused
    assert len([e for e in read_table() if "ovl-idmapped" in e.mount_point and str(ram) in e.mount_point]) == 1
    assert (ram / "layer" / "file").read_text() == "kept"
    assert all(point.is_dir() for point in points)
    assert as_data(found, cleaned)["cleaned"]


def mounts_of(pid: int) -> int:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8") as table:
        return table.read().count("ovl-idmapped")


def test_fifty_that_only_a_foreign_namespace_holds_are_taken_off_in_there_and_no_file_goes(ram: Path) -> None:
    points = leak(ram)
    with process_in_a_copy() as pid, busy_in(pid, points[7]):
        for point in points:
            subprocess.run(["umount", point], check=True)
        found = find_leaks(apart_s=0.1)
        mine = [one for one in found.leaks if one.where.startswith(f"{ram}/")]
        assert [one.here for one in mine] == [False] * COUNT
        assert all(one.holders[0].pid in members_of(pid) for one in mine)
        assert f"and {COUNT} in 1 other mount namespace" in render_leaks(Found(tuple(mine), ()), None, may_clean=True)
        assert mounts_of(pid) == COUNT, "looking takes nothing off"
        others = own_mounts()
        cleaned = clean(mine)
        assert mounts_of(pid) == 1
        assert own_mounts() == others
    refused = [one for one in cleaned if one.refused]
    assert [one.leak.where for one in refused] == [str(points[7])]
    assert "EBUSY" in refused[0].refused
    assert len(cleaned) == COUNT and {one.namespace for one in cleaned} == {mine[0].copies[0].namespace}
    assert (ram / "layer" / "file").read_text() == "kept"
    assert "in 1 other mount namespace" in render_leaks(found, cleaned, may_clean=True)


def test_here_and_in_a_copy_both_go(ram: Path) -> None:
    points = leak(ram, 3)
    with process_in_a_copy() as pid:
        found = find_leaks(apart_s=0.1)
        mine = [one for one in found.leaks if one.where.startswith(f"{ram}/")]
        assert all(one.here and len(one.copies) == 1 for one in mine)
        assert [one.refused for one in clean(mine)] == [""] * 6
        assert mounts_of(pid) == 0
    assert not [entry for entry in read_table() if entry.mount_point in map(str, points)]
    assert (ram / "layer" / "file").read_text() == "kept"


def test_what_is_locked_in_a_namespace_with_fewer_rights_is_left_and_said(ram: Path) -> None:
    points = leak(ram, 2)
    with process_in_a_copy("--user", "--map-root-user") as pid:
        for point in points:
            subprocess.run(["umount", point], check=True)
        found = find_leaks(apart_s=0.1)
        cleaned = clean(one for one in found.leaks if one.where.startswith(f"{ram}/"))
        assert {one.refused for one in cleaned} == {"it is locked in that namespace, and goes with the processes there"}
        assert mounts_of(pid) == 2


def test_something_else_on_top_in_the_foreign_namespace_stays(ram: Path) -> None:
    (point,) = leak(ram, 1)
    with process_in_a_copy() as pid:
        subprocess.run(["umount", point], check=True)
        found = find_leaks(apart_s=0.1)
        subprocess.run(["nsenter", f"--mount=/proc/{pid}/ns/mnt", "mount", "-t", "tmpfs", "new", point], check=True)
        (refused,) = clean(one for one in found.leaks if one.where == str(point))
        assert "something else is mounted there" in refused.refused
        assert mounts_of(pid) == 2


def test_a_namespace_whose_process_is_another_one_now_is_not_entered(ram: Path) -> None:
    (point,) = leak(ram, 1)
    with process_in_a_copy() as pid:
        subprocess.run(["umount", point], check=True)
        (found,) = [one for one in find_leaks(apart_s=0.1).leaks if one.where == str(point)]
        moved = replace(found, copies=(replace(found.copies[0], pid=os.getpid()),))
        (refused,) = clean([moved])
        assert "look again" in refused.refused
        assert mounts_of(pid) == 1


def test_an_assembly_under_way_is_no_leak(ram: Path) -> None:
    script = f"cd {ram}; while :; do i=$((i+1)); mkdir ovl-idmapped$i; mount --bind . ovl-idmapped$i; sleep 0.01;"
    script += " umount ovl-idmapped$i; done"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as busy:
        try:
            found = find_leaks(apart_s=2)
        finally:
            os.killpg(busy.pid, signal.SIGKILL)
    assert of(ram, found) == []


def test_a_mount_that_came_after_the_look_is_left(ram: Path) -> None:
    (point,) = leak(ram, 1)
    found = find_leaks(apart_s=0.1)
    subprocess.run(["mount", "-t", "tmpfs", "new", point], check=True)
    (refused,) = clean(one for one in found.leaks if one.where == str(point))
    assert "something else is mounted there" in refused.refused


def test_what_a_killed_command_of_ours_left(ram: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as gone:
        name = owned_name("storm").replace(f"{os.getpid()}-", f"{gone.pid}-")
        gone.kill()
    place = ram / "work" / name
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "left", place], check=True)
    found = find_leaks(apart_s=0.1)
    assert [one.kind for one in found.leaks if one.where == str(place)] == [Kind.UNFINISHED]


def test_where_containerd_works_on_a_layer_is_named_after_minutes_and_never_taken_off(ram: Path) -> None:
    layer, point = ram / "layer", ram / "containerd-mount42"
    layer.mkdir()
    point.mkdir()
    subprocess.run(["mount", "--bind", layer, point], check=True)
    assert of(ram, find_leaks(apart_s=0)) == []
    subprocess.run(["umount", point], check=True)
    os.utime(point, (0, time.time() - LAYER_WORK_S - 1))
    subprocess.run(["mount", "--bind", layer, point], check=True)
    found = find_leaks(apart_s=0)
    (one,) = [one for one in found.leaks if one.where == str(point)]
    assert (one.kind, one.owner, one.here, one.removable) == (Kind.LAYER_WORK, Owner.CONTAINERD, True, 0)
    with process_in_a_copy():
        (copied,) = [one for one in find_leaks(apart_s=0.1).leaks if one.where == str(point)]
        assert copied.copies and clean([one, copied]) == ()
    assert str(point) in own_mounts()
    said = render_leaks(Found((one,), ()), (), may_clean=True)
    assert "restart it" in said and "taken off: 0" in said


def test_a_pid_of_another_pid_namespace_says_nothing(ram: Path) -> None:
    place = ram / "work" / f"storm.{2**22 + 1}-1"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "left", place], check=True)
    with process_in_a_copy() as _, process_in_a_copy("--pid", "--kill-child") as _:
        subprocess.run(["umount", place], check=True)
        found = find_leaks(apart_s=0.1)
    (one,) = [one for one in found.leaks if one.where == str(place)]
    assert (one.kind, len(one.copies)) == (Kind.UNFINISHED, 1)
    assert any(what.endswith("where processes have other pids: 1") for what in found.unseen)


def test_a_namespace_nobody_is_in(ram: Path) -> None:
    pin = ram / "pin"
    pin.touch()
    # Only a namespace with a greater number than the caller's may be bound to a file (EINVAL, against loops), and each
    # processor has numbers of its own to give away (Linux 6.18, cookie.h): both are made on one.
    with on_one_processor():
        enter_private_mounts()
        stack = ExitStack()
        pid = stack.enter_context(process_in_a_copy())
    with stack:
        subprocess.run(["mount", "--bind", f"/proc/{pid}/ns/mnt", pin], check=True)
        assert not [one for one in find_leaks(apart_s=0).leaks if one.where == str(pin)]
    (one,) = [one for one in find_leaks(apart_s=0).leaks if one.where == str(pin)]
    assert one.kind is Kind.NAMESPACE
    assert clean([one]) == ()


def test_a_clean_table_has_none(ram: Path) -> None:
    assert of(ram, find_leaks(apart_s=0)) == []
