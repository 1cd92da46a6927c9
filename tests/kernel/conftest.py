"""Each test gets a private mount namespace and must leave nothing: no mount, descriptor, process or namespace."""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.kernel.mounts import read_table
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.kernel.probes import probe
from flatmount.plan.facts import HostFacts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="real mounts need root"))


def left_over() -> tuple[set[str], set[str]]:
    gc.collect()
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return {entry.mount_point for entry in read_table()}, descriptors


@pytest.fixture(autouse=True)
def own_mounts() -> Iterator[None]:
    """A fresh private namespace; afterwards, what the test left is a failure."""
    enter_private_mounts()
    mounts, descriptors = left_over()
    yield
    mounts_after, descriptors_after = left_over()
    assert not mounts_after - mounts, "mounts left"
    assert not descriptors_after - descriptors, "descriptors left"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of the test's own; a directory on a disk where one is named (before 6.3, a tmpfs takes no ids)."""
    disk = os.environ.get("FLATMOUNT_TEST_DISK")
    if disk:
        with tempfile.TemporaryDirectory(dir=disk) as place:
            yield Path(place)
        return
    directory = tmp_path / "ram"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "ram", directory], check=True)
    yield directory
    subprocess.run(["umount", "-R", directory], check=True)


@pytest.fixture
def data(ram: Path) -> Path:
    """A store's data directory with three layers made by hand, and their flat tree."""
    base = ram / "data"
    for directory in ("layers/1/etc", "layers/2/etc", "layers/3/bin", "flat/1/etc", "flat/1/bin", "uppers"):
        (base / directory).mkdir(parents=True)
    for place in ("layers/1", "flat/1"):
        (base / place / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    for place in ("layers/3", "flat/1"):
        (base / place / "bin/tool").write_text("tool\n")
        os.chown(base / place / "bin/tool", 7, 8)
    (ram / "targets").mkdir()
    (ram / "tmp").mkdir()
    return base


@pytest.fixture
def facts(data: Path) -> HostFacts:
    return probe(str(data)).facts
