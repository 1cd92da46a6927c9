"""Containers for tests: a small image in a store, and proof that nothing of any container is left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.kernel.mounts import read_table
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.runtime import cgroups
from flatmount.store import Store
from tests.e2e.conftest import CommandLine
from tests.tiny_image import write_tiny_image

POOL = "1048576:67108864"
PREFIX = f"t{os.getpid()}-"
ATTACHMENTS = ("private", "host")


@pytest.fixture(scope="session")
def tiny_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = tmp_path_factory.mktemp("tiny") / "layout"
    write_tiny_image(str(layout), layers=5)
    return layout


@pytest.fixture(scope="session")
def tiny_store(tiny_layout: Path) -> Path:
    if shutil.which("runc") is None:
        pytest.fail("there is no runc: tools/setup installs it")
    root = tiny_layout.parent / "root"
    with Store.open(str(root), create=True) as store:
        # Flat beforehand: a first start would say that the tree is not ready, beside the one line that a test is about.
        store.ensure_flat(store.import_image(str(tiny_layout), name="tiny"))
    return root


def left_by(line: CommandLine) -> list[str]:
    """What containers left: directories, uppers, control groups, and words in the book."""
    found: list[str] = []
    for place in ("containers", "runtime", "tmp"):
        directory = line.run_directory / place
        found += [f"{directory}/{name}" for name in os.listdir(directory)] if directory.exists() else []
    found += [f"upper {name}" for name in os.listdir(line.root / "v1/data/uppers")]
    found += [path for parent in cgroups._parents() if os.path.isdir(parent) for path in subgroups(parent)]
    with Store.open(str(line.root)) as store:
        found += [f"lease {one.holder}" for one in store.holders()]
        found += [f"range {holder}" for holder in store.ranges.holders()]
    return found


def subgroups(parent: str) -> list[str]:
    return [entry.path for entry in os.scandir(parent) if entry.is_dir() and entry.name.startswith(PREFIX)]


@pytest.fixture
def line(tiny_store: Path) -> Iterator[CommandLine]:
    """The command line on the tiny image; afterwards nothing of any container may be left."""
    enter_private_mounts()
    before = {entry.mount_point for entry in read_table()}
    # Not below pytest's own directory, which lets nobody else through: a container's root walks to its bundle.
    place = Path(tempfile.mkdtemp(prefix="flatmount-test-"))
    place.chmod(0o711)
    line = CommandLine(tiny_store, place / "run", {"FLATMOUNT_POOL": POOL})
    yield line
    for record in line.json("ps", "--all")["containers"]:
        line("remove", "--force", record["id"])
    assert not left_by(line)
    assert not {entry.mount_point for entry in read_table()} - before
    shutil.rmtree(place)


def new_name() -> str:
    return PREFIX + os.urandom(4).hex()
