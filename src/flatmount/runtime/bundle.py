"""The runtime specification's document for one container, and the directory that it lies in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TextIO

from flatmount.errors import UsageError
from flatmount.image import ImageConfig
from flatmount.plan.mapping import IdRange, Mapping
from flatmount.runtime import defaults, seccomp
from flatmount.runtime.request import Limits, Network, Request
from flatmount.runtime.users import User

CONFIG: Final = "config.json"
ROOTFS: Final = "rootfs"
VOLUMES: Final = "volumes"
CGROUP_PARENT: Final = "flatmount"
_FILES: Final = ("hostname", "hosts", "resolv.conf")
_VERSION: Final = "1.0.2"
_PERIOD_US: Final = 100_000


@dataclass(frozen=True, slots=True)
class Process:
    """What runs first: its arguments, environment and directory."""

    arguments: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str


def arguments_of(request: Request, config: ImageConfig) -> tuple[str, ...]:
    """What a container executes: the image's words, where the request has none of its own.

    Raises: UsageError where neither names a command.
    """
    if request.entrypoint is not None:
        arguments = request.entrypoint + request.command
    else:
        arguments = config.entrypoint + (request.command or config.cmd)
    if not arguments:
        raise UsageError("neither the image nor the call names a command", hint="put one behind the image")
    return arguments


def process_of(request: Request, config: ImageConfig, user: User, hostname: str) -> Process:
    """The first process of a container. Raises: as `arguments_of`."""
    arguments = arguments_of(request, config)
    known = [defaults.PATH, *config.env, f"HOSTNAME={hostname}", f"HOME={user.home or '/'}"]
    if request.terminal:
        known.append("TERM=xterm")
    return Process(arguments, environment((*known, *request.env)), request.workdir or config.workdir or "/")


def environment(assignments: Iterable[str]) -> tuple[str, ...]:
    """Assignments with each name once, the last value that was given; what has no `=` is left out."""
    values = dict(text.split("=", 1) for text in assignments if "=" in text)
    return tuple(f"{name}={value}" for name, value in values.items())


def specification(
    *, container_id: str, bundle: str, process: Process, user: User, mapping: Mapping, request: Request, unified: bool
) -> dict[str, Any]:
    """The whole document. `unified`: the host has the second version of control groups only."""
    host_network = request.network is Network.HOST
    namespaces = ["pid", "ipc", "uts", "mount", "user", *([] if host_network else ["network"])]
    if unified:
        namespaces.append("cgroup")
    return {
        "ociVersion": _VERSION,
        "process": process_document(process, user, terminal=request.terminal),
        "root": {"path": ROOTFS, "readonly": request.read_only},
        "hostname": hostname_of(container_id, request),
        "mounts": [
            *defaults.mounts(host_network=host_network),
            *(_bind(f"{bundle}/etc/{name}", f"/etc/{name}", read_only=False) for name in _FILES),
            *(
                _bind(f"{bundle}/{VOLUMES}/{number}", volume.destination, read_only=volume.read_only)
                for number, volume in enumerate(request.volumes)
            ),
        ],
        "linux": {
            "uidMappings": _ranges(mapping.uids),
            "gidMappings": _ranges(mapping.gids),
            "namespaces": [{"type": kind} for kind in namespaces],
            "cgroupsPath": f"/{CGROUP_PARENT}/{container_id}",
            "resources": {"devices": defaults.devices(), **_limits(request.limits)},
            "seccomp": seccomp.profile(defaults.CAPABILITIES),
            "maskedPaths": list(defaults.MASKED_PATHS),
            "readonlyPaths": list(defaults.READ_ONLY_PATHS),
        },
    }


def process_document(process: Process, user: User, *, terminal: bool) -> dict[str, Any]:
    """The part about a process, which `exec` has alone."""
    sets = ("bounding", "effective", "permitted")
    return {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(process.arguments),
        "env": list(process.env),
        "cwd": process.cwd,
        "capabilities": {name: list(defaults.CAPABILITIES) for name in sets},
        "noNewPrivileges": True,
    }


def hostname_of(container_id: str, request: Request) -> str:
    """The container's host name: as asked for, else its id."""
    return request.hostname or container_id


def make_bundle(bundle: str) -> None:
    """Make the directory `bundle` with an empty root directory in it; every user may walk through. Errors: OSError."""
    os.mkdir(bundle, 0o711)
    for name in (ROOTFS, "etc", VOLUMES):
        os.mkdir(f"{bundle}/{name}", 0o711)


def fill_bundle(bundle: str, document: dict[str, Any], *, mapping: Mapping, network: Network) -> None:
    """Write the bundle's files. Those that the container sees belong to its root. Errors: OSError."""
    owner = (mapping.host_uid(0), mapping.host_gid(0))
    hostname = document["hostname"]
    texts = {"hostname": f"{hostname}\n", "hosts": _hosts(hostname, network), "resolv.conf": _resolv_conf(network)}
    for name, text in texts.items():
        with _new_file(f"{bundle}/etc/{name}") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
            os.fchown(file.fileno(), *owner)
    with _new_file(f"{bundle}/{CONFIG}") as file:
        file.write(json.dumps(document))  # dump() itself would take the encoder in Python


def _new_file(path: str) -> TextIO:
    return open(path, "x", encoding="utf-8", errors="surrogateescape")


def _hosts(hostname: str, network: Network) -> str:
    """With the host's network, the host's names; else those of the loopback device."""
    own = f"127.0.1.1\t{hostname}\n"
    if network is Network.HOST:
        return _host_file("/etc/hosts") + own
    return f"127.0.0.1\tlocalhost\n{own}::1\tlocalhost ip6-localhost ip6-loopback\n"


def _resolv_conf(network: Network) -> str:
    return _host_file("/etc/resolv.conf") if network is Network.HOST else "# this container has no network\n"


def _host_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _bind(source: str, destination: str, *, read_only: bool) -> dict[str, Any]:
    options = ["rbind", "rprivate", "ro" if read_only else "rw"]
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def _ranges(ranges: tuple[IdRange, ...]) -> list[dict[str, int]]:
    return [{"containerID": r.container, "hostID": r.host, "size": r.size} for r in ranges]


def _limits(limits: Limits) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if limits.memory_bytes is not None:
        found["memory"] = {"limit": limits.memory_bytes}
    if limits.cpus is not None:
        found["cpu"] = {"quota": round(limits.cpus * _PERIOD_US), "period": _PERIOD_US}
    if limits.pids is not None:
        found["pids"] = {"limit": limits.pids}
    return found
