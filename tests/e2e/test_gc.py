"""`flatmount gc`, `fsck` and `store` as a person runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.image.layer_tar import LayerTar
from flatmount.image.layout_writer import new_layout
from flatmount.kernel.tree import RemovedTree, remove_tree
from flatmount.rootfs import collecting
from flatmount.rootfs.records import Records
from flatmount.store import Store
from tests.e2e.conftest import CommandLine

MAP = "0:300000:65536"


def image(path: Path, *layers: str) -> str:
    """A layout with one file for each layer."""
    with new_layout(str(path), made_by="test") as layout:
        written = []
        for content in layers:
            tar = LayerTar()
            tar.file(f"file-{content}", content.encode() * 1000)
            written.append(layout.add_layer([tar.finish()]))
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        layout.add_image({"architecture": machine, "os": "linux"}, written)
    return str(path)


@pytest.fixture
def own(flatmount: CommandLine, tmp_path: Path) -> Iterator[CommandLine]:
    """A store of the test's own with two images, one of which has lost its name to the other; nobody builds in it."""
    line = CommandLine(tmp_path / "own", flatmount.run_directory)
    for name, layers in (("one", "ab"), ("two", "ac")):
        line("image", "import", image(tmp_path / name, *layers), "--name", "app", "--flatten", "now")
    yield line


def test_a_dry_run_frees_nothing_and_yes_does(own: CommandLine) -> None:
    layers = own.root / "v1/data/layers"
    would = own.json("gc")
    assert (would["done"], would["layers"], len(would["images"])) == (False, 1, 1)
    assert len(os.listdir(layers)) == 3
    assert "--yes does it" in own("gc")
    did = own.json("gc", "--yes")
    assert (did["done"], did["layers"], did["images"]) == (True, 1, would["images"])
    assert len(os.listdir(layers)) == 2
    assert own("gc", "--yes") == "nothing to free\n"
    assert [found["name"] for found in own.json("image", "list")["images"]] == ["app"]
    own("fsck")


def test_what_a_mount_holds_stays(own: CommandLine, target: Path) -> None:
    unnamed = own.json("gc")["images"][0]
    own("mount", unnamed, str(target), "--map", MAP, "--id", "held")
    for _ in range(2):
        assert own.json("gc", "--yes", "--uppers") | {"schema": ""} == {
            "schema": "", "done": True, "layers": 0, "entries": 0, "size_bytes": 0, "images": [], "uppers": [],
            "broken_pulls": [], "stuck": [],
        }  # fmt: skip
    # Without its record, as after the run directory was lost, the mount itself still protects its upper.
    shutil.move(own.run_directory / "mounts/held.json", own.run_directory / "held.json")
    assert own.json("gc", "--uppers")["uppers"] == []
    shutil.move(own.run_directory / "held.json", own.run_directory / "mounts/held.json")
    assert (target / "file-b").read_text() == "b" * 1000
    own("umount", str(target))
    assert own.json("gc", "--yes")["uppers"] == []
    assert own.json("gc", "--yes", "--uppers")["uppers"] == [
        {"name": "held", "why": "kept when its mount was taken off"}
    ]
    assert os.listdir(own.root / "v1/data/uppers") == []


def test_a_kept_upper_that_is_mounted_while_others_are_removed_stays(
    own: CommandLine, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        own("mount", "app", str(target), "--map", MAP, "--id", name)
        own("umount", str(target))

    def meanwhile(parent_fd: int, name: str) -> RemovedTree:
        own("mount", "app", str(target), "--map", MAP, "--id", "two")
        return remove_tree(parent_fd, name)

    monkeypatch.setattr(collecting, "remove_tree", meanwhile)
    records = Records(str(own.run_directory))
    with Store.open(str(own.root)) as store:
        idle = collecting.idle_uppers(store, records)
        assert [upper.name for upper in idle] == ["one", "two"]
        collecting.remove_uppers(store, records, idle)
    assert os.listdir(own.root / "v1/data/uppers") == ["two"]
    own("umount", str(target))
    assert [upper["name"] for upper in own.json("gc", "--yes", "--uppers")["uppers"]] == ["two"]


def test_the_upper_of_a_dead_ephemeral_mount_goes(own: CommandLine, target: Path) -> None:
    own("mount", "app", str(target), "--map", MAP, "--id", "dead", "--ephemeral")
    # A machine that was switched off: neither mount nor record, and the upper still on disk.
    subprocess.run(["umount", target], check=True)
    os.unlink(own.run_directory / "mounts/dead.json")
    freed = own.json("gc", "--yes")
    assert [upper["name"] for upper in freed["uppers"]] == ["dead"]
    assert os.listdir(own.root / "v1/data/uppers") == []


def test_nothing_is_deleted_through_a_mount(own: CommandLine, tmp_path: Path) -> None:
    """A stray tree with something mounted in it: the sentinel on the other side survives every attempt."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "sentinel").write_text("here")
    stray = own.root / "v1/data/layers/900/d"
    stray.mkdir(parents=True)
    (stray.parent / "file").write_text("x")
    subprocess.run(["mount", "--bind", precious, stray], check=True)
    try:
        own("gc", "--yes")
        own("fsck", "--repair", expect=1)
        own("gc", "--yes")
        assert (precious / "sentinel").read_text() == "here"
    finally:
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in (point for point in mounted if point.startswith(str(own.root))):
            subprocess.run(["umount", point], check=True)
    own("fsck")
    assert (precious / "sentinel").read_text() == "here"


def test_a_mount_in_what_is_collected_stops_nothing_else(own: CommandLine, tmp_path: Path) -> None:
    """The unnamed image's own layer has a mount in it; what is behind that stays, the rest goes, and both are told."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "sentinel").write_text("here")
    own("image", "import", image(tmp_path / "three", "x", "y"), "--name", "gone", "--flatten", "now")
    trees = [own.root / "v1/data" / each["path"] for each in own.json("image", "show", "gone")["layer_list"]]
    own("image", "import", str(tmp_path / "one"), "--name", "gone", "--flatten", "first-use")
    (trees[0] / "point").mkdir()
    subprocess.run(["mount", "--bind", precious, trees[0] / "point"], check=True)
    try:
        said = own("gc", "--yes", expect=1)
        assert said.count("\n") == 1
        assert "unmount what is mounted in it" in said
        assert not trees[0].exists()
        assert not trees[1].exists()
        assert (precious / "sentinel").read_text() == "here"
    finally:
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in (point for point in mounted if point.startswith(str(own.root))):
            subprocess.run(["umount", point], check=True)
    own("fsck")
    assert os.listdir(own.root / "v1/data/trash") == []
    assert (precious / "sentinel").read_text() == "here"


def test_no_link_of_the_stores_own_places_is_followed(own: CommandLine, tmp_path: Path) -> None:
    """Each of its directories swapped for a link to something that has the names which are to go."""
    outside = tmp_path / "outside"
    blob = f"sha256-{'1' * 64}"
    for name in ("layers", "flat", "entries", "trash", "partial"):
        place = own.root / "v1" / (name if name in ("entries", "partial") else f"data/{name}")
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        for each in os.listdir(place):
            (outside / each).mkdir()
            (outside / each / "sentinel").write_text("here")
        (outside / "900").mkdir()
        (outside / blob).write_text("here")
        place.rename(tmp_path / "kept")
        place.symlink_to(outside)
        before = sorted(path.name for path in outside.rglob("*"))
        try:
            own.start("gc", "--yes", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(60)
            assert sorted(path.name for path in outside.rglob("*")) == before, name
        finally:
            place.unlink()
            (tmp_path / "kept").rename(place)
    own("gc", "--yes")
    own("fsck")


def test_a_collection_beside_imports_takes_nothing_of_theirs(own: CommandLine, tmp_path: Path) -> None:
    layouts = [image(tmp_path / f"more{count}", f"m{count}", "a") for count in range(3)]
    running = [
        own.start("image", "import", path, "--name", f"more{count}", "--flatten", "now", stdout=subprocess.DEVNULL)
        for count, path in enumerate(layouts)
    ]
    while any(process.poll() is None for process in running):
        own("gc", "--yes")
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {found["name"] for found in own.json("image", "list")["images"]} == {"app", "more0", "more1", "more2"}
    own("fsck")


def test_a_flat_tree_is_built_when_it_is_asked_for(own: CommandLine, tmp_path: Path) -> None:
    """The process in the background holds none of our streams: the command ends, and the tree comes."""

    def flat(name: str) -> object:
        return own.json("image", "show", name)["flat_tree"]

    own("image", "import", image(tmp_path / "now", "n"), "--name", "now", "--flatten", "now")
    assert flat("now") is not None
    own("image", "import", image(tmp_path / "later", "l"), "--name", "later", "--flatten", "first-use")
    assert flat("later") is None
    assert own("image", "flatten", "later").endswith(": built\n")
    assert own("image", "flatten", "later").endswith(": was there already\n")
    own("image", "import", image(tmp_path / "behind", "b", "n"), "--name", "behind")
    deadline = time.monotonic() + 60
    while flat("behind") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_fsck_finds_and_repairs(own: CommandLine, tmp_path: Path) -> None:
    said = own.json("fsck")
    assert said["schema"] == "flatmount.fsck/1"
    assert (said["layers"], said["findings"]) == (3, [])
    path = own.root / "v1/data/layers" / own.json("image", "show", "app")["layer_list"][1]["path"].partition("/")[2]
    times = (path / "file-c").stat()
    (path / "file-c").write_text("d" * 1000)
    os.utime(path / "file-c", ns=(times.st_atime_ns, times.st_mtime_ns))
    own("fsck", "--quick")
    assert "has other content" in own_output(own, "fsck")
    assert "--source" in own_output(own, "fsck", "--repair")
    assert "unpacked again" in own("fsck", "--repair", "--source", str(tmp_path / "two"))
    own("fsck")


def own_output(line: CommandLine, *arguments: str) -> str:
    """What a command that ends with a finding prints on stdout."""
    done = line.start(*arguments, stdout=subprocess.PIPE)
    said, _ = done.communicate(timeout=60)
    assert done.returncode == 1
    return said


@pytest.mark.parametrize("form", ["layout", "images.tar"])
def test_a_store_goes_to_another_node(own: CommandLine, tmp_path: Path, form: str) -> None:
    own("image", "import", str(tmp_path / "one"), "--name", "registry.example/other:1.0")
    said = own.json("store", "export", str(tmp_path / form))
    assert [found["name"] for found in said["images"]] == ["registry.example/other:1.0", "app"]
    other = CommandLine(tmp_path / "node", own.run_directory)
    arrived = other.json("store", "import", str(tmp_path / form))["images"]
    assert {found["name"] for found in arrived} == {"app", "registry.example/other:1.0"}
    other("fsck")
    for name in ("app", "registry.example/other:1.0"):
        ids = [[layer["diff_id"] for layer in line.json("image", "show", name)["layer_list"]] for line in (own, other)]
        assert ids[0] == ids[1]
    own("image", "export", "app", str(tmp_path / "single"))
    assert "cannot write" in own.refused("image", "export", "app", str(tmp_path), code=2)
