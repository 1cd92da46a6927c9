"""nerdctl with our snapshotter, where it is installed or in the directory that FLATMOUNT_CONTAINERD names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.errors import FlatmountError, MissingFeature
from flatmount.kernel.mounts import mount_count, read_table
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.plan.mapping import Mapping
from flatmount.snapshotter import nerdctl
from flatmount.snapshotter.engine import PAUSE_IMAGE, Engine, engine_place, running_engine

PROGRAMS = os.environ.get("FLATMOUNT_CONTAINERD", "")
MAPPING = Mapping.single(1879048192)

with_nerdctl = pytest.mark.skipif(
    shutil.which("nerdctl", path=os.pathsep.join((PROGRAMS, os.environ["PATH"]))) is None,
    reason="machine cannot: nerdctl is not installed",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A containerd with our snapshotter and the image of a proof, in a private mount namespace."""
    enter_private_mounts()
    with engine_place() as place:
        write_tiny_image(f"{place}/image", 5, waits=True)
        subprocess.run(["tar", "-C", f"{place}/image", "-cf", f"{place}/image.tar", "."], check=True)
        os.mkdir(f"{place}/engine", 0o711)
        with running_engine(f"{place}/engine", programs=PROGRAMS) as engine:
            engine.take_image(f"{place}/image.tar", PAUSE_IMAGE)
            yield engine


def start(call: nerdctl.Nerdctl, name: str, image: str, *options: str) -> Path:
    """Start a container; its root directory, seen from outside."""
    call("run", "--detach", "--pull", "never", "--network", "none", "--name", name, *options, image)
    return Path(f"/proc/{call('inspect', '--format', '{{.State.Pid}}', name).strip()}/root")


@with_nerdctl
def test_a_container_is_committed_and_its_image_runs(engine: Engine) -> None:
    call = nerdctl.nerdctl_on(engine)
    root = start(call, "first", PAUSE_IMAGE)
    (root / "etc/new").write_text("new\n")
    (root / "etc/layer-0").unlink()
    call("commit", "first", "committed:1")
    second = start(call, "second", "committed:1")
    assert (second / "etc/new").read_text() == "new\n"
    assert {path.name for path in (second / "etc").glob("layer-*")} == {f"layer-{number}" for number in range(1, 5)}
    assert {path.name for path in (second / "etc").glob("gone-*")} == {"gone-4"}
    call("rm", "--force", "first", "second")
    call("rmi", "--force", "committed:1")
    engine.ctr("leases", "create", "--id", "test")
    engine.ctr("leases", "delete", "--sync", "test")
    left = engine.ctr("snapshots", "--snapshotter", "flatmount", "ls").splitlines()[1:]
    assert len(left) == 5, left
    assert all("Committed" in line for line in left)


@with_nerdctl
def test_a_mapped_containers_commit_keeps_host_ids_and_our_diff_does_not(engine: Engine, tmp_path: Path) -> None:
    call = nerdctl.nerdctl_on(engine)
    if not nerdctl.offers_ranges(engine, call):
        pytest.skip("machine cannot: this nerdctl starts no container in a user namespace with this containerd")
    with nerdctl.root_has_range(engine, MAPPING) as user:
        root = start(call, "mapped", PAUSE_IMAGE, "--userns-remap", user)
        assert os.stat(root / "etc/layer-0").st_uid == MAPPING.host_uid(0)
        (root / "etc/new").write_text("new\n")
        os.chown(root / "etc/new", MAPPING.host_uid(0), MAPPING.host_gid(0))
        call("commit", "mapped", "committed:2")
    again = start(call, "again", "committed:2")
    assert os.stat(again / "etc/new").st_uid == MAPPING.host_uid(0)
    (key,) = call("ps", "--no-trunc", "--quiet", "--filter", "name=mapped").split()
    layer = tmp_path / "layer.tar"
    assert main(["snapshotter", "diff", key, "--root", f"{engine.place}/store", "--output", str(layer)]) == 0
    listed = subprocess.run(
        ["tar", "--numeric-owner", "-tvf", layer], check=True, capture_output=True, text=True
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == {"0/0"}
    assert "etc/new" in listed
    call("rm", "--force", "mapped", "again")
    call("rmi", "--force", "committed:2")


@with_nerdctl
def test_the_door_is_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter_private_mounts()
    before = mount_count()
    command = ["containerd", "prove", "--root", str(tmp_path), "--door", "nerdctl", "--engine", PROGRAMS, "--json"]
    code = main(command)
    proofs = json.loads(capsys.readouterr().out)["proofs"]
    assert [(one["door"], one["problem"]) for one in proofs] == [("nerdctl", "")] * len(proofs)
    assert code == 0
    assert {one["mapped"]: one["mounts"] for one in proofs}.items() <= {False: 1, True: 2}.items()
    assert mount_count() == before


def standing_in(place: Path) -> Engine:
    """An engine that runs nothing, with a nerdctl that says how it was called and fails for `fail`."""
    program = place / "bin/nerdctl"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$1" = fail ] && { echo why >&2; exit 1; }\necho "$@"; cat "$NERDCTL_TOML"\n')
    program.chmod(0o755)
    return Engine(str(place), "2.1.9", "overlay", f"{program.parent}:/usr/bin:/bin", 0, 0)


def test_nerdctl_is_told_the_engines_places_and_not_the_machines(tmp_path: Path) -> None:
    call = nerdctl.nerdctl_on(standing_in(tmp_path))
    said = call("run", "image").splitlines()
    assert said[0] == "run image"
    settings = dict(line.replace('"', "").split(" = ") for line in said[1:])
    assert settings["address"] == f"{tmp_path}/c.sock"
    assert settings["snapshotter"] == "flatmount"
    assert {settings["data_root"], settings["cni_netconfpath"]} == {f"{tmp_path}/nerdctl/{n}" for n in ("data", "cni")}
    with pytest.raises(FlatmountError, match="why"):
        call("fail")


def test_a_machine_without_nerdctl_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFeature, match="nerdctl is not installed"):
        nerdctl.nerdctl_on(Engine(str(tmp_path), "2.1.9", "overlay", str(tmp_path), 0, 0))


def test_root_has_a_range_as_long_as_it_is_asked_for(tmp_path: Path) -> None:
    enter_private_mounts()
    before = [Path(file).read_text() for file in nerdctl.RANGE_FILES]
    engine = standing_in(tmp_path)
    nerdctl.nerdctl_on(engine)
    with nerdctl.root_has_range(engine, Mapping.parse("0:100000:65536", "0:300000:1000")) as user:
        assert [Path(file).read_text() for file in nerdctl.RANGE_FILES] == [
            f"{user}:100000:65536\n",
            f"{user}:300000:1000\n",
        ]
    assert [Path(file).read_text() for file in nerdctl.RANGE_FILES] == before
    assert not {entry.mount_point for entry in read_table()} & set(nerdctl.RANGE_FILES)


def test_a_machine_without_files_of_ranges_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_private_mounts()
    before = mount_count()
    monkeypatch.setattr(nerdctl, "RANGE_FILES", ("/etc/subuid", str(tmp_path / "none")))
    engine = standing_in(tmp_path)
    nerdctl.nerdctl_on(engine)
    with pytest.raises(FlatmountError, match="there is no"), nerdctl.root_has_range(engine, MAPPING):
        pass
    assert mount_count() == before
