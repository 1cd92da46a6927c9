"""A Docker daemon of our own on an engine of our own, with containerd's image store on our snapshots: to prove it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flatmount.errors import MissingFeature
from flatmount.kernel.executor import run_once
from flatmount.plan.operations import MountPlan, Unmount, UnmountFlag
from flatmount.runtime.daemons import end_program, start_program, wait_for
from flatmount.snapshotter.engine import Engine, call

Docker = Callable[..., str]

# Nothing of the host's network changes: neither rules nor net.ipv4.ip_forward.
_OPTIONS = (
    *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
    *("--bridge=none", "--userland-proxy=false"),
)


@contextmanager
def running_docker(engine: Engine) -> Iterator[Docker]:
    """A dockerd below the engine's directory, without a network; yields a call of `docker` on it.

    Raises: MissingFeature where Docker is not installed; FlatmountError where it does not start: before 23 it knows no
    containerd image store.
    """
    dockerd, docker = (shutil.which(name, path=engine.path) for name in ("dockerd", "docker"))
    if dockerd is None or docker is None:
        raise MissingFeature("dockerd or docker is not installed", hint="name another --door, or an --engine DIR")
    place = f"{engine.place}/docker"
    os.makedirs(place, mode=0o711, exist_ok=True)
    with open(f"{place}/daemon.json", "w", encoding="utf-8") as file:
        json.dump({"features": {"containerd-snapshotter": True}, "storage-driver": "flatmount"}, file)
    socket = f"{place}/d.sock"
    command = [dockerd, "--config-file", f"{place}/daemon.json", "--containerd", engine.socket, *_OPTIONS]
    command += ["--data-root", f"{place}/data", "--exec-root", f"{place}/exec", "--pidfile", f"{place}/pid"]
    command += ["--host", f"unix://{socket}"]
    log = f"{place}/log"
    process = start_program(command, log, {**os.environ, "PATH": engine.path})
    try:
        wait_for(lambda: os.path.exists(socket), process, log)
        program = docker
        yield lambda *arguments: call(program, "--host", f"unix://{socket}", *arguments, path=engine.path)
    finally:
        end_program(process)
        # Docker binds its directory over itself, and leaves that.
        run_once(MountPlan((Unmount(f"{place}/data", UnmountFlag.NOFOLLOW),), keep_going=True))
