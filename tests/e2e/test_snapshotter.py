"""The snapshot service as a process: kills, restarts, signals, disks that fill or turn read-only, clients that hang."""

from __future__ import annotations

import asyncio
import configparser
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.snapshotter.service import SERVICE
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.conftest import SOAK
from tests.kernel import own_namespace
from tests.snapshotting import Client, Daemon, Refused, mount_answer, mounted, own_mounts, serving

CYCLES = 5000 if SOAK else 300
RANGE = "0:500000:65536"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    enter_private_mounts()
    with serving(tmp_path, "overlay") as running:
        yield running


def commit_layers(client: Client, work: Path, count: int = 3) -> str:
    parent = ""
    for number in range(count):
        with mounted(client.prepare(f"key-{number}", parent), work / "unpack") as root:
            (root / f"file-{number}").write_text("content\n")
        client.commit(f"layer-{number}", f"key-{number}")
        parent = f"layer-{number}"
    return parent


def descriptors(daemon: Daemon) -> int:
    assert daemon.process is not None
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def resident_kb(daemon: Daemon) -> int:
    assert daemon.process is not None
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))


def test_sigterm_ends_it_within_a_second_and_undoes_no_mount(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
        with mounted(client.prepare("container", top, mapping=RANGE), tmp_path / "root") as root:
            before = own_mounts(daemon)
            assert len(before) == 1
            assert daemon.stop() < 1
            assert daemon.process is not None
            assert daemon.process.returncode == 0
            assert own_mounts(daemon) == before
            assert (root / "file-2").read_text() == "content\n"
            daemon.start()
            with daemon.client() as again, mounted(again.mounts("container"), tmp_path / "again") as other:
                assert (other / "file-0").read_text() == "content\n"
                assert own_mounts(daemon) == before
        with daemon.client() as again:
            again.clear()
    assert own_mounts(daemon) == []


def test_a_range_that_a_reboot_took_is_attached_again(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
        client.prepare("container", top, mapping=RANGE)
    daemon.stop(signal.SIGKILL)
    (tree,) = own_mounts(daemon)
    own_namespace.umount(tree)
    daemon.start()
    with daemon.client() as client, mounted(client.mounts("container"), tmp_path / "root") as root:
        assert os.stat(root / "file-0").st_uid == 500000
        assert own_mounts(daemon) == [tree]
    with daemon.client() as client:
        client.clear()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kills_lose_nothing_and_leave_nothing(daemon: Daemon, tmp_path: Path, seed: int) -> None:
    """Prepare, mount, unmount, remove, and now and then a commit, while the service is killed every few seconds.

    A container that was there before runs through all of it.
    """
    chance = random.Random(seed)
    begun = time.monotonic()
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
        survivor = tmp_path / "survivor"
        survivor.mkdir()
        mount_answer(client.prepare("survivor", top, mapping="0:400000:65536"), survivor)
    (survivor / "count").touch()
    program = "while :; do cat file-0 > /dev/null && echo alive >> count || exit 1; sleep 0.05; done"
    running = subprocess.Popen(["sh", "-c", program], cwd=survivor)
    resident: list[int] = []
    sentinel = tmp_path / "sentinel"
    committed = {"layer-0", "layer-1", "layer-2"}
    stop = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        while not stop.wait(0.5 + 1.5 * chance.random()):
            resident.append(resident_kb(daemon))
            daemon.stop(signal.SIGKILL)
            daemon.start()
            kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    failures = 0
    try:
        for cycle in range(CYCLES):
            try:
                with Client(daemon.socket, timeout_s=5) as client:
                    key = f"container-{cycle}"
                    mapping = {"mapping": f"0:{500000 + 65536 * (cycle % 5)}:65536"} if cycle % 2 else {}
                    answer = client.prepare(key, top, **mapping)
                    with mounted(answer, sentinel) as root:
                        assert (root / "file-0").read_text() == "content\n"
                        (root / "written").write_text(str(cycle))
                    if cycle % 10 == 0:
                        client.commit(f"committed-{cycle}", key)
                        committed.add(f"committed-{cycle}")
                    else:
                        client.remove(key)
            except Refused as refused:
                assert refused.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), refused
                failures += 1
                while not daemon.answers():
                    time.sleep(0.05)
    finally:
        stop.set()
        killer.join()
        alive = running.poll() is None
        running.kill()
        running.wait()
        lived = (survivor / "count").read_text().splitlines()
        with suppress(OSError):
            own_namespace.umount(str(survivor))
    assert kills >= 2
    assert alive, "the container ended while the service was killed"
    assert len(lived) > time.monotonic() - begun, "it stood still"
    assert len(os.listdir(survivor)) == 0, "its mount is gone"
    # Each is of another process, a moment before it was killed.
    assert resident[-1] < resident[0] + 30_000
    with daemon.client() as client:
        assert committed <= client.names("kind==committed")
        for name in sorted(committed - {"layer-0", "layer-1", "layer-2"}):
            with mounted(client.view(f"view-{name}", name), tmp_path / "view") as root:
                assert (root / "written").read_text() == name.removeprefix("committed-")
                assert (root / "file-0").read_text() == "content\n"
            client.remove(f"view-{name}")
        before = resident_kb(daemon)
        open_before = descriptors(daemon)
        client.clear()
        assert client.names() == set()
    assert own_mounts(daemon) == []
    assert os.listdir(daemon.data / "snapshots") == []
    assert os.listdir(daemon.data / "trash") == []
    assert descriptors(daemon) <= open_before + 2
    assert resident_kb(daemon) < before + 30_000
    took = time.monotonic() - begun
    print(f"{CYCLES} cycles, {kills} kills, {failures} calls cut, {len(committed)} commits, 0 lost, {took:.0f} s")
    print(
        f"resident first {resident[0]} kB, last {resident[-1]} kB, most {max(resident)} kB; {len(lived)} signs of life"
    )


def test_many_cycles_leave_descriptors_and_memory_as_they_were(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)

        def cycles(count: int) -> tuple[int, int]:
            for number in range(count):
                client.prepare(f"c-{number}", top, mapping=f"0:{600000 + 65536 * (number % 7)}:65536")
                client.mounts(f"c-{number}")
                client.remove(f"c-{number}")
            client.cleanup()
            return descriptors(daemon), resident_kb(daemon)

        first = cycles(60)
        second = cycles(240)
        client.clear()
    assert second[0] <= first[0] + 2
    assert second[1] <= first[1] + 8_000


def test_the_same_key_at_once_is_made_once(daemon: Daemon) -> None:
    results: list[str] = []

    def prepare() -> None:
        with daemon.client() as client:
            try:
                client.prepare("same")
                results.append("made")
            except Refused as refused:
                results.append(refused.code.name)

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["ALREADY_EXISTS"] * 7 + ["made"]


def test_a_second_service_on_one_store_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flatmount", "snapshotter", "--root", str(daemon.root)]
    environment = {**os.environ, "FLATMOUNT_RUN": str(tmp_path / "other")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "another snapshotter serves the store" in done.stderr
    taken = [*command[:-1], str(tmp_path / "store2"), "--socket", str(daemon.socket)]
    done = subprocess.run(taken, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "somebody listens" in done.stderr
    assert daemon.answers()


def test_a_client_that_hangs_and_one_that_talks_nonsense_harm_nobody(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as loud:
        silent.connect(str(daemon.socket))
        loud.connect(str(daemon.socket))
        loud.sendall(os.urandom(4096))
        with daemon.client() as client:
            client.prepare("key")
            client.clear()
    assert daemon.answers()


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


def test_a_store_that_turns_read_only_still_answers_reads(tmp_path: Path) -> None:
    enter_private_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    own_namespace.mount("disk", str(disk), "tmpfs")
    read_only = own_namespace.MS_BIND | 1 | 32
    with serving(tmp_path, "overlay") as daemon:
        daemon.stop()
        elsewhere = Daemon(disk / "store", tmp_path / "run2", "overlay")
        elsewhere.start()
        with elsewhere.client() as client:
            top = commit_layers(client, tmp_path)
            client.prepare("container", top)
            own_namespace.mount(str(disk), str(disk), flags=own_namespace.MS_BIND)
            own_namespace.mount("", str(disk), flags=read_only)
            assert client.stat("container").name == "container"
            assert client.mounts("container")
            with pytest.raises(Refused) as refused:
                client.prepare("other", top)
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert "read-only" in refused.value.details.lower() or "readonly" in refused.value.details.lower()
            with pytest.raises(Refused):
                client.remove("container")
            assert client.names() == {"layer-0", "layer-1", "layer-2", "container"}
        own_namespace.umount(str(disk))
        with elsewhere.client() as client:
            # Nothing was lost, and it can be written again without a restart.
            assert client.names() == {"layer-0", "layer-1", "layer-2", "container"}
            client.prepare("other", top)
        elsewhere.stop()
        daemon.start()
    own_namespace.umount(str(disk))


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
            assert (daemon.data / f"snapshots/{number + 1}/fs/file-{number}").read_text() == "content\n"
        client.clear()


def test_a_container_that_still_stands_keeps_what_lies_beneath(daemon: Daemon, tmp_path: Path) -> None:
    """Form overlay: its mount is containerd's. Snapshots go while it stands and is busy; no file of a lower goes."""
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
        with mounted(client.prepare("container", top, mapping=RANGE), tmp_path / "root") as root:
            (root / "written").write_text("x")
            with open(root / "file-0") as sentinel:
                with pytest.raises(OSError, match="busy"):
                    own_namespace.umount(str(root))
                client.remove("container")
                client.cleanup()
                assert sentinel.read() == "content\n"
                assert (root / "file-0").read_text() == "content\n"
        for number in range(3):
            assert (daemon.data / f"snapshots/{number + 1}/fs/file-{number}").read_text() == "content\n"
        with mounted(client.view("again", top), tmp_path / "root") as root:
            assert sorted(os.listdir(root)) == ["file-0", "file-1", "file-2"]
        client.clear()


def test_metrics_and_health(tmp_path: Path) -> None:
    enter_private_mounts()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(tmp_path, "overlay", "--metrics", f"127.0.0.1:{port}") as daemon, daemon.client() as client:
        top = commit_layers(client, tmp_path)
        client.prepare("container", top, mapping=RANGE)
        with pytest.raises(Refused):
            client.stat("nobody")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        assert 'flatmount_snapshotter_calls_total{call="Stat",code="NOT_FOUND"} 1' in lines
        assert "flatmount_snapshotter_range_mounts 1" in lines
        assert 'flatmount_snapshotter_snapshots{kind="committed"} 3' in lines
        assert client.health("containerd.services.snapshots.v1.Snapshots") == 1
        with pytest.raises(Refused) as refused:
            client.health("other")
        assert refused.value.code is grpc.StatusCode.NOT_FOUND
        client.clear()


LAUNCHER = """
import os, sys
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), "1"
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.execv(sys.executable, [sys.executable, "-m", "flatmount", *sys.argv[2:]])
"""


def test_socket_activation_and_readiness(tmp_path: Path) -> None:
    """With systemd's socket a client that calls during a restart waits, and is answered."""
    enter_private_mounts()
    daemon = Daemon(tmp_path / "store", tmp_path / "run")
    daemon.run.mkdir()
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notify"))
    notified.settimeout(30)
    with notified, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemon.socket))
        listening.listen(64)
        environment = {**os.environ, "FLATMOUNT_RUN": str(daemon.run), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [sys.executable, "-c", LAUNCHER, str(listening.fileno()), "snapshotter", "--root", str(daemon.root)]
        for key in ("first", "second"):
            answered: list[set[str]] = []

            def call(key: str = key, answered: list[set[str]] = answered) -> None:
                with daemon.client() as client:
                    client.prepare(key)
                    answered.append(client.names())

            waiting = threading.Thread(target=call)
            waiting.start()
            time.sleep(0.2)
            process = subprocess.Popen(
                command, env=environment, pass_fds=[listening.fileno()], stderr=subprocess.DEVNULL
            )
            try:
                while b"READY=1" not in notified.recv(1000):
                    pass
                waiting.join(timeout=30)
                process.terminate()
                assert process.wait(timeout=10) == 0
            finally:
                process.kill()
                process.wait()
            assert answered
            assert key in answered[0]


UNITS = Path(__file__).parents[2] / "deploy/systemd"


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("machine cannot: there is no systemd-analyze")
    here = tmp_path / "units"
    here.mkdir()
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/bin/flatmount", sys.executable)
        (here / unit.name).write_text(text)
    done = subprocess.run([program, "verify", *here.iterdir()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    service = configparser.RawConfigParser(strict=False)
    service.read(UNITS / "flatmount-snapshotter.service")
    assert service["Service"]["Type"] == "notify"
    assert service["Service"]["KillMode"] == "process"


def test_systemds_own_activation_and_watchdog(tmp_path: Path) -> None:
    """systemd-socket-activate starts it at the first call; a watchdog of two seconds is fed, and READY comes first."""
    program = shutil.which("systemd-socket-activate")
    if program is None:
        pytest.skip("machine cannot: there is no systemd-socket-activate")
    enter_private_mounts()
    daemon = Daemon(tmp_path / "store", tmp_path / "run")
    daemon.run.mkdir()
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notify"))
    notified.settimeout(30)
    given = {"FLATMOUNT_RUN": daemon.run, "NOTIFY_SOCKET": tmp_path / "notify", "WATCHDOG_USEC": 2_000_000}
    command = [program, f"--listen={daemon.socket}", *(f"--setenv={key}={value}" for key, value in given.items())]
    command += [sys.executable, "-m", "flatmount", "snapshotter", "--root", str(daemon.root)]
    with notified, open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while not daemon.socket.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with daemon.client() as client:
                client.prepare("first")
                assert client.names() == {"first"}
            said = []
            while said.count("WATCHDOG=1") < 4:
                said += notified.recv(1000).decode().split("\n")
                if "READY=1" not in said:
                    assert set(said) <= {"WATCHDOG=1"}, said
            assert "READY=1" in said
            process.terminate()
            assert process.wait(timeout=10) == 0
            while "STOPPING=1" not in said:
                said += notified.recv(1000).decode().split("\n")
        finally:
            process.kill()
            process.wait()


def test_a_call_that_takes_too_long_is_told_so_and_goes_on(tmp_path: Path) -> None:
    """The wire's own part, with a disk that does not answer in place of a store."""
    from flatmount.snapshotter.metrics import Metrics
    from flatmount.snapshotter.service import Service

    class Stuck:
        done = False

        async def remove(self, key: str) -> None:
            await asyncio.sleep(0.6)
            self.done = True

    stuck = Stuck()

    async def body() -> None:
        service = Service(stuck, Metrics(), 0.2)  # type: ignore[arg-type]
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(tuple(service.handlers()))
        server.add_insecure_port(f"unix:{tmp_path}/s")
        await server.start()

        def call() -> None:
            with Client(tmp_path / "s") as client, pytest.raises(Refused) as refused:
                client.remove("key")
            assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED

        await asyncio.to_thread(call)
        assert not stuck.done
        await service.finish(5)
        await server.stop(0)

    asyncio.run(body())
    assert stuck.done
