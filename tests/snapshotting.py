"""A snapshot service as a process, a client for its socket, and what containerd does with its answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from flatmount.snapshotter.ahead import READY
from flatmount.snapshotter.service import HEALTH, SERVICE
from flatmount.snapshotter.wire import snapshots_pb2 as wire
from tests.kernel import own_namespace
from tests.waiting import until

MS_RDONLY, MS_REMOUNT = 1, 32
START_S = 60
STOP_S = 15  # half of what a call may take by itself: a stop waits for none


class Refused(Exception):
    """A call ended with another status than OK."""

    def __init__(self, error: grpc.RpcError) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")  # type: ignore[attr-defined]
        self.code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        self.details: str = error.details()  # type: ignore[attr-defined]


class Client:
    """Calls on one socket. A context manager."""

    def __init__(self, socket: Path, *, timeout_s: float = 20) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=(("grpc.enable_retries", 0),))
        self._timeout_s = timeout_s

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def _call(self, method: str, request: Any, answer: Any, *, service: str = SERVICE) -> Any:
        call = self._channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        try:
            return call(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise Refused(error) from None

    def prepare(self, key: str, parent: str = "", **labels: str) -> list[wire.Mount]:
        return self._create("Prepare", key, parent, labels)

    def view(self, key: str, parent: str = "", **labels: str) -> list[wire.Mount]:
        return self._create("View", key, parent, labels)

    def _create(self, method: str, key: str, parent: str, labels: dict[str, str]) -> list[wire.Mount]:
        mapping = labels.pop("mapping", None)
        if mapping is not None:
            labels |= {f"containerd.io/snapshot/{kind}mapping": mapping for kind in ("uid", "gid")}
        request = wire.CreateRequest(snapshotter="flatmount", key=key, parent=parent, labels=labels)
        return list(self._call(method, request, wire.MountsResponse).mounts)

    def mounts(self, key: str) -> list[wire.Mount]:
        return list(self._call("Mounts", wire.KeyRequest(key=key), wire.MountsResponse).mounts)

    def commit(self, name: str, key: str, parent: str = "", labels: dict[str, str] | None = None) -> None:
        self._call("Commit", wire.CommitRequest(name=name, key=key, parent=parent, labels=labels or {}), wire.Empty)

    def remove(self, key: str) -> None:
        self._call("Remove", wire.KeyRequest(key=key), wire.Empty)

    def stat(self, key: str) -> wire.Info:
        info: wire.Info = self._call("Stat", wire.KeyRequest(key=key), wire.InfoResponse).info
        return info

    def usage(self, key: str) -> wire.UsageResponse:
        usage: wire.UsageResponse = self._call("Usage", wire.KeyRequest(key=key), wire.UsageResponse)
        return usage

    def cleanup(self) -> None:
        self._call("Cleanup", wire.CleanupRequest(), wire.Empty)

    def names(self, *filters: str) -> set[str]:
        return {info.name for info in self.infos(*filters)}

    def infos(self, *filters: str) -> list[wire.Info]:
        call = self._channel.unary_stream(
            f"/{SERVICE}/List", wire.ListRequest.SerializeToString, wire.ListResponse.FromString
        )
        try:
            blocks = call(wire.ListRequest(filters=filters), timeout=self._timeout_s)
            return [info for block in blocks for info in block.info]
        except grpc.RpcError as error:
            raise Refused(error) from None

    def clear(self) -> None:
        """Remove every snapshot, the youngest first, and their files."""
        for info in sorted(self.infos(), key=lambda info: info.created_at.ToNanoseconds(), reverse=True):
            self.remove(info.name)
        self.cleanup()

    def health(self, service: str = "") -> int:
        request = wire.HealthRequest(service=service)
        return int(self._call("Check", request, wire.HealthResponse, service=HEALTH).status)


def kept_trees(snapshots: Path) -> set[str]:
    """The directories of a store's snapshots, without the empty ones that the service makes ahead, this moment even."""
    kept, ahead = set(), 0
    for top in tuple(snapshots.iterdir()):
        try:
            inner = {path.name: any(path.iterdir()) for path in top.iterdir()}
        except FileNotFoundError:
            continue  # it is being deleted
        if inner.keys() <= {"fs", "work"} and not any(inner.values()):
            ahead += 1
        else:
            kept.add(top.name)
    assert ahead <= 2 * READY, "some of them are containers that have written nothing"
    return kept


def empty(daemon: Daemon, client: Client) -> None:
    """Clean up until no file of a removed snapshot is there; one whose flat tree is made this moment is spared."""

    def cleaned() -> bool:
        client.cleanup()
        return not kept_trees(daemon.data / "snapshots")

    until(cleaned)


@dataclass
class Daemon:
    """The service as a process of ours on a store of its own."""

    root: Path
    run: Path
    form: str = "auto"
    options: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.run / "snapshotter.sock"

    @property
    def data(self) -> Path:
        return self.root / "v1/data"

    @property
    def log(self) -> str:
        return self.run.with_suffix(".log").read_text()

    def start(self) -> None:
        command = [sys.executable, "-m", "flatmount", "snapshotter", "--root", str(self.root), "--form", self.form]
        environment = {**os.environ, "FLATMOUNT_RUN": str(self.run), **self.environment}
        with open(self.run.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen([*command, *self.options], env=environment, stderr=log)
        deadline = time.monotonic() + START_S
        while not self.answers():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def answers(self) -> bool:
        if not self.socket.exists():
            return False
        try:
            with Client(self.socket, timeout_s=2) as client:
                return client.health() == wire.HealthResponse.SERVING
        except Refused:
            return False

    def stop(self, number: int = 15) -> float:
        """Returns how long it took to end."""
        assert self.process is not None
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        return time.monotonic() - begun

    def client(self) -> Client:
        return Client(self.socket)


@contextmanager
def serving(directory: Path, form: str = "auto", *options: str) -> Iterator[Daemon]:
    """A service on a fresh store below `directory`; its own mounts are gone afterwards, or the test fails."""
    daemon = Daemon(directory / "store", directory / "run", form, options)
    daemon.start()
    try:
        yield daemon
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.stop()
        left = own_mounts(daemon)
        for point in left:
            own_namespace.umount(point, own_namespace.MNT_DETACH)
    assert not left, f"mounts left: {left}\n{daemon.log}"


def own_mounts(daemon: Daemon) -> list[str]:
    """Mount points of the service's own, in the order in which they were made."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split()[4]).startswith(f"{daemon.run}/")]


def mount_answer(mounts: Sequence[wire.Mount], target: Path) -> None:
    """Mount an answer as containerd does."""
    (mount,) = mounts
    kind, _, program = mount.type.partition(".")
    if kind == "fuse3":
        options = [word for option in mount.options for word in ("-o", option)]
        command = ["mount.fuse3", mount.source, str(target), *options, "-t", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    read_only = MS_RDONLY if "ro" in mount.options else 0
    if kind == "bind":
        assert set(mount.options) <= {"ro", "rw", "rbind"}
        flags = own_namespace.MS_BIND | own_namespace.MS_REC
        own_namespace.mount(mount.source, str(target), flags=flags)
        if read_only:
            own_namespace.mount("", str(target), flags=flags | MS_REMOUNT | read_only)
        return
    options = [option for option in mount.options if option not in ("ro", "rw")]
    own_namespace.mount(mount.source, str(target), kind, read_only, ",".join(options))


@contextmanager
def mounted(mounts: Sequence[wire.Mount], target: Path) -> Iterator[Path]:
    """An answer mounted at `target` for the time of the block."""
    target.mkdir(exist_ok=True)
    mount_answer(mounts, target)
    try:
        yield target
    finally:
        own_namespace.umount(str(target))


def commit_layers(client: Client, work: Path, count: int = 3) -> str:
    """Commit layer-0 to layer-(COUNT-1), one on the other, each with its own file; returns the topmost."""
    parent = ""
    for number in range(count):
        with mounted(client.prepare(f"key-{number}", parent), work / "unpack") as root:
            (root / f"file-{number}").write_text("content\n")
        client.commit(f"layer-{number}", f"key-{number}")
        parent = f"layer-{number}"
    return parent
