"""The snapshot service in hard times: disks that fill or turn read-only, clients that hang, mounts that are busy."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.snapshotter.service import SERVICE
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.conftest import SOAK
from tests.disks import cut_power, mounted_disk, new_disk
from tests.kernel import own_namespace
from tests.snapshotting import STOP_S, Daemon, Refused, commit_layers, mounted, own_mounts, serving

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
        deadline = time.monotonic() + 60
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
        assert daemon.stop() < STOP_S
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
        assert daemon.stop() < STOP_S
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


@contextmanager
def stalls(place: Path) -> Iterator[list[float]]:
    """Seconds by which a thread that syncs a file in `place` five times a second has been late until now."""
    late: list[float] = []
    over = threading.Event()

    def syncing() -> None:
        with open(place / "canary", "wb", buffering=0) as file:
            begun = time.monotonic()
            while not over.wait(0.2):
                file.write(b"x")
                os.fdatasync(file.fileno())
                now = time.monotonic()
                late.append(now - begun - 0.2)
                begun = now

    thread = threading.Thread(target=syncing)
    thread.start()
    try:
        yield late
    finally:
        over.set()
        thread.join()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_power_cut_takes_no_layer_and_no_snapshot_that_is_a_second_old(tmp_path: Path, seed: int) -> None:
    """What was committed is there whenever the cut comes; of what was prepared, all but the last second."""
    enter_private_mounts()
    chance, cuts, lost = random.Random(seed), 50 if SOAK else 5, 0
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    new_disk(image, 1 << 30)
    daemon = Daemon(disk / "store", tmp_path / "run", "overlay")
    layers: list[str] = []
    containers: dict[str, float] = {}
    removed: dict[str, float] = {}
    for cut in range(cuts):
        with mounted_disk(image, disk), stalls(tmp_path) as late:
            daemon.start()
            with daemon.client() as client:
                until = time.monotonic() + 1.5 + chance.random()
                # So few that the disk has room for all of them, and the cut comes at any moment all the same.
                for _ in range(chance.randrange(5, 40)):
                    if time.monotonic() > until:
                        break
                    number, parent = len(layers), layers[-1] if layers and chance.random() < 0.8 else ""
                    key = f"key-{cut}-{number}"
                    with mounted(client.prepare(key, parent), tmp_path / "unpack") as root:
                        (root / f"file-{number}").write_text(f"content of {number}\n")
                    client.commit(f"layer-{number}", key)
                    layers.append(f"layer-{number}")
                    name = f"container-{cut}-{number}"
                    client.prepare(name, layers[-1], mapping=RANGE if chance.random() < 0.5 else None)
                    containers[name] = time.monotonic()
                    if chance.random() < 0.3:
                        gone = chance.choice([*containers])
                        client.remove(gone)
                        del containers[gone]
                        removed[gone] = time.monotonic()
                        client.cleanup()
            at = time.monotonic()
            cut_power(disk)
            # The service syncs half a second after a change, and is as late as this machine makes it.
            old_s = 1.2 + 3 * max(late, default=0.0)
            daemon.stop(signal.SIGKILL)
            detach(own_mounts(daemon))
        with mounted_disk(image, disk):
            daemon.start()
            with daemon.client() as client:
                names = client.names()
                assert set(layers) <= names
                old = {name for name, since in containers.items() if at - since > old_s}
                assert old <= names, "what is a second old is on disk"
                assert names - set(layers) <= {*containers, *removed, *(f"key-{cut}-{n}" for n in range(len(layers)))}
                for name in set(containers) & names:
                    with mounted(client.mounts(name), tmp_path / "root") as root:
                        assert os.listdir(root)
                for number in chance.sample(range(len(layers)), min(5, len(layers))):
                    with mounted(client.view("look", f"layer-{number}"), tmp_path / "root") as root:
                        assert (root / f"file-{number}").read_text() == f"content of {number}\n"
                    client.remove("look")
                lost += len(set(containers) - names)
                for name in names - set(layers) - set(containers):
                    client.remove(name)
                for name in set(containers) - names:  # as containerd does, which has them on disk
                    client.prepare(name, layers[-1])
                removed.clear()
                client.cleanup()
                containers = dict.fromkeys(containers, -1e9)
            assert daemon.stop() < STOP_S
            detach(own_mounts(daemon))
    print(f"{cuts} power cuts, {len(layers)} layers, {lost} of {len(containers)} containers were younger than a second")


def detach(points: list[str]) -> None:
    """A machine that has no power has no mounts either."""
    for point in points:
        own_namespace.umount(point, own_namespace.MNT_DETACH)


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
