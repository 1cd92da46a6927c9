"""Leaks made for real: found with who holds them, taken off without touching a file, and none where none is."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flatmount.kernel.mounts import read_table
from flatmount.kernel.process import owned_name
from flatmount.observe.leak_results import Found, Kind
from flatmount.observe.leaks import clean, find_leaks
from flatmount.observe.owners import Owner
from flatmount.report.leaks import as_data, render_leaks

COUNT = 50


@contextmanager
def process_in_a_copy() -> Iterator[int]:
    """A process in a private copy of this mount namespace."""
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", "echo there; exec sleep 60"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            yield holder.pid
        finally:
            holder.kill()


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
    finally:
        os.close(busy)
    refused = [one for one in cleaned if one.refused]
    assert [one.leak.where for one in refused] == [str(points[0])]
    assert "EBUSY" in refused[0].refused
    assert len([e for e in read_table() if "ovl-idmapped" in e.mount_point and str(ram) in e.mount_point]) == 1
    assert (ram / "layer" / "file").read_text() == "kept"
    assert all(point.is_dir() for point in points)
    assert as_data(found, cleaned)["cleaned"]


def test_copies_that_only_another_namespace_has_are_named_and_left(ram: Path) -> None:
    points = leak(ram, 3)
    with process_in_a_copy() as pid:
        for point in points:
            subprocess.run(["umount", point], check=True)
        found = find_leaks(apart_s=0.1)
        mine = [one for one in found.leaks if one.where.startswith(f"{ram}/")]
        assert [one.here for one in mine] == [False] * 3
        assert all(one.holders[0].pid == pid for one in mine)
        assert clean(mine) == ()
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8") as table:
            assert table.read().count("ovl-idmapped") == 3


def test_an_assembly_under_way_is_no_leak(ram: Path) -> None:
    script = f"cd {ram}; while :; do i=$((i+1)); mkdir ovl-idmapped$i; mount --bind . ovl-idmapped$i; sleep 0.01;"
    script += " umount ovl-idmapped$i; done"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as busy:
        try:
            found = find_leaks(apart_s=0.3)
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


def test_a_namespace_nobody_is_in(ram: Path) -> None:
    pin = ram / "pin"
    pin.touch()
    subprocess.run(["mount", "--make-private", ram], check=True)
    with process_in_a_copy() as pid:
        subprocess.run(["mount", "--bind", f"/proc/{pid}/ns/mnt", pin], check=True)
        assert not [one for one in find_leaks(apart_s=0).leaks if one.where == str(pin)]
    (one,) = [one for one in find_leaks(apart_s=0).leaks if one.where == str(pin)]
    assert one.kind is Kind.NAMESPACE
    assert clean([one]) == ()


def test_a_clean_table_has_none(ram: Path) -> None:
    assert of(ram, find_leaks(apart_s=0)) == []
