"""`flatmount mount` and `umount`, `plan` and `probe`, on a real image."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError
from flatmount.image.demo_layers import GONE, HOLDS
from flatmount.kernel.namespaces import user_namespace
from flatmount.kernel.start import check_start
from flatmount.plan.mapping import Mapping
from flatmount.rootfs import assemble
from flatmount.store import Store
from flatmount.strategies import Attach
from tests.e2e.conftest import CommandLine, leftovers

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
    assert 0 < facts["private"]["mounts"] <= facts["private"]["most"] < 32
    said = flatmount("probe")
    assert "yes" in said and f"in copies of {facts['private']['mounts']} mounts" in said


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


def test_a_kill_before_the_upper_is_made_spares_what_somebody_else_made_there(
    flatmount: CommandLine, target: Path, tmp_path: Path
) -> None:
    """A record of a mount that was killed at once, and a directory of the user's own where its upper was to be."""
    records = flatmount.run_directory / "mounts"
    mine = tmp_path / "mine"
    flatmount("mount", "demo", str(target), "--map", MAP, "--upper", str(mine), "--id", "killed")
    record = json.loads((records / "killed.json").read_text())
    flatmount("umount", str(target))
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "thesis").write_text("precious")
    owner = {"state": "mounting", "owner": "flatmount.999999-1", "mount_id": None}
    (records / "killed.json").write_text(json.dumps({**record, **owner}))
    flatmount("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    flatmount("umount", str(target))
    assert (mine / "thesis").read_text() == "precious"
    assert not (records / "killed.json").exists()


@pytest.mark.parametrize("strategy", ["per-layer", "common-parent", "flat"])
def test_an_interrupted_mount_is_undone_or_whole(flatmount: CommandLine, target: Path, strategy: str) -> None:
    begun = time.monotonic()
    flatmount("mount", "demo", str(target), "--map", MAP, "--strategy", strategy, "--ephemeral")
    whole = time.monotonic() - begun
    flatmount("umount", str(target))
    for i in range(12):
        command = ["mount", "demo", str(target), "--map", MAP, "--strategy", strategy, "--ephemeral"]
        stopped = flatmount.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.5 + i * 0.05))
        stopped.send_signal(signal.SIGINT)
        stopped.wait(60)
        # Whole, and recorded: the signal came when all was done.
        if os.path.ismount(target):
            flatmount("umount", str(target))
        assert not leftovers(flatmount)


def test_one_upper_serves_one_mount(flatmount: CommandLine, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    upper = str(tmp_path / "upper")
    flatmount("mount", "demo", str(target), "--map", MAP, "--upper", upper)
    assert "in use" in flatmount.refused("mount", "demo", str(other), "--map", MAP, "--upper", upper, code=1)
    assert not os.path.ismount(other)
    flatmount("umount", str(target))


def test_an_existing_upper_is_not_made_ephemeral(flatmount: CommandLine, target: Path, tmp_path: Path) -> None:
    upper = str(tmp_path / "upper")
    flatmount("mount", "demo", str(target), "--map", MAP, "--id", "kept")
    flatmount("umount", str(target))
    said = flatmount.refused("mount", "demo", str(target), "--map", MAP, "--id", "kept", "--ephemeral", code=2)
    assert "ephemeral" in said
    assert not os.path.exists(upper)
    flatmount("gc", "--uppers", "--yes")


@pytest.mark.parametrize("how", ["--read-only", "--ephemeral"])
def test_a_strangers_mount_is_not_taken_off(flatmount: CommandLine, target: Path, how: str) -> None:
    flatmount("mount", "demo", str(target), "--map", MAP, how)
    subprocess.run(["mount", "-t", "tmpfs", "stranger", target], check=True)
    (target / "theirs").write_text("")
    assert "mounted over" in flatmount.refused("umount", str(target), code=1)
    assert (target / "theirs").exists()
    subprocess.run(["umount", target], check=True)
    subprocess.run(["umount", target], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "stranger", target], check=True)
    flatmount("umount", str(target))
    assert os.path.ismount(target)
    subprocess.run(["umount", target], check=True)


def test_from_another_namespace_nothing_is_lost(flatmount: CommandLine, target: Path) -> None:
    flatmount("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    upper = next((flatmount.root / "v1/data/uppers").iterdir())
    command = ["unshare", "-m", sys.executable, "-m", "flatmount", "umount", str(target)]
    done = subprocess.run(command, env=flatmount.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "another mount namespace" in done.stderr
    assert upper.exists()
    flatmount("umount", str(target))
    assert not upper.exists()


def test_a_damaged_record_is_named_and_stops_nobody(flatmount: CommandLine, target: Path) -> None:
    flatmount("mount", "demo", str(target), "--map", MAP, "--ephemeral")
    damaged = flatmount.run_directory / "mounts/damaged.json"
    damaged.write_text('{"schema": "flatmount.mount-record/1", "surprise": 1}')
    command = [sys.executable, "-m", "flatmount", "umount", str(target)]
    done = subprocess.run(command, env=flatmount.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert str(damaged) in done.stderr
    damaged.unlink()
    # Its lease was left alone while nobody could tell whose it was.
    flatmount("umount", str(target), expect=2)


def test_the_same_from_python_is_undone_when_the_block_is_left(flatmount: CommandLine, target: Path) -> None:
    mapping = Mapping.parse(MAP)
    with Store.open(str(flatmount.root)) as store:
        image = store.image("demo")
        with assemble(store, image, mapping, str(target)) as rootfs:
            assert rootfs.outcome.mount_operations == 1
            assert check_start(user_namespace(mapping), str(target), "/etc/passwd", "/new").written_uid == 0
        assert not os.path.ismount(target)
        with pytest.raises(ZeroDivisionError), assemble(store, image, mapping, str(target)):
            raise ZeroDivisionError
        assert not os.path.ismount(target)
        with assemble(store, image, mapping, attach=Attach.NONE) as rootfs:
            assert sorted(os.listdir(f"/proc/self/fd/{rootfs.descriptor}"))[0] == "bin"
