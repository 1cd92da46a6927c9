"""Clients and floors of a snapshot service, as programs of their own: built here, run for one measure at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import build_program

CALLS = ("Prepare", "Mounts", "Remove")
_PACKAGES = "/usr/share/gocode"
# A client ends by itself after 60 s.
_CLIENT_S, _START_S = 90, 20


@dataclass(frozen=True, slots=True)
class Service:
    """Whom a client calls and what for. `parent` is the committed snapshot to prepare on; "" for none."""

    socket: str
    parent: str
    snapshotter: str
    mapped: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How a client calls: `in_flight` cycles are kept under way until `cycles` have ended; with `burst` that many begin
    at once, and the next ones a while after the last of them has ended."""

    in_flight: int
    cycles: int
    burst: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """What a client saw. Milliseconds, of a whole cycle and of each of CALLS; `cpu_us_per_call` is the client's own."""

    calls_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    each_p50_ms: tuple[float, ...]
    each_p99_ms: tuple[float, ...]
    each_max_ms: tuple[float, ...]
    cpu_us_per_call: float


def build_client(directory: str, *flags: str) -> str:
    """Compile the client that takes next to nothing; returns the program. Takes Debian's libnghttp2-dev."""
    return build_program(directory, "snapshot_client", *flags, "-lnghttp2")


def build_go_client(directory: str) -> str:
    """Compile the client on containerd's own library; returns the program.

    Takes Debian's golang-go and golang-github-containerd-containerd-dev; most of a minute the first time, then Go has
    what it needs in its cache.
    """
    program = os.path.join(directory, "snapshot_client_go")
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": _PACKAGES, "GOFLAGS": ""}
    source = Path(__file__).with_name("snapshot_client") / "main.go"
    subprocess.run(["go", "build", "-o", program, str(source)], check=True, env=environment)
    return program


def build_floor_service(directory: str, *flags: str) -> str:
    """Compile the service on libnghttp2 that does nothing; returns the program, which takes a socket's path."""
    return build_program(directory, "snapshot_floor", *flags, "-lnghttp2")


def call(program: str, service: Service, load: Load, *, connections: int = 1) -> Served:
    """Run a client until it has done `load`.

    Raises: subprocess.CalledProcessError, when a call is not answered as it should be or all is not done in 60 s; the
    client has written to stderr which.
    """
    command = [program, service.socket, str(load.in_flight), str(load.cycles), service.parent, service.snapshotter]
    command += ["mapped" if service.mapped else "plain", "burst" if load.burst else "closed", str(connections)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=_CLIENT_S)
    seen = json.loads(done.stdout)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in seen.items()}
    return Served(**values)


@contextmanager
def serving(command: list[str], socket: str) -> Iterator[str]:
    """Run a service that makes `socket`; yields that, and ends the service afterwards.

    Raises: RuntimeError, when there is no socket after 20 s.
    """
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + _START_S
        while not os.path.exists(socket):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} makes no {socket}")
            time.sleep(0.05)
        yield socket
    finally:
        process.terminate()
        process.wait()


def grpcio_floor(socket: str) -> list[str]:
    """The command of the service on grpcio that does nothing."""
    return [sys.executable, "-m", "bench.snapshot_floor", socket]
