"""`containerd`: a daemon of the storm's own, driven over its API, with its overlay snapshotter.

A client that was started for each container would be most of what is measured, so the calls are made here: one
snapshot, one container, one task. The messages are few and small; they are written by hand.
See: containerd's api/services (containers, snapshots, tasks; version 1).
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from flatmount.errors import FlatmountError, MissingFeature
from flatmount.runtime import cgroups
from flatmount.runtime.daemons import end_program, kill_those_of, start_program
from flatmount.store import StoredImage
from flatmount.storm.engines.base import Ask
from flatmount.storm.engines.runc import document, spec_json

_NAMESPACE: Final = "flatmount-storm"
_LEASE: Final = "flatmount-storm"
_RUNTIME: Final = "io.containerd.runc.v2"
_SPEC_TYPE: Final = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_SNAPSHOTTER: Final = "overlayfs"
_START_S: Final = 30.0
_CALL_S: Final = 60.0
_UNDO_S: Final = 20.0
_CONFIG: Final = """
version = 2
root = "{base}/root"
state = "{base}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "{base}/socket"
[ttrpc]
  address = "{base}/socket.ttrpc"
"""


def field(number: int, value: bytes | str | int) -> bytes:
    """One field of a protocol-buffer message; an empty one is left out, as its absence means the same."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value) if value else b""
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data if data else b""


def fields(message: bytes, number: int) -> Iterator[bytes]:
    """The values of a length-delimited field; others are skipped. Raises: FlatmountError."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        match key & 7:
            case 0:
                _, at = _read_varint(message, at)
            case 2:
                size, at = _read_varint(message, at)
                if key >> 3 == number:
                    yield message[at : at + size]
                at += size
            case 1 | 5 as kind:
                at += 8 if kind == 1 else 4
            case kind:
                raise FlatmountError(f"containerd's answer has a field of kind {kind}")


@dataclass(frozen=True, slots=True)
class Started:
    """A container of this engine."""

    name: str


class ContainerdEngine:
    """The daemon, from entering the context until leaving it; its state is in a directory of the storm's."""

    name = "containerd"

    def __init__(
        self, image: StoredImage, layout: str, arrivals: str, place: str, *, directory: str | None = None
    ) -> None:
        """`layout` is the image as an OCI layout; `directory` has other binaries of containerd than those on PATH.

        Raises: MissingFeature where containerd or the grpc package is not installed.
        """
        self._image = image
        self._layout = layout
        self._arrivals = arrivals
        self._base = f"{place}/containerd"
        self._path = f"{directory}:{os.environ['PATH']}" if directory else os.environ["PATH"]
        for program in ("containerd", "containerd-shim-runc-v2", "ctr"):
            if shutil.which(program, path=self._path) is None:
                raise MissingFeature(f"there is no {program}", hint="install containerd")
        try:
            self._grpc: Any = importlib.import_module("grpc")
        except ImportError as error:
            raise MissingFeature("the Python package grpcio is not installed", hint="pip install grpcio") from error
        self._daemon: subprocess.Popen[bytes] | None = None
        self._channel: Any = None
        self._silent = False

    def __enter__(self) -> Self:
        os.mkdir(self._base, 0o711)
        with open(f"{self._base}/config.toml", "w", encoding="utf-8") as file:
            file.write(_CONFIG.format(base=self._base))
        environment = {**os.environ, "PATH": self._path}
        program = shutil.which("containerd", path=self._path) or "containerd"
        command = [program, "--config", f"{self._base}/config.toml"]
        self._daemon = start_program(command, f"{self._base}/log", environment)
        try:
            self._channel = self._grpc.insecure_channel(f"unix://{self._base}/socket")
            self._wait_until_ready()
            self._import(environment)
            # Its collector takes what nobody refers to, as a snapshot is before its container is there.
            self._call("leases", "Create", field(1, _LEASE))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._daemon is not None:
            end_program(self._daemon)
        kill_those_of(self._base)

    def start(self, ask: Ask) -> Started:
        """A snapshot, a container, a task, and its start."""
        snapshot = field(1, _SNAPSHOTTER) + field(2, ask.name) + field(3, self._image.chain_id)
        mounts = b"".join(field(3, mount) for mount in fields(self._call("snapshots", "Prepare", snapshot), 1))
        spec = document(ask, self._base, self._arrivals, self._image)
        # This generation id-maps nothing: with a range of its own, each container would be a copy of the image.
        linux = spec["linux"]
        linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != "user"]
        del linux["uidMappings"], linux["gidMappings"]
        spec["mounts"] = [one for one in spec["mounts"] if not one["source"].startswith(f"{self._base}/etc")]
        container = (
            field(1, ask.name)
            + field(3, "image")
            + field(4, field(1, _RUNTIME))
            + field(5, field(1, _SPEC_TYPE) + field(2, spec_json(spec)))
            + field(6, _SNAPSHOTTER)
            + field(7, ask.name)
        )
        started = Started(ask.name)
        try:
            self._call("containers", "Create", field(1, container))
            self._call("tasks", "Create", field(1, ask.name) + mounts)
            self._call("tasks", "Start", field(1, ask.name))
        except BaseException:
            self.undo(started)
            raise
        return started

    def undo(self, started: Started) -> None:
        """Kill the task, and remove task, container and snapshot.

        Takes no longer than 20 s, whatever state the daemon is in; once it did not answer, nobody asks it again, and
        what it had goes with its control groups, its processes and its directory.
        """
        name = field(1, started.name)
        problems: list[FlatmountError] = []
        deadline = time.monotonic() + _UNDO_S
        for service, method, message in (
            ("tasks", "Kill", name + field(3, signal.SIGKILL) + field(4, 1)),
            ("tasks", "Wait", name),
            ("tasks", "Delete", name),
            ("containers", "Delete", name),
            ("snapshots", "Remove", field(1, _SNAPSHOTTER) + field(2, started.name)),
        ):
            if self._silent:
                break
            try:
                self._call(service, method, message, max(0.1, deadline - time.monotonic()))
            except FlatmountError as error:
                if "not found" not in str(error):
                    problems.append(error)
                # A task that was not killed would be waited for in vain.
                self._silent = self._silent or time.monotonic() >= deadline or self._has_ended()
        cgroups.clear(started.name)
        if problems:
            raise problems[0]

    def _has_ended(self) -> bool:
        return self._daemon is None or self._daemon.poll() is not None

    def _call(self, service: str, method: str, message: bytes, seconds: float = _CALL_S) -> bytes:
        path = f"/containerd.services.{service}.v1.{service.capitalize()}/{method}"
        metadata = [("containerd-namespace", _NAMESPACE)]
        if service == "snapshots":
            metadata.append(("containerd-lease", _LEASE))
        try:
            answer: bytes = self._channel.unary_unary(path)(message, timeout=seconds, metadata=metadata)
        except self._grpc.RpcError as error:
            raise FlatmountError(f"containerd: {service} {method}: {' '.join(str(error.details()).split())}") from error
        return answer

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self._grpc.channel_ready_future(self._channel).result(timeout=0.5)
                self._call("containers", "List", b"")
                return
            except (FlatmountError, self._grpc.FutureTimeoutError) as error:
                assert self._daemon is not None
                if self._daemon.poll() is not None or time.monotonic() > deadline:
                    with open(f"{self._base}/log", encoding="utf-8", errors="replace") as log:
                        words = " ".join(log.read()[-500:].split())
                    raise FlatmountError(f"containerd did not start: {words}") from error

    def _import(self, environment: dict[str, str]) -> None:
        archive = f"{self._base}/image.tar"
        with tarfile.open(archive, "w") as tar:
            for name in sorted(os.listdir(self._layout)):
                tar.add(os.path.join(self._layout, name), name)
        ctr = shutil.which("ctr", path=self._path) or "ctr"
        call = [ctr, "--address", f"{self._base}/socket", "--namespace", _NAMESPACE, "images", "import"]
        done = subprocess.run(
            [*call, "--snapshotter", _SNAPSHOTTER, "--index-name", "image", archive],
            env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        os.unlink(archive)
        if done.returncode != 0:
            raise FlatmountError(f"containerd does not take the image: {' '.join(done.stderr.split())}")


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
        if message[at - 1] < 0x80:
            return value, at
