"""SIGKILL and power cuts at random moments: what was said to be stored is there, and nothing is there by half."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import Node, directory, file, hardlink, layout_of, symlink
from trees import facts

from flatmount.errors import FlatmountError
from flatmount.store import Store
from tests.conftest import SOAK

KILLS = 500 if SOAK else 50
POWER_CUTS = 50 if SOAK else 5
EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2

Tree = dict[str, dict[str, object]]


def layer(tag: str, count: int) -> list[Node]:
    nodes = [directory(tag), *(file(f"{tag}/{i}", f"{tag} {i}\n" * (1 + i * 20), uid=i % 5) for i in range(count))]
    return [*nodes, hardlink(f"{tag}/same", f"{tag}/1"), symlink(f"{tag}/link", "1"), file("shared", tag)]


LAYERS = {
    "base": layer("base", 30),
    "middle": [*layer("middle", 20), file("base/.wh.2"), file("base/3", "another")],
    "top": [*layer("top", 25), directory("base"), file("base/.wh..wh..opq"), file("base/new")],
    "other": layer("other", 40),
    "linked": [file("x"), hardlink("y", "base/5")],
}
IMAGES = {
    "one": ("base", "middle", "top"),
    "two": ("base", "middle", "linked"),
    "three": ("base", "other"),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("layouts")
    return {name: layout_of(str(place / name), [LAYERS[part] for part in parts]) for name, parts in IMAGES.items()}


@pytest.fixture(scope="module")
def trees(layouts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tree]:
    """What the image's flat trees look like where nobody kills anybody."""
    found = {}
    for name, path in layouts.items():
        with Store.open(str(tmp_path_factory.mktemp("calm") / "store"), create=True) as store:
            found[name] = flat_facts(store, name, path)
    return found


def flat_facts(store: Store, name: str, path: str | None = None) -> Tree:
    image = store.import_image(path, name=name) if path else store.image(name)
    tree = facts(os.path.join(store.data, store.ensure_flat(image)))
    del tree["."]
    return tree


def work(root: str, layouts: dict[str, str], seed: int, pipe: int) -> None:
    """Operations without end; what begins and what is done is told, before and after it."""
    chance = random.Random(seed)
    with Store.open(root, create=True) as store:
        while True:
            verb, name = chance.choice(["import", "import", "flatten", "remove", "collect"]), chance.choice([*IMAGES])
            os.write(pipe, f"begin {verb} {name}\n".encode())
            try:
                if verb == "import":
                    store.import_image(layouts[name], name=name)
                elif verb == "flatten":
                    store.ensure_flat(store.image(name))
                elif verb == "remove":
                    store.remove_image(name)
                else:
                    # The name goes to another image, so that this one has none and is collected.
                    other = chance.choice([*IMAGES])
                    os.write(pipe, f"begin move {name} {other}\n".encode())
                    store.import_image(layouts[other], name=name)
                    os.write(pipe, f"done move {name} {other}\n".encode())
                    store.collect()
            except FlatmountError as error:
                if "no image" not in str(error):
                    os.write(pipe, f"failed {error}\n".encode())
                    return
            os.write(pipe, f"done {verb} {name}\n".encode())


def start(root: str, layouts: dict[str, str], seed: int) -> tuple[int, int]:
    """A child that works, and the reading end of what it tells."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            work(root, layouts, seed, writing)
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def told_by(pid: int, reading: int) -> list[str]:
    """End the child and return its lines."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(reading, encoding="utf-8") as pipe:
        return pipe.read().splitlines()


def possible(before: dict[str, str], lines: list[str]) -> list[dict[str, str]]:
    """Which image each name may have now: every operation that was done counts, the last one may or may not."""
    state, after = dict(before), dict(before)
    for line in lines:
        when, verb, name, *more = line.split()
        if when == "begin":
            after = dict(state)
            if verb in ("import", "move"):
                after[name] = (more or [name])[0]
            elif verb == "remove":
                after.pop(name, None)
        else:
            state = dict(after)
    return [state, after]


def assert_whole(
    root: str, layouts: dict[str, str], trees: dict[str, Tree], states: list[dict[str, str]]
) -> dict[str, str]:
    with Store.open(root, create=True) as store:
        checked = store.check()
        assert checked.findings == ()
        digests = {manifest_digest(path): name for name, path in layouts.items()}
        now = {image.name: digests[image.digest] for image in store.images() if image.name is not None}
        assert now in states
        for name, image in now.items():
            assert flat_facts(store, name) == trees[image]
        assert store.check().findings == ()
    return now


def manifest_digest(layout: str) -> str:
    return str(json.loads(Path(layout, "index.json").read_text())["manifests"][0]["digest"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_kill_loses_nothing_and_leaves_nothing_by_half(
    ram: Path, layouts: dict[str, str], trees: dict[str, Tree], seed: int
) -> None:
    chance = random.Random(seed)
    root, now, interrupted = str(ram / "store"), dict[str, str](), 0
    for _ in range(KILLS):
        pid, reading = start(root, layouts, chance.randrange(1 << 30))
        time.sleep(0.005 + chance.random() * 0.12)
        lines = told_by(pid, reading)
        assert not [line for line in lines if line.startswith("failed")]
        interrupted += bool(lines) and lines[-1].startswith("begin")
        now = assert_whole(root, layouts, trees, possible(now, lines))
    print(f"{KILLS} kills, {interrupted} of them within an operation")
    assert interrupted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 in a file, not mounted yet."""
    image = tmp_path / "disk.img"
    with image.open("wb") as out:
        out.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    yield image
    image.unlink()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_power_cut_loses_nothing_that_was_stored(
    disk: Path, tmp_path: Path, layouts: dict[str, str], trees: dict[str, Tree], seed: int
) -> None:
    """FS_IOC_SHUTDOWN stops the file system as a power cut does: what is only in memory never reaches the disk."""
    chance = random.Random(seed)
    place, now, stored = tmp_path / "mnt", dict[str, str](), 0
    place.mkdir()
    for _ in range(POWER_CUTS):
        mount_disk(disk, place)
        try:
            pid, reading = start(str(place / "store"), layouts, chance.randrange(1 << 30))
            time.sleep(0.3 + chance.random() * 1.5)
            cut_power(place)
            lines = [line for line in told_by(pid, reading) if not line.startswith("failed")]
        finally:
            subprocess.run(["umount", place], check=True)
        mount_disk(disk, place)
        try:
            now = assert_whole(str(place / "store"), layouts, trees, possible(now, lines))
        finally:
            subprocess.run(["umount", place], check=True)
        stored += sum(line.startswith("done") for line in lines)
    print(f"{POWER_CUTS} power cuts, {stored} operations done before them")
    assert stored


def mount_disk(image: Path, place: Path) -> None:
    subprocess.run(["mount", "-o", "loop", image, place], check=True)


def cut_power(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, "little"))
    finally:
        os.close(fd)
