"""What the upstream suite names and never wrote, and what it leaves out, for each form."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.snapshotting import Client, Daemon, Refused, empty, mounted, own_mounts

RANGE = "0:500000:65536"
Layer = Callable[[Path], None]


@pytest.fixture
def chain(client: Client, tmp_path: Path) -> Callable[..., str]:
    """Commit one layer after the other; returns the name of the topmost."""

    def make(*layers: Layer, name: str = "layer") -> str:
        parent = ""
        for number, layer in enumerate(layers):
            key = f"{name}-{number}-key"
            with mounted(client.prepare(key, parent), tmp_path / "unpack") as root:
                layer(root)
            client.commit(f"{name}-{number}", key)
            parent = f"{name}-{number}"
        return parent

    return make


def base(root: Path) -> None:
    (root / "dir/below").mkdir(parents=True)
    (root / "dir/file").write_text("one\n")
    (root / "dir/other").write_text("other\n")
    (root / "owned").write_text("seven\n")
    os.chown(root / "owned", 7, 8)
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o4755)


def change(root: Path) -> None:
    (root / "dir/file").write_text("two\n")
    (root / "dir/other").unlink()
    (root / "dir/new").write_text("new\n")


def test_remove_after_commit(client: Client, daemon: Daemon, chain: Callable[..., str]) -> None:
    top = chain(base, change)
    with pytest.raises(Refused) as refused:
        client.remove("layer-1-key")
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    client.remove(top)
    client.remove("layer-0")
    empty(daemon, client)
    assert client.names() == set()
    assert os.listdir(daemon.data / "trash") == []


def test_unix_sockets_work_and_are_kept(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    def bind(root: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(root)
            try:
                listening.bind("old.sock")
            finally:
                os.chdir("/")

    top = chain(base, bind)
    with mounted(client.prepare("container", top), tmp_path / "root") as root:
        assert stat.S_ISSOCK(os.lstat(root / "old.sock").st_mode)
        os.chdir(root)
        try:
            with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as calling:
                listening.bind("new.sock")
                listening.listen()
                calling.connect("new.sock")
        finally:
            os.chdir("/")
        os.unlink(root / "old.sock")
        assert not os.path.lexists(root / "old.sock")


def test_a_directory_keeps_its_inode(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    top = chain(base, change)
    with mounted(client.prepare("container", top), tmp_path / "root") as root:
        before = os.stat(root / "dir").st_ino
        (root / "dir/more").write_text("x")
        (root / "dir").chmod(0o700)
        assert os.stat(root / "dir").st_ino == before


def test_a_file_that_is_open_keeps_its_inode(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    top = chain(base)
    with mounted(client.prepare("container", top), tmp_path / "root") as root, open(root / "dir/file") as reading:
        before = os.fstat(reading.fileno()).st_ino
        with open(root / "dir/file", "a") as writing:
            writing.write("more\n")
            assert os.fstat(writing.fileno()).st_ino == before
        assert os.stat(root / "dir/file").st_ino == before
        assert os.fstat(reading.fileno()).st_ino == before


def test_getcwd_survives_a_copy_up(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    top = chain(base)
    with mounted(client.prepare("container", top), tmp_path / "root") as root:
        script = 'cd dir/below && before=$(pwd -P) && touch file && chmod 700 . && [ "$(/bin/pwd -P)" = "$before" ]'
        subprocess.run(["sh", "-ec", script], cwd=root, check=True)


def test_chmod_reaches_files_directories_and_lower_layers(
    client: Client, chain: Callable[..., str], tmp_path: Path
) -> None:
    top = chain(base)
    with mounted(client.prepare("container", top), tmp_path / "root") as root:
        (root / "dir").chmod(0o1770)
        (root / "dir/file").chmod(0o640)
    client.commit("changed", "container")
    with mounted(client.view("view", "changed"), tmp_path / "root") as root:
        assert stat.S_IMODE(os.stat(root / "dir").st_mode) == 0o1770
        assert stat.S_IMODE(os.stat(root / "dir/file").st_mode) == 0o640
        assert (root / "dir/file").read_text() == "one\n"
        assert os.stat(root / "run").st_mode & stat.S_ISUID


def test_remove_in_walk(client: Client) -> None:
    for number in range(250):
        client.prepare(f"key-{number}")
    for name in client.names():
        client.remove(name)
    assert client.names() == set()


def test_rename(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    """Upstream skips its own: some kernels let overlayfs redirect directories, and then a flat tree would be wrong."""

    def rename(root: Path) -> None:
        (root / "fresh").mkdir()
        (root / "fresh/file").write_text("x\n")
        os.rename(root / "fresh", root / "renamed")
        os.rename(root / "dir/file", root / "dir/moved")
        with pytest.raises(OSError, match="cross-device"):
            os.rename(root / "dir", root / "elsewhere")
        subprocess.run(["mv", root / "dir", root / "elsewhere"], check=True)

    top = chain(base, rename)
    with mounted(client.prepare("container", top), tmp_path / "root") as root:
        assert sorted(os.listdir(root)) == ["elsewhere", "owned", "renamed", "run"]
        assert (root / "elsewhere/moved").read_text() == "one\n"
        assert (root / "renamed/file").read_text() == "x\n"


def test_a_mapped_container_sees_its_own_ids(
    client: Client, daemon: Daemon, form: str, chain: Callable[..., str], tmp_path: Path
) -> None:
    top = chain(base, change)
    count = len(own_mounts(daemon))
    answer = client.prepare("container", top, mapping=RANGE)
    # Lowers may have become one flat tree meanwhile; the form stays.
    assert client.mounts("container")[0].type == answer[0].type
    with mounted(answer, tmp_path / "root") as root:
        status = os.stat(root / "owned")
        assert (status.st_uid, status.st_gid) == (500007, 500008)
        assert sorted(os.listdir(root / "dir")) == ["below", "file", "new"]
        assert os.stat(root).st_uid == 500000
        # A second container of the range shares its tree; the helper attaches nothing but the container's own mount.
        client.prepare("second", top, mapping=RANGE)
        assert len(own_mounts(daemon)) - count == {"overlay": 1, "bind": 2, "helper": 0}[form]
        client.remove("second")
        in_range = ["setpriv", "--reuid=500007", "--regid=500008", "--clear-groups"]
        subprocess.run([*in_range, "sh", "-c", "echo eight > owned"], cwd=root, check=True)
        in_range = ["setpriv", "--reuid=500000", "--regid=500000", "--clear-groups"]
        subprocess.run([*in_range, "sh", "-c", "rm dir/new && echo made > dir/made"], cwd=root, check=True)
        assert os.stat(root / "dir/made").st_uid == 500000
    client.commit("changed", "container")
    assert len(own_mounts(daemon)) == count
    # What was committed carries the image's ids again, whatever the container's range was.
    for mapping, shift in ((None, 0), ("0:700000:65536", 700000)):
        labels = {} if mapping is None else {"mapping": mapping}
        with mounted(client.prepare(f"on-{shift}", "changed", **labels), tmp_path / "root") as root:
            owners = [os.stat(root / name).st_uid - shift for name in (".", "owned", "dir/made", "dir/file", "run")]
            assert owners == [0, 7, 0, 0, 0]
            assert sorted(os.listdir(root / "dir")) == ["below", "file", "made"]
            assert (root / "owned").read_text() == "eight\n"


def test_a_mapping_of_several_ranges(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    top = chain(base)
    answer = client.prepare("container", top, mapping="0:500000:7,7:600000:100")
    with mounted(answer, tmp_path / "root") as root:
        assert (os.stat(root).st_uid, os.stat(root / "owned").st_uid) == (500000, 600000)


def test_a_mapped_view_is_read_only_and_shifted(client: Client, chain: Callable[..., str], tmp_path: Path) -> None:
    top = chain(base, change)
    with mounted(client.view("view", top, mapping=RANGE), tmp_path / "root") as root:
        assert os.stat(root / "owned").st_uid == 500007
        with pytest.raises(OSError, match="Read-only"):
            (root / "file").write_text("x")


def test_what_containerd_chowned_is_not_mapped_as_well(client: Client, chain: Callable[..., str]) -> None:
    top = chain(base)
    with pytest.raises(Refused, match="remap-ids") as refused:
        client.prepare("shifted-remap", top, mapping=RANGE)
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    client.prepare("shifted-remap", top)
    client.commit("shifted", "shifted-remap")
    with pytest.raises(Refused, match="remap-ids"):
        client.prepare("container", "shifted", mapping=RANGE)


def test_usage_counts_the_snapshot_and_not_its_parents(
    client: Client, chain: Callable[..., str], tmp_path: Path
) -> None:
    def large(root: Path) -> None:
        (root / "large").write_bytes(os.urandom(1 << 20))

    top = chain(large, change_nothing)
    assert client.usage("layer-0").size >= 1 << 20
    assert client.usage(top).size < 1 << 16
    with mounted(client.prepare("container", top), tmp_path / "root") as root:
        (root / "more").write_bytes(os.urandom(1 << 19))
        os.link(root / "more", root / "link")
        os.sync()
        usage = client.usage("container")
    assert 1 << 19 <= usage.size < 1 << 20
    assert usage.inodes == 2


def change_nothing(root: Path) -> None:
    assert root.is_dir()


@pytest.mark.parametrize("form", ["overlay"], indirect=True)
def test_six_hundred_layers(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    """overlayfs takes 500. Written as containerd unpacks: into the upper, without a mount."""
    parent = ""
    for number in range(600):
        key, ref = f"extract-{number}", f"sha256:{number:064x}"
        labels = {"containerd.io/snapshot.ref": ref}
        (mount,) = client.prepare(key, parent, **labels)
        upper = [option.removeprefix("upperdir=") for option in mount.options if option.startswith("upperdir=")]
        fs = Path(upper[0] if upper else mount.source)
        (fs / f"file-{number}").write_text(str(number))
        (fs / "top").write_text(str(number))
        client.commit(ref, key, labels=labels)
        parent = ref
    with mounted(client.prepare("container", parent, mapping=RANGE), tmp_path / "root") as root:
        assert (root / "top").read_text() == "599"
        assert len(os.listdir(root)) == 601
        assert os.stat(root / "file-0").st_uid == 500000


def test_layers_unpacked_side_by_side_get_their_parents_at_the_commit(
    client: Client, chain: Callable[..., str], tmp_path: Path
) -> None:
    """As containerd 2.2 unpacks with the capability `rebase`: into the upper of an overlay, without a mount."""
    (tmp_path / "unpack").mkdir()
    refs = [f"sha256:{number:064x}" for number in range(3)]
    uppers = []
    for number in (2, 0, 1):  # in any order
        labels = {"containerd.io/snapshot.ref": refs[number]}
        (mount,) = client.prepare(f"extract-{number}", **labels)
        assert mount.type == "overlay", "a bind makes containerd lose whiteouts"
        # What is answered can be mounted as well, and is empty.
        with mounted([mount], tmp_path / "root") as root:
            assert os.listdir(root) == []
        upper = next(option.removeprefix("upperdir=") for option in mount.options if option.startswith("upperdir="))
        uppers.append((number, Path(upper)))
    fs = dict(uppers)
    base(fs[0])
    os.mknod(fs[0] / "hides-nothing", 0o600 | stat.S_IFCHR, 0)
    fs[0].chmod(0o1711)
    (fs[1] / "dir").mkdir(mode=0o700)
    os.mknod(fs[1] / "dir/other", 0o600 | stat.S_IFCHR, 0)
    os.mknod(fs[1] / "run", 0o600 | stat.S_IFCHR, 0)
    (fs[2] / "dir").mkdir()
    os.setxattr(fs[2] / "dir", "trusted.overlay.opaque", b"y")
    (fs[2] / "dir/only").write_text("only\n")
    client.commit(refs[0], "extract-0", labels={"containerd.io/snapshot.ref": refs[0]})
    with pytest.raises(Refused) as refused:
        client.commit(refs[2], "extract-2", refs[1])
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    client.commit(refs[1], "extract-1", refs[0], labels={"containerd.io/snapshot.ref": refs[1]})
    client.commit(refs[2], "extract-2", refs[1], labels={"containerd.io/snapshot.ref": refs[2]})
    assert [client.stat(ref).parent for ref in refs] == ["", refs[0], refs[1]]
    with mounted(client.view("first", refs[0]), tmp_path / "root") as root:
        assert sorted(os.listdir(root)) == ["dir", "owned", "run"]
    with mounted(client.prepare("second", refs[1], mapping=RANGE), tmp_path / "root") as root:
        assert (sorted(os.listdir(root)), sorted(os.listdir(root / "dir"))) == (["dir", "owned"], ["below", "file"])
    with mounted(client.prepare("third", refs[2]), tmp_path / "root") as root:
        assert (sorted(os.listdir(root)), os.listdir(root / "dir")) == (["dir", "owned"], ["only"])
        assert stat.S_IMODE(os.stat(root).st_mode) == 0o1711, "a layer that does not name its root keeps the parent's"
    # A parent that is there already cannot change.
    client.prepare("on", refs[0])
    with pytest.raises(Refused) as refused:
        client.commit("moved", "on", refs[1])
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
