"""No blocks and no inodes, at every step that writes: one line, nothing by half, and it works when there is room again.

Each step is tried with a little more room each time, from none at all on: so it meets its end at its beginning, within,
and at its last transaction.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images import directory, file, layout_of

from flatmount.cli.main import main
from flatmount.config import Config, Registry
from flatmount.errors import FlatmountError
from flatmount.image.registry import open_registry
from flatmount.image.registry_auth import Keychain
from flatmount.image.registry_reference import Reference
from flatmount.store import Store
from tests.fake_registry import FakeRegistry, serve

CHOICE = random.Random(5)
NODES = [
    [node for i in range(300) for node in (directory(f"a{i}"), file(f"a{i}/f", CHOICE.randbytes(3_000)))],
    [directory("b"), *(file(f"b/{i}", CHOICE.randbytes(20_000)) for i in range(30))],
]
SMALL = [[file("small", "x")]]
ROOM_BYTES = (0, 64 << 10, 400 << 10, 900 << 10, 1500 << 10)
ROOM_INODES = (0, 5, 40, 290, 320, 610)


class Disk:
    """A small file system, of which a filler takes all but what it is told to leave."""

    def __init__(self, place: Path, limit: str) -> None:
        self.place = place
        self.limit = limit
        self.root = str(place / "store")
        self._filler = place / "filler"

    def leave(self, room: int) -> None:
        """So much is left: bytes, or inodes."""
        self._filler.mkdir()
        if self.limit == "inodes":
            for number in range(max(0, os.statvfs(self.place).f_ffree - room)):
                (self._filler / str(number)).touch()
            return
        status = os.statvfs(self.place)
        wanted = status.f_bavail * status.f_frsize - room
        with open(self._filler / "blocks", "wb", buffering=0) as filler:
            while wanted > 0:
                try:
                    wanted -= filler.write(bytes(min(wanted, 1 << 16)))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break
            os.fsync(filler.fileno())

    def give_back(self) -> None:
        """All of it."""
        shutil.rmtree(self._filler)
        os.sync()


@pytest.fixture(params=["tmpfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["blocks", "inodes"])
def disk(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    if kind == "tmpfs":
        options = f"size=24m,nr_inodes={1500 if request.param == 'inodes' else 4000},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "disk", place], check=True)
    else:
        image = tmp_path / "disk.img"
        with image.open("xb") as out:
            out.truncate(24 << 20)
        inodes = "1536" if request.param == "inodes" else "4096"
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-N", inodes, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield Disk(place, str(request.param))
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("layouts")
    return {"large": layout_of(str(place / "large"), NODES), "small": layout_of(str(place / "small"), SMALL)}


@pytest.fixture(scope="module")
def registry(layouts: dict[str, str]) -> Iterator[FakeRegistry]:
    """The layout `large`, as `app:large`."""
    made = FakeRegistry()
    for path in Path(layouts["large"], "blobs/sha256").iterdir():
        made.blobs[f"sha256:{path.name}"] = path.read_bytes()
    descriptor = json.loads(Path(layouts["large"], "index.json").read_text())["manifests"][0]
    made.put_manifest(made.blobs[descriptor["digest"]], "large")
    with serve(made) as running:
        yield running


def run(*arguments: str) -> None:
    """A command that prints one line when it fails; that line is raised."""
    code = main([*arguments])
    assert code == 0, code


def snapshot(root: str) -> object:
    with Store.open(root) as store:
        return (
            [(image.name, image.digest, tuple(layer.path for layer in image.layers)) for image in store.images()],
            sorted(os.listdir(os.path.join(store.data, "flat"))),
        )


def pull(root: str, registry: FakeRegistry) -> None:
    config = Config(registries={registry.host: Registry(plain_http=True)})
    reference = Reference.parse(f"{registry.host}/app:large")
    with Store.open(root) as store:
        image = open_registry(reference, config, keychain=Keychain({"HOME": "/nonexistent"}))
        try:
            store.import_from(image, name="large")
        finally:
            image.close()


def imported(root: str, layout: str, name: str) -> None:
    with Store.open(root, create=True) as store:
        store.import_image(layout, name=name)


def flattened(root: str) -> None:
    with Store.open(root) as store:
        store.ensure_flat(store.image("large"))


def spoiled(root: str) -> None:
    with Store.open(root) as store:
        path = Path(store.data, store.image("large").layers[0].path, "a3/f")
    times = path.stat()
    path.write_bytes(bytes(3_000))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


STEPS = ("pull", "unpack", "store import", "flatten", "export", "repair")


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_finds_no_room(
    step: str,
    disk: Disk,
    layouts: dict[str, str],
    registry: FakeRegistry,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, out = disk.root, disk.place / "out"
    monkeypatch.setenv("FLATMOUNT_RUN", str(disk.place.parent / "run"))
    imported(root, layouts["small"], "small")
    if step in ("flatten", "export", "repair"):
        imported(root, layouts["large"], "large")
    if step == "repair":
        spoiled(root)
    unpack = ("image", "import", layouts["large"], "--name", "large", "--flatten", "first-use", "--root", root)
    acts: dict[str, Callable[[], object]] = {
        "pull": lambda: pull(root, registry),
        "unpack": lambda: run(*unpack),
        "store import": lambda: run("store", "import", layouts["large"], "--root", root),
        "flatten": lambda: flattened(root),
        "export": lambda: run("image", "export", "large", str(out), "--root", root),
        "repair": lambda: run("fsck", "--repair", "--source", layouts["large"], "--root", root),
    }
    before, refused = snapshot(root), 0
    for room in ROOM_INODES if disk.limit == "inodes" else ROOM_BYTES:
        disk.leave(room)
        capsys.readouterr()
        failed = attempt(acts[step], capsys)
        # What is there can be looked at, also on the full disk.
        assert main(["image", "list", "--root", root]) == 0
        disk.give_back()
        if failed is None:
            break
        refused += 1
        assert "\n" not in failed.strip()
        assert "free space" in failed, failed
        assert snapshot(root) == before
        assert not out.exists()
        assert sorted(path.name for path in disk.place.iterdir() if path.name != "lost+found") == ["store"]
        with Store.open(root) as store:
            found = store.check().findings
            assert [finding.subject for finding in found] == (["data/layers/2"] if step == "repair" else [])
            assert store.broken_pulls() == ()
    # Directories and links take so few blocks that those of the reserve are enough.
    assert refused or (step, disk.limit) == ("flatten", "blocks")
    if failed is not None:
        acts[step]()
    with Store.open(root) as store:
        assert store.check().findings == ()


def attempt(act: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The line that a person gets, or None where it worked."""
    try:
        act()
    except FlatmountError as error:
        return error.line()
    except AssertionError:
        said = capsys.readouterr()
        lines = [line for line in (said.err + said.out).splitlines() if "free space" in line]
        return lines[0] if len(lines) == 1 else said.err + said.out
    return None


def test_a_full_disk_is_emptied(disk: Disk, layouts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Removal and collection need no room of their own."""
    monkeypatch.setenv("FLATMOUNT_RUN", str(disk.place.parent / "run"))
    imported(disk.root, layouts["large"], "large")
    flattened(disk.root)
    imported(disk.root, layouts["small"], "small")
    imported(disk.root, layouts["small"], "large")
    disk.leave(0)
    run("gc", "--yes", "--root", disk.root)
    run("image", "remove", "small", "--root", disk.root)
    disk.give_back()
    with Store.open(disk.root) as store:
        assert [image.name for image in store.images()] == ["large"]
        assert store.unused_images() == ()
        assert store.check().findings == ()
