"""The template namespace: little in it, nothing that leaks out of it, and the same paths as outside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import mount_count, read_table
from flatmount.plan.operations import Mount, MountFlag, MountPlan
from flatmount.runtime.template import MOST_MOUNTS, make, mount_point


def inside(fd: int, *command: str) -> str:
    call = ["nsenter", f"--mount=/proc/self/fd/{fd}", *command]
    return subprocess.run(call, pass_fds=[fd], capture_output=True, text=True, check=True).stdout


def test_it_holds_little_however_much_the_host_does(ram: Path) -> None:
    (ram / "many").mkdir()
    for number in range(50):
        (ram / "many" / str(number)).mkdir()
        run_once(MountPlan((Mount("x", f"{ram}/many/{number}", "tmpfs"),)))
    template = make([str(ram)])
    assert template.mounts == len(template.paths) + 1 < MOST_MOUNTS
    assert str(ram) in template.paths and not any("many" in path for path in template.paths)
    fd = template.namespace.fileno()
    (ram / "file").write_text("the same\n")
    assert inside(fd, "cat", f"{ram}/file") == "the same\n"
    assert inside(fd, "ls", f"{ram}/many/0") == ""
    template.namespace.close()


def test_nothing_that_is_mounted_in_it_is_seen_outside_a_shared_host(ram: Path) -> None:
    (ram / "place").mkdir()
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    before = mount_count()
    template = make([str(ram)])
    assert mount_count() == before
    fd = template.namespace.fileno()
    inside(fd, "mount", "-t", "tmpfs", "x", f"{ram}/place")
    assert f"{ram}/place" in inside(fd, "cat", "/proc/self/mountinfo")
    assert mount_count() == before
    run_once(MountPlan((Mount("x", f"{ram}/place", "tmpfs"),)))
    assert inside(fd, "cat", "/proc/self/mountinfo").count(f"{ram}/place ") == 1
    subprocess.run(["umount", ram / "place"], check=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    template.namespace.close()


def test_a_user_namespace_may_mount_proc_and_sysfs_in_it(ram: Path) -> None:
    template = make([str(ram)])
    fd = template.namespace.fileno()
    script = "mount -t proc p /proc && mount -t sysfs s /sys && echo fine"
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--net", "--mount", "sh", "-c", script]
    assert inside(fd, *unshare) == "fine\n"
    template.namespace.close()


def test_mount_points_are_found_without_the_table(ram: Path) -> None:
    (ram / "bound").mkdir()
    (ram / "source").mkdir()
    run_once(MountPlan((Mount(str(ram / "source"), str(ram / "bound"), None, MountFlag.BIND),)))
    os.makedirs(ram / "bound/a/b")
    assert mount_point(str(ram / "bound/a/b")) == str(ram / "bound")
    assert mount_point(str(ram / "source")) == str(ram)
    assert mount_point(str(ram / "bound/not/there")) == str(ram / "bound")
    assert mount_point("/") == "/"
    points = {entry.mount_point for entry in read_table()}
    assert all(mount_point(path) in points for path in ("/proc/self/ns", "/dev/null", "/usr/bin", "/sys/kernel"))
