"""`flatmount mount` and `umount`, `plan` and `probe`, on a real image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError
from flatmount.image.demo_layers import GONE, HOLDS
from flatmount.kernel.namespaces import user_namespace
from flatmount.kernel.start import check_start
from flatmount.plan.mapping import Mapping
from tests.e2e.conftest import CommandLine

MAP = "0:300000:65536"
STRATEGIES = ("per-layer", "common-parent", "detached", "flat", "chown", "auto")


def in_root(target: Path, *command: str) -> str:
    done = subprocess.run(["chroot", target, *command], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_real_image_by_every_strategy(flatmount: CommandLine, target: Path, strategy: str) -> None:
    mounted = flatmount.json("mount", "demo", str(target), "--map", MAP, "--strategy", strategy, "--ephemeral")
    assert mounted["schema"] == "flatmount.mount/1"
    assert (target / "etc/passwd").stat().st_uid == 300000
    assert in_root(target, "python3", "-c", "print(6 * 7)") == "42\n"
    assert in_root(target, "/bin/sh", "-c", "echo $0") == "/bin/sh\n"
    seen = check_start(user_namespace(Mapping.parse(MAP)), str(target), "/etc/passwd", "/etc/written")
    assert (seen.uid, seen.written_uid) == (0, 0)
    expected = {"per-layer": 2 * (1 + 2 * 12) + 1, "common-parent": 7}.get(strategy, 1)
    assert mounted["mount_operations"] == expected
    flatmount("umount", str(target))
    assert os.listdir(target) == []


def test_layers_that_remove_and_replace_are_honoured_alike(flatmount: CommandLine, target: Path) -> None:
    seen = {}
    for strategy in ("per-layer", "flat"):
        flatmount("mount", "demo", str(target), "--map", MAP, "--strategy", strategy, "--read-only")
        walk = subprocess.run(
            ["find", target, "-printf", "%P %y %m %U %G %s %l\\n"], capture_output=True, text=True, check=True
        )
        # A directory's size is its file system's own business, and overlayfs's of a merged one.
        seen[strategy] = sorted(line for line in walk.stdout.splitlines() if " d " not in line)
        flatmount("umount", str(target))
    assert seen["per-layer"] == seen["flat"]
    assert len(seen["flat"]) > 1000


@pytest.mark.parametrize("strategy", ["per-layer", "common-parent", "detached", "flat"])
def test_from_inside_what_layers_removed_is_gone_and_what_they_replaced_is_new(
    flatmount: CommandLine, target: Path, strategy: str
) -> None:
    flatmount("mount", "demo", str(target), "--map", MAP, "--strategy", strategy, "--ephemeral")
    namespace = user_namespace(Mapping.parse(MAP))
    for number, (path, content) in enumerate(HOLDS.items()):
        assert check_start(namespace, str(target), f"/{path}", f"/tmp/{number}").content == content
    for path in GONE:
        with pytest.raises(FlatmountError, match="No such file"):
            check_start(namespace, str(target), f"/{path}", "/never")
    flatmount("umount", str(target))


def test_an_upper_outlives_its_mount_and_is_used_again(flatmount: CommandLine, target: Path) -> None:
    first = flatmount.json("mount", "demo", str(target), "--map", MAP, "--id", "mine")
    # The host's root has no id in there (EOVERFLOW): only the container's ids can make files.
    check_start(user_namespace(Mapping.parse(MAP)), str(target), "/etc/passwd", "/etc/kept")
    flatmount("umount", str(target))
    # In the container's ids: another range can use it.
    flatmount("mount", "demo", str(target), "--map", "0:500000:65536", "--id", "mine")
    assert (target / "etc/kept").read_text() == "started\n"
    assert (target / "etc").stat().st_uid == 500000
    flatmount("umount", str(target))
    assert os.path.isdir(first["upper"])
    subprocess.run(["rm", "-rf", first["upper"]], check=True)


def test_an_upper_elsewhere_keeps_the_hosts_ids_and_refuses_another_range(
    flatmount: CommandLine, target: Path, tmp_path: Path
) -> None:
    upper = str(tmp_path / "upper")
    flatmount("mount", "demo", str(target), "--map", MAP, "--upper", upper)
    flatmount("umount", str(target))
    assert os.stat(f"{upper}/fs").st_uid == 300000
    said = flatmount.refused("mount", "demo", str(target), "--map", "0:9:65536", "--upper", upper, code=2)
    assert "0:300000:65536" in said
    flatmount("mount", "demo", str(target), "--map", MAP, "--upper", upper)
    flatmount("umount", str(target))


def test_what_is_mounted_cannot_be_removed(flatmount: CommandLine, target: Path) -> None:
    flatmount("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    said = flatmount.refused("image", "remove", "demo", code=1)
    assert "mount:" in said
    flatmount("umount", str(target))


def test_in_use_is_one_line_and_nothing_is_lost(flatmount: CommandLine, target: Path) -> None:
    flatmount("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    with open(target / "etc/passwd", encoding="utf-8"):
        said = flatmount.refused("umount", str(target), code=1)
        assert "EBUSY" in said
        assert (target / "etc/passwd").exists()
    flatmount("umount", str(target))


def test_plan_prints_the_count_that_mount_then_makes(flatmount: CommandLine) -> None:
    for strategy in ("per-layer", "common-parent", "detached", "flat"):
        plan = flatmount.json("plan", "demo", "--strategy", strategy, "--map", MAP)
        assert plan["schema"] == "flatmount.plan/1"
        marked = sum(operation["mount_operation"] for operation in plan["operations"])
        assert plan["mount_operations"] == marked
        text = flatmount("plan", "demo", "--strategy", strategy, "--map", MAP)
        assert f"{marked} of them mount operations" in text


@pytest.fixture
def nobodys_store(demo_store: Path) -> Iterator[Path]:
    """A copy of the store that `nobody` owns, in a place that everybody reaches."""
    with tempfile.TemporaryDirectory(prefix="flatmount-test-") as place:
        os.chmod(place, 0o755)
        copy = Path(place, "root")
        shutil.copytree(demo_store, copy, ignore=lambda path, names: names if Path(path).parent.name == "data" else [])
        subprocess.run(["chown", "-R", "65534:65534", copy], check=True)
        yield copy


def test_plan_needs_no_root(nobodys_store: Path, tmp_path: Path) -> None:
    line = CommandLine(nobodys_store, tmp_path / "run")
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "flatmount", "plan", "demo", "--map", MAP, "--json"],
        env={**line.environment(), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["probed"] is False


def test_probe_says_what_this_host_can_do(flatmount: CommandLine) -> None:
    facts = flatmount.json("probe")
    assert facts["schema"] == "flatmount.probe/1"
    assert facts["features"]["idmapped_layers"]["available"] is True
    assert facts["auto"] == "flat"
    assert "yes" in flatmount("probe")


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["mount", "demo", "TARGET", "--map", "0:1"], 2, "CONTAINER:HOST:SIZE"),
        (["mount", "demo", "TARGET", "--map", "0:100:10,5:200:10"], 2, "overlap"),
        (["mount", "demo", "TARGET", "--map", "0:100000:1"], 2, "no host"),
        (["mount", "nothing", "TARGET", "--map", MAP], 2, "nothing"),
        (["mount", "demo", "MISSING", "--map", MAP], 2, "does not exist"),
        (["mount", "demo", "FULL", "--map", MAP], 2, "not empty"),
        (["mount", "demo", "LINK", "--map", MAP], 2, "symbolic link"),
        (["mount", "demo", "FILE", "--map", MAP], 2, "not a directory"),
        (["mount", "demo", "TARGET", "--map", MAP, "--id", "../x"], 2, "not a name"),
        (["umount", "TARGET"], 2, "no mount"),
        (["image", "import", "FILE"], 1, "not"),
        (["storm", "demo", "--strategies", "fast"], 2, "fast"),
        (["storm", "demo", "--containers", "none"], 2, "whole number"),
        (["storm", "demo", "--uppers", "MISSING"], 2, "not a directory"),
        (["storm", "demo", "--json", "MISSING/x.json"], 2, "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    flatmount: CommandLine, tmp_path: Path, arguments: list[str], code: int, word: str
) -> None:
    (tmp_path / "TARGET").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/file").write_text("")
    (tmp_path / "FILE").write_text("not an image")
    (tmp_path / "LINK").symlink_to("TARGET")
    before = flatmount("image", "list")
    words = [str(tmp_path / w) if w.split("/")[0].isupper() else w for w in arguments]
    assert word in flatmount.refused(*words, code=code)
    assert flatmount("image", "list") == before


def test_a_full_disk_is_one_line(flatmount: CommandLine, target: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=3", "small", small], check=True)
    try:
        said = flatmount.refused("mount", "demo", str(target), "--map", MAP, "--upper", f"{small}/upper", code=1)
        assert "ENOSPC" in said
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_without_privilege_it_says_so(demo_store: Path, tmp_path: Path, target: Path) -> None:
    line = CommandLine(demo_store, tmp_path / "run")
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "flatmount"]
    done = subprocess.run(
        [*command, "mount", "demo", str(target), "--map", MAP],
        env=line.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "root" in done.stderr
    assert done.stderr.count("\n") == 1
