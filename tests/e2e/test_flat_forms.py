"""Flat trees as a person has them built: when, in which form, what starts before they are ready, and what they cost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flatmount.cli import flatten
from flatmount.errors import StoreError
from flatmount.image.demo import default_cache
from flatmount.kernel.probes import probe
from flatmount.store import FlatForm, Store, trees
from flatmount.strategies import Choice
from tests.conftest import CANNOT
from tests.e2e.conftest import CommandLine
from tests.kernel.images import directory, file, hardlink, layout_of
from tests.kernel.trees import facts

MAP = "0:300000:65536"
LAYERS = [
    [directory("./", mode=0o750, uid=4), directory("etc"), file("etc/one", "1" * 5000), file("gone")],
    [file(".wh.gone"), file("etc/two", "2"), hardlink("linked", "etc/one")],
    [file("three", "3", uid=9, gid=10, mode=0o4755)],
]


@pytest.fixture
def own(flatmount: CommandLine, tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "own", flatmount.run_directory)


@pytest.fixture
def layout(tmp_path: Path) -> str:
    return layout_of(str(tmp_path / "layout"), LAYERS)


def said(line: CommandLine, *arguments: str, expect: int = 0) -> tuple[str, list[str]]:
    """What a command printed, and its lines on stderr."""
    command = [sys.executable, "-m", "flatmount", *arguments]
    done = subprocess.run(command, env=line.environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr
    return done.stdout, done.stderr.splitlines()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_flat(line: CommandLine, name: str) -> str:
    deadline = time.monotonic() + 60
    while not (tree := line.json("image", "show", name)["flat_tree"]):
        assert time.monotonic() < deadline, f"nobody builds the flat tree of {name}"
        time.sleep(0.1)
    return str(tree)


@pytest.fixture
def erofs(tmp_path: Path) -> None:
    if not probe(str(tmp_path)).facts.erofs:
        pytest.skip(f"{CANNOT}the kernel mounts no EROFS images")


def test_what_starts_before_the_flat_tree_is_ready_is_detached_and_right(
    own: CommandLine, layout: str, target: Path
) -> None:
    own("image", "import", layout, "--name", "app", "--flatten", "first-use")
    assert own.json("image", "show", "app")["flat_tree"] is None
    text, told = said(own, "mount", "app", str(target), "--map", MAP, "--ephemeral")
    assert told == ["flatmount: the flat tree of app is not ready: strategy detached"]
    assert "strategy detached, 1 mount operation" in text
    before = shown(target)
    own("umount", str(target))
    wait_for_flat(own, "app")
    text, told = said(own, "mount", "app", str(target), "--map", MAP, "--ephemeral")
    assert (told, "strategy flat, 1 mount operation" in text) == ([], True)
    assert shown(target) == before
    assert before["three"]["owner"] == (300009, 300010)
    own("umount", str(target))


def shown(target: Path) -> dict[str, dict[str, object]]:
    """The tree, but for the time of its root, which an upper's making changes."""
    found = facts(str(target))
    del found["."]["mtime_ns"]
    return found


def test_who_asks_for_flat_by_name_gets_it_built(own: CommandLine, layout: str, target: Path) -> None:
    own("image", "import", layout, "--name", "app", "--flatten", "first-use")
    text, told = said(own, "mount", "app", str(target), "--map", MAP, "--strategy", "flat", "--read-only")
    assert (told, "strategy flat" in text) == ([], True)
    assert own.json("image", "show", "app")["flat_tree"] is not None
    own("umount", str(target))


def test_a_storm_does_not_wait_either(own: CommandLine, layout: str, tmp_path: Path) -> None:
    own("image", "import", layout, "--name", "app", "--flatten", "first-use")
    out = tmp_path / "storm.json"
    storm = ("storm", "app", "--containers", "4", "--repeats", "1", "--json", str(out), "--strategies")
    _, told = said(own, *storm, "auto")
    assert "flatmount: the flat tree of app is not ready: strategy detached" in told
    (result,) = json.loads(out.read_text())["results"]
    assert (result["strategy"], result["failed"]) == ("detached", 0)
    assert result["mount_operations"]["kernel"] == result["mount_operations"]["executed"] == 4
    wait_for_flat(own, "app")
    said(own, *storm, "auto")
    assert [result["strategy"] for result in json.loads(out.read_text())["results"]] == ["flat"]


def test_import_and_demo_have_it_built_behind_them(own: CommandLine, layout: str) -> None:
    own("image", "import", layout, "--name", "app")
    assert wait_for_flat(own, "app").startswith("flat/")
    own("image", "demo", "--layers", "5", "--cache", default_cache())
    assert wait_for_flat(own, "demo").startswith("flat/")
    own("fsck")


def test_the_erofs_form_from_end_to_end(own: CommandLine, layout: str, target: Path, erofs: None) -> None:
    own("image", "import", layout, "--name", "app", "--flatten", "now", "--flat-format", "erofs")
    assert own.json("image", "show", "app")["flat_tree"].startswith("erofs/")
    plan = own.json("plan", "app", "--map", MAP)
    assert plan["mount_operations"] == 1
    assert "fsopen" in [operation["call"] for operation in plan["once_for_all"]]
    seen = []
    for changes in ("--ephemeral", "--read-only"):
        mounted = own.json("mount", "app", str(target), "--map", MAP, changes)
        assert (mounted["strategy"], mounted["mount_operations"]) == ("flat", 1)
        seen.append(shown(target))
        assert os.stat(target / "etc/one").st_nlink == 2
        own("umount", str(target))
    assert seen[0] == seen[1]
    # The form that was asked for last is the one that containers get.
    assert own("image", "flatten", "app", "--flat-format", "hardlink").endswith(": built\n")
    assert own.json("image", "show", "app")["flat_tree"].startswith("flat/")
    assert own("image", "flatten", "app", "--flat-format", "erofs").endswith(": was there already\n")
    assert own.json("image", "show", "app")["flat_tree"].startswith("erofs/")
    own("fsck")
    own("image", "remove", "app")
    assert os.listdir(own.root / "v1/data/erofs") == []


def test_the_configuration_names_the_form(own: CommandLine, layout: str, tmp_path: Path, erofs: None) -> None:
    configuration = tmp_path / "config.toml"
    configuration.write_text('version = 1\n[store]\nflat_format = "erofs"\n')
    own.extra["FLATMOUNT_CONFIG"] = str(configuration)
    own("image", "import", layout, "--name", "app")
    assert wait_for_flat(own, "app").startswith("erofs/")
    assert 'flat_format = "erofs"' in own("config", "dump")
    configuration.write_text('version = 1\n[store]\nflat_format = "squashfs"\n')
    assert "one of hardlink, erofs" in own.refused("image", "flatten", "app", code=2)


def test_show_says_what_an_image_costs(own: CommandLine, layout: str, tmp_path: Path, erofs: None) -> None:
    own("image", "import", layout, "--name", "app", "--flatten", "now")
    own("image", "import", layout_of(str(tmp_path / "other"), [LAYERS[0]]), "--name", "base", "--flatten", "now")
    own("image", "flatten", "app", "--flat-format", "erofs")
    costs = own.json("image", "show", "app")["costs"]
    assert [layer["shared_with"] for layer in costs["layers"]] == [["base"], [], []]
    assert [(flat["form"], flat["directories"], flat["links"]) for flat in costs["flat"]] == [
        ("hardlink", 2, 4),
        ("erofs", 2, 3),
    ]
    assert [flat["inodes"] for flat in costs["flat"]] == [2, 1]
    text = own("image", "show", "app")
    assert "SHARED WITH" in text
    assert "4 links into the layers" in text
    before = own.json("image", "show", "app")["costs"]["own"]
    freed = own.json("image", "remove", "app")
    assert freed["size_bytes"] <= before["size_bytes"]
    assert freed["entries"] > 0


@pytest.fixture
def store(tmp_path: Path, layout: str) -> Iterator[Store]:
    with Store.open(str(tmp_path / "own"), create=True) as opened:
        opened.import_image(layout, name="app")
        yield opened


def test_that_no_build_can_be_begun_is_told_and_no_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refused)
    flatten.flatten_when("background", store, store.image("app"), FlatForm.HARDLINK)
    flatten.tell_if_not_ready("auto", Choice("detached", ""), store, store.image("app"))
    begun, not_ready, again = capsys.readouterr().err.splitlines()
    assert begun == again
    assert "nobody builds the flat tree of app" in begun and "EAGAIN" in begun
    assert "not ready" in not_ready


def builders(digest: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            found += [path.parts[2]] if b"flatten" in words and digest.encode() in words else []
    return found


def test_one_build_is_begun_however_often_it_is_asked_for(
    own: CommandLine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.image("app")
    begun = 0

    def counted(command: list[str], lock: int) -> None:
        nonlocal begun
        begun += 1
        start(command, lock)

    start = flatten._start
    monkeypatch.setattr(flatten, "_start", counted)
    with store._disk.building():
        for _ in range(5):
            flatten.flatten_when("background", store, image, FlatForm.HARDLINK)
        assert begun == 1
        wait_until(lambda: len(builders(image.digest)) == 1)
    wait_for_flat(own, "app")
    wait_until(lambda: not builders(image.digest))


def test_a_configured_image_that_cannot_be_made_gives_way_to_hard_links(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tree_fd: int, out_fd: int, name: str) -> None:
        raise StoreError("no room", hint="free space")

    monkeypatch.setattr(trees, "write_erofs", full)
    image = store.image("app")
    with pytest.raises(StoreError, match="no room"):
        flatten._build(store, image, FlatForm.EROFS, asked=True)
    assert store.flat_tree(image) is None
    tree, form = flatten._build(store, image, FlatForm.EROFS, asked=False)
    assert (tree, form) == (store.flat_tree(image), FlatForm.HARDLINK)
    assert "hard links" in capsys.readouterr().err


def test_building_at_once_is_asking_for_the_form(store: Store, erofs: None) -> None:
    image = store.image("app")
    flatten.flatten_when("now", store, image, FlatForm.EROFS)
    assert store.flat_form(image) is FlatForm.EROFS
    flatten.flatten_when("now", store, image, FlatForm.HARDLINK)
    assert store.flat_form(image) is FlatForm.HARDLINK
