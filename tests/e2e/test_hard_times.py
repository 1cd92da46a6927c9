"""A full disk, few descriptors, symbolic links in paths, and users who do not own the store."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import CommandLine
from tests.e2e.test_gc import MAP, image

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, flatmount: CommandLine, tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB in the test's own mount namespace."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if request.param == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "disk", disk], check=True)
    else:
        file = tmp_path / "disk.img"
        with open(file, "xb") as empty:
            empty.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "2048", file], check=True)
        subprocess.run(["mount", "-o", "loop", file, disk], check=True)
    yield disk
    subprocess.run(["umount", "-R", disk], check=True)


def fill(path: Path) -> None:
    """Take every block that is left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
        os.fsync(file.fileno())


def test_a_full_disk_locks_nobody_out(small_disk: Path, flatmount: CommandLine, tmp_path: Path) -> None:
    line = CommandLine(small_disk / "store", flatmount.run_directory)
    for name in ("one", "two"):
        # A builder in the background would have a part of what is filled here, and keep the disk from being unmounted.
        line("image", "import", image(tmp_path / name, name), "--name", name, "--flatten", "first-use")
    reserve = line.root / "v1/reserve"
    assert sum(file.stat().st_blocks * 512 for file in reserve.iterdir()) == 1 << 20
    target = small_disk / "target"
    target.mkdir()
    line("mount", "one", str(target), "--map", MAP, "--strategy", "detached", "--id", "held")
    fill(small_disk / "fill")
    assert [found["name"] for found in line.json("image", "list")["images"]] == ["one", "two"]
    assert line.json("image", "show", "one")["holders"] == [f"mount:held@{flatmount.run_directory}"]
    line("umount", str(target))
    line("gc", "--yes", "--uppers")
    line("image", "remove", "one")
    assert [found["name"] for found in line.json("image", "list")["images"]] == ["two"]
    # Somebody took the reserve as well: what only reads still works, and what does not says why.
    shutil.rmtree(reserve)
    fill(small_disk / "more")
    assert [found["name"] for found in line.json("image", "list")["images"]] == ["two"]
    assert "free space" in line.refused("image", "remove", "two", code=1)
    (small_disk / "fill").unlink()
    line("image", "remove", "two")
    assert len(list(reserve.iterdir())) == 4


def test_few_descriptors_are_made_more_or_told_beforehand(flatmount: CommandLine) -> None:
    """A storm of 60 with 40 at a time does not fit into 128."""
    storm = ["storm", "demo", "--containers", "60", "--concurrency", "40", "--repeats", "1", "--strategies", "flat"]
    command = [sys.executable, "-m", "flatmount", *storm]

    def run(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
        limit = [f'prlimit --nofile={soft}:{hard} --pid $$; exec "$@"', "sh"]
        return subprocess.run(
            ["sh", "-c", *limit, *command],
            env=flatmount.environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 2048
    enough = run(128, 2048)
    assert enough.returncode == 0, enough.stderr
    too_low = run(128, 128)
    assert too_low.returncode == 1
    assert too_low.stderr.count("\n") == 1
    assert "the hard limit is 128" in too_low.stderr


def test_symbolic_links_and_relative_paths_are_the_same_store(
    flatmount: CommandLine, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link-root").symlink_to(flatmount.root)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "link-run").symlink_to(tmp_path / "run")
    linked = CommandLine(tmp_path / "link-root", tmp_path / "link-run")
    linked("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    assert linked.json("gc")["uppers"] == []
    flatmount("umount", str(target))
    monkeypatch.chdir(tmp_path)
    relative = CommandLine(Path("link-root"), Path("link-run"))
    relative("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    linked("umount", str(target))
    storm = ["storm", "demo", "--containers", "2", "--repeats", "1", "--strategies", "flat"]
    relative(*storm)


@pytest.fixture
def roots_store(flatmount: CommandLine) -> Iterator[CommandLine]:
    """A store that root owns, in a place that everybody reaches."""
    with tempfile.TemporaryDirectory(prefix="flatmount-test-") as place:
        os.chmod(place, 0o755)
        line = CommandLine(Path(place, "root"), flatmount.run_directory)
        line("image", "import", image(Path(place, "layout"), "a", "b"), "--name", "app", "--flatten", "first-use")
        yield line


def as_nobody(line: CommandLine, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*NOBODY, sys.executable, "-m", "flatmount", *arguments],
        env={**line.environment(), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nobody_plans_on_a_store_that_root_owns(roots_store: CommandLine) -> None:
    def told(*arguments: str) -> str:
        done = as_nobody(roots_store, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    base = roots_store.root / "v1"
    assert (base.stat().st_mode & 0o777, (base / "catalogue").stat().st_mode & 0o777) == (0o711, 0o644)
    plan = ("plan", "app", "--map", MAP, "--strategy", "flat")
    assert "flat/N" in told(*plan)
    roots_store("image", "flatten", "app")
    tree = roots_store.json("image", "show", "app")["flat_tree"]
    assert tree is not None
    for text in (told(*plan), roots_store(*plan)):
        assert str(tree) in text
        assert "flat/N" not in text
    listed = json.loads(told("image", "list", "--json"))
    assert listed["images"] == roots_store.json("image", "list")["images"]
    shown, full = json.loads(told("image", "show", "app", "--json")), roots_store.json("image", "show", "app")
    assert shown["layer_list"] == full["layer_list"]
    assert (shown["env"], shown["holders"]) == (None, None)
    assert as_nobody(roots_store, "image", "remove", "app").returncode == 1
    # A catalogue that is not of this state of the book is written anew by the owner's next command.
    (base / "catalogue").write_text("{}\n[]")
    roots_store("image", "list")
    assert [found["name"] for found in json.loads(told("image", "list", "--json"))["images"]] == ["app"]
    roots_store("image", "remove", "app")
    assert json.loads(told("image", "list", "--json"))["images"] == []
