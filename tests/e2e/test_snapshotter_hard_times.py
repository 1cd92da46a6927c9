"""The snapshot service in hard times: disks that fill or turn read-only, clients that hang, mounts that are busy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.snapshotter.service import SERVICE
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.kernel import own_namespace
from tests.snapshotting import Daemon, Refused, commit_layers, mounted, own_mounts, serving

RANGE = "0:500000:65536"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    enter_private_mounts()
    with serving(tmp_path, "overlay") as running:
        yield running


def test_a_disk_that_fills_fails_one_call_and_loses_nothing(tmp_path: Path) -> None:
    enter_private_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    own_namespace.mount("disk", str(disk), "tmpfs", options="size=8m")
    with serving(disk, "overlay") as daemon, daemon.client() as client:
        top = commit_layers(client, tmp_path)
        filler = disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 65536)
        refused = 0
        for number in range(200):
            try:
                client.prepare(f"c-{number}", top)
            except Refused as error:
                assert error.code is grpc.StatusCode.UNAVAILABLE
                assert "free space" in error.details
                refused += 1
        assert refused
        # On the full disk what makes it emptier still works: the store's reserve is for that.
        reserve = disk / "store/v1/reserve"
        with suppress(OSError), open(disk / "filler2", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        for name in client.names("kind==active"):
            client.remove(name)
        client.remove("layer-2")
        client.cleanup()
        assert client.names() == {"layer-0", "layer-1"}
        # It is also how a service starts on a disk that was full when it was killed.
        with suppress(OSError), open(disk / "filler3", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        daemon.stop(signal.SIGKILL)
        daemon.start()
        client.remove("layer-1")
        assert client.names() == {"layer-0"}
        for path in disk.glob("filler*"):
            path.unlink()
        client.prepare("after", "layer-0")
        deadline = time.monotonic() + 20
        while not (reserve.is_dir() and len(os.listdir(reserve)) == 4):
            assert time.monotonic() < deadline, "the reserve is set aside again when there is room"
            time.sleep(0.5)
            client.remove("after")
            client.prepare("after", "layer-0")
        client.clear()
    own_namespace.umount(str(disk))


def test_a_client_that_hangs_in_the_middle_of_a_call_holds_nobody_up(daemon: Daemon, tmp_path: Path) -> None:
    """It sends the head of a request, and stops; another does not read what it is answered."""
    head = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
    # A HEADERS frame without END_HEADERS or END_STREAM, whose rest never comes.
    half = bytes.fromhex("000040010000000001") + b"\x83\x86"
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
    hanging = []
    try:
        for sent in (head, head + half, head[:10]):
            for _ in range(20):
                one = socket.socket(socket.AF_UNIX)
                one.connect(str(daemon.socket))
                one.sendall(sent)
                hanging.append(one)
        deaf = daemon.client()
        blocks = deaf._channel.unary_stream(
            f"/{SERVICE}/List", wire.ListRequest.SerializeToString, wire.ListResponse.FromString
        )(wire.ListRequest())
        begun = time.monotonic()
        with daemon.client() as client:
            for number in range(50):
                client.prepare(f"c-{number}", top)
                client.remove(f"c-{number}")
            client.clear()
        assert time.monotonic() - begun < 20, "a call's own deadline, and nobody waited for the others"
        assert daemon.stop() < 2
        blocks.cancel()
        deaf.__exit__()
    finally:
        for one in hanging:
            one.close()
    daemon.start()


def test_a_store_that_turns_read_only_answers_reads_and_loses_nothing(tmp_path: Path) -> None:
    """As ext4 does by itself after an error of its disk, with files open for writing: mount -o remount,abort."""
    enter_private_mounts()
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(disk)]
    subprocess.run(mount, check=True)
    daemon = Daemon(disk / "store", tmp_path / "run", "overlay")
    try:
        daemon.start()
        with daemon.client() as client:
            top = commit_layers(client, tmp_path)
            client.prepare("container", top)
            os.sync()
            subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=False, capture_output=True)
            with pytest.raises(OSError, match="Read-only"):
                (disk / "file").touch()
            names = {"layer-0", "layer-1", "layer-2", "container"}
            assert client.stat("container").name == "container"
            assert client.mounts("container")
            assert client.names() == names
            for refusal in (
                lambda: client.prepare("other", top),
                lambda: client.remove("container"),
                lambda: client.commit("more", "container"),
            ):
                with pytest.raises(Refused) as refused:
                    refusal()
                assert refused.value.code is grpc.StatusCode.UNAVAILABLE, refused.value
                assert "read" in refused.value.details.lower() and "only" in refused.value.details.lower()
            assert client.names() == names
        assert daemon.stop() < 2
        own_namespace.umount(str(disk))
        subprocess.run(["e2fsck", "-fy", str(image)], check=False, capture_output=True)
        subprocess.run(mount, check=True)
        daemon.start()
        with daemon.client() as client:
            assert client.names() == names
            with mounted(client.mounts("container"), tmp_path / "root") as root:
                assert sorted(os.listdir(root)) == ["file-0", "file-1", "file-2"]
            client.clear()
        daemon.stop()
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.stop(signal.SIGKILL)
        own_namespace.umount(str(disk), own_namespace.MNT_DETACH)
    assert own_mounts(daemon) == []


def test_a_root_that_is_busy_keeps_its_files_and_what_lies_beneath(tmp_path: Path) -> None:
    """Form bind: `umount` says EBUSY, and nothing may be deleted through a mount that is still there."""
    enter_private_mounts()
    with serving(tmp_path, "bind") as daemon, daemon.client() as client:
        top = commit_layers(client, tmp_path)
        (answer,) = client.prepare("container", top)
        with open(Path(answer.source) / "file-0"):
            client.remove("container")
            with pytest.raises(Refused, match="EBUSY") as refused:
                client.cleanup()
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert sorted(os.listdir(answer.source)) == ["file-0", "file-1", "file-2"]
            assert len(own_mounts(daemon)) == 1
        client.cleanup()
        assert own_mounts(daemon) == []
        for number in range(3):
            (found,) = daemon.data.glob(f"snapshots/*/fs/file-{number}")
            assert found.read_text() == "content\n"
        client.clear()


def test_a_container_that_still_stands_keeps_what_lies_beneath(daemon: Daemon, tmp_path: Path) -> None:
    """Form overlay: its mount is containerd's. Snapshots go while it stands and is busy; no file of a lower goes."""
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
        with mounted(client.prepare("container", top, mapping=RANGE), tmp_path / "root") as root:
            (root / "written").write_text("x")
            with open(root / "file-0") as sentinel:
                with pytest.raises(OSError, match="Errno 16"):
                    own_namespace.umount(str(root))
                client.remove("container")
                client.cleanup()
                assert sentinel.read() == "content\n"
                assert (root / "file-0").read_text() == "content\n"
        for number in range(3):
            (found,) = daemon.data.glob(f"snapshots/*/fs/file-{number}")
            assert found.read_text() == "content\n"
        with mounted(client.view("again", top), tmp_path / "root") as root:
            assert sorted(os.listdir(root)) == ["file-0", "file-1", "file-2"]
        client.clear()
