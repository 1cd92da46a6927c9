"""Flat trees as a person has them built: when, in which form, what starts before they are ready, and what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flatmount.image.demo import default_cache
from flatmount.kernel.probes import probe
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
