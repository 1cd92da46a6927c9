"""The template namespace: little in it, nothing that leaks out of it, and the same paths as outside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flatmount.errors import MissingFeature
from flatmount.kernel import _native, namespaces
from flatmount.kernel.executor import run_once
from flatmount.kernel.mounts import mount_count, read_table
from flatmount.kernel.probes import probe
from flatmount.plan.operations import Mount, MountFlag, MountPlan
from flatmount.runtime.template import MOST_MOUNTS, make, mount_point
from tests.waiting import until_named


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


def test_what_is_copied_to_make_it_does_not_grow_with_the_host(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a template nor the probes copy the host's table: what they copy is the kernel's own small namespace."""
    if namespaces.small_source() is None:
        pytest.skip("machine cannot: show the kernel's thread kdevtmpfs")
    (ram / "many").mkdir()
    for number in range(50):
        (ram / "many" / str(number)).mkdir()
        run_once(MountPlan((Mount("x", f"{ram}/many/{number}", "tmpfs"),)))
    copied: list[int] = []
    made = _native.empty_mount_namespace

    def counting(source: int) -> int:
        copied.append(mount_count() if source < 0 else mount_count(namespace_fd=source))
        return made(source)

    monkeypatch.setattr(_native, "empty_mount_namespace", counting)
    monkeypatch.setattr(_native, "unshare_mounts", lambda: pytest.fail("it copies the host's table"))
    make([str(ram)]).namespace.close()
    assert all(feature.available for feature in probe(str(ram)).features if feature.name.startswith("idmapped"))
    assert len(copied) == 2 and max(copied) <= 4 < 50 < mount_count()


def test_without_the_kernels_own_small_namespace_it_is_the_same(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = make([str(ram)])
    monkeypatch.setattr(namespaces, "small_source", lambda: None)
    without = make([str(ram)])
    assert with_it.mounts == without.mounts < MOST_MOUNTS
    assert sorted(inside(without.namespace.fileno(), "ls", "-A", "/").split()) == sorted(os.listdir("/"))
    for template in (with_it, without):
        template.namespace.close()


def test_a_process_that_took_the_name_is_not_the_kernels_thread(ram: Path) -> None:
    (ram / "kdevtmpfs").symlink_to("/bin/sleep")
    with subprocess.Popen([ram / "kdevtmpfs", "100"]) as process:
        try:
            until_named(process.pid, "kdevtmpfs")
            assert namespaces.kernel_thread("kdevtmpfs", [process.pid]) is None
        finally:
            process.kill()
    assert namespaces.kernel_thread("kthreadd", [1, 2]) == 2


def test_a_kernel_that_refuses_is_told_with_the_way_out(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(source: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_native, "empty_mount_namespace", refuses)
    with pytest.raises(MissingFeature) as refusal:
        make([str(ram)])
    assert refusal.value.line().startswith("this kernel does not attach privately: Function not implemented; --attach")
