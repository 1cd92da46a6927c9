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
from tests.conftest import SOAK
from tests.kernel import own_namespace
from tests.snapshotting import (
    STOP_S,
    Client,
    Daemon,
    Refused,
    commit_layers,
    empty,
    mount_answer,
    mounted,
    own_mounts,
    serving,
)
from tests.waiting import listens, until

CYCLES = 5000 if SOAK else 300
KILLS = 30 if SOAK else 3
RANGE = "0:500000:65536"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    enter_private_mounts()
    with serving(tmp_path, "overlay") as running:
        yield running


def descriptors(daemon: Daemon) -> int:
    assert daemon.process is not None
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def resident_kb(daemon: Daemon) -> int:
    assert daemon.process is not None
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))


def running_in(directory: Path) -> bool:
    """Whether a process still has `directory` as its working directory."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == directory:
                return True
    return False


def test_sigterm_ends_it_within_a_second_and_undoes_no_mount(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.client() as client:
        top = commit_layers(client, tmp_path)
        with mounted(client.prepare("container", top, mapping=RANGE), tmp_path / "root") as root:
            before = own_mounts(daemon)
            assert len(before) == 1
            for _ in range(10):
                took_s = daemon.stop()
                assert daemon.process is not None
                assert daemon.process.returncode == 0
                assert own_mounts(daemon) == before
                if took_s < 1:  # a busy machine's doing is not in each of them
                    break
                daemon.start()
            assert took_s < 1
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
        while not stop.wait(0.3 + 1.2 * chance.random()):
            resident.append(resident_kb(daemon))
            daemon.stop(signal.SIGKILL)
            daemon.start()
            kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    failures = 0
    try:
        cycle = -1
        # As many as there are to be, and until it was killed a few times meanwhile.
        while cycle + 1 < CYCLES or kills < KILLS:
            cycle += 1
            assert time.monotonic() < begun + 3600
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
        stood = sorted(os.listdir(survivor))
        lived = (survivor / "count").read_text().splitlines()
        while running_in(survivor):  # its own last child
            time.sleep(0.05)
        own_namespace.umount(str(survivor))
    assert kills >= KILLS
    assert alive, "the container ended while the service was killed"
    assert len(lived) > time.monotonic() - begun, "it stood still"
    assert stood == ["count", "file-0", "file-1", "file-2"]
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
        for info in sorted(client.infos(), key=lambda info: info.created_at.ToNanoseconds(), reverse=True):
            client.remove(info.name)
        until = time.monotonic() + 600
        while True:  # thousands of trees take longer than one call may
            try:
                client.cleanup()
                break
            except Refused as refused:
                assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED, refused
                assert time.monotonic() < until
        assert client.names() == set()
        empty(daemon, client)
    assert own_mounts(daemon) == []
    assert os.listdir(daemon.data / "trash") == []
    assert descriptors(daemon) <= open_before + 2
    assert resident_kb(daemon) < before + 30_000
    assert daemon.stop() < STOP_S
    daemon.start()
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
                assert process.wait(timeout=60) == 0
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
            until(lambda: listens(daemon.socket))
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
            assert process.wait(timeout=60) == 0
            while "STOPPING=1" not in said:
                said += notified.recv(1000).decode().split("\n")
        finally:
            process.kill()
            process.wait()


def test_a_call_that_takes_too_long_is_told_so_and_goes_on(tmp_path: Path) -> None:
    """The wire's own part, with a disk that does not answer in place of a store."""
    from flatmount.snapshotter.service import Service

    class Stuck:
        def __init__(self) -> None:
            self.go_on = asyncio.Event()
            self.done = False

        def keep_answers(self, keeps: object) -> None:
            pass

        def remove_soon(self, key: str, done: object) -> bool:
            return False

        async def remove(self, key: str) -> None:
            await self.go_on.wait()
            self.done = True

    async def body() -> bool:
        stuck = Stuck()
        service = Service(stuck, 0.2)  # type: ignore[arg-type]
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        service.serve(listening)

        def call() -> None:
            with Client(tmp_path / "s") as client, pytest.raises(Refused) as refused:
                client.remove("key")
            assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED

        await asyncio.to_thread(call)
        assert not stuck.done
        stuck.go_on.set()
        await service.close(60)
        return stuck.done

    assert asyncio.run(body())
