"""What somebody asks for when a container is to run. Plain data, checked when it is made."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum

from flatmount.errors import UsageError

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9-]{1,63})*")
_SIZE = re.compile(r"(\d{1,15})([bkmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
LEAST_MEMORY_BYTES = 6 << 20  # with less than 6 MiB a runtime's own first process does not start


class Network(Enum):
    """Which network a container sees."""

    HOST = "host"
    NONE = "none"  # a network of its own, with nothing but a loopback device


class Attachment(Enum):
    """Where a container's root file system is attached."""

    HOST = "host"  # in the host's mount table
    PRIVATE = "private"  # in a mount namespace of the container's own


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory or file of the host inside the container, its owners moved into the range or as they are."""

    source: str
    destination: str
    read_only: bool = False
    id_mapped: bool = True

    @classmethod
    def parse(cls, text: str) -> Volume:
        """Read `SRC:DST[:ro][:noidmap]`. Raises: UsageError."""
        source, destination, *words = [*text.split(":"), ""][: max(2, text.count(":") + 1)]
        if not os.path.isabs(source) or not os.path.isabs(destination):
            raise UsageError(f"--volume {text!r}: both paths must be absolute", hint="as in /srv/data:/data:ro")
        unknown = set(words) - {"ro", "rw", "noidmap"}
        if unknown:
            raise UsageError(f"--volume {text!r}: unknown word {min(unknown)!r}", hint="ro, rw and noidmap are known")
        if ".." in destination.split("/") or os.path.normpath(destination) == "/":
            raise UsageError(f"--volume {text!r}: it cannot go to {destination}", hint="name a directory below /")
        if not os.path.lexists(source):
            raise UsageError(f"--volume {text!r}: {source} does not exist", hint="make it first")
        return cls(os.path.realpath(source), os.path.normpath(destination), "ro" in words, "noidmap" not in words)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use; None is no limit. `cpus` counts processors, as in 1.5."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One container. What is None or empty comes from the image."""

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    user: str | None = None
    env: tuple[str, ...] = ()
    workdir: str | None = None
    hostname: str | None = None
    terminal: bool = False
    read_only: bool = False
    network: Network = Network.NONE
    limits: Limits = Limits()
    volumes: tuple[Volume, ...] = ()

    def __post_init__(self) -> None:
        for text in (*self.command, *(self.entrypoint or ()), *self.env, self.user or "", self.workdir or ""):
            if "\0" in text:
                raise UsageError(f"{text!r} holds a zero byte", hint="no process can be given one")
        if self.workdir is not None and not os.path.isabs(self.workdir):
            raise UsageError(f"--workdir {self.workdir!r} is not absolute", hint="as in /srv")
        if self.hostname is not None and (len(self.hostname) > 64 or not _HOSTNAME.fullmatch(self.hostname)):
            raise UsageError(
                f"{self.hostname[:80]!r} is not a host name", hint="letters, digits, - and dots, at most 64"
            )
        destinations = [volume.destination for volume in self.volumes]
        twice = next((path for path in destinations if destinations.count(path) > 1), None)
        if twice is not None:
            raise UsageError(f"two volumes go to {twice}", hint="name another place for one of them")


def parse_memory(text: str) -> int:
    """Bytes of `512m`, `1g`, `1048576`. Raises: UsageError, also for less than a container can start with."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--memory {text!r} is not a size", hint="as in 512m or 2g")
    size = int(match[1]) * _UNITS[match[2].lower()]
    if not LEAST_MEMORY_BYTES <= size < 1 << 62:
        raise UsageError(f"--memory {text!r}: no container starts with that", hint="at least 6m")
    return size


def parse_cpus(text: str) -> float:
    """A number of processors such as `1.5`. Raises: UsageError."""
    if not re.fullmatch(r"\d{1,5}(\.\d{1,3})?", text) or float(text) < 0.01:
        raise UsageError(f"--cpus {text!r} is not a number of processors", hint="as in 0.5 or 2; at least 0.01")
    return float(text)


def parse_env(text: str) -> str:
    """`NAME=VALUE`, or a NAME whose value is ours. Raises: UsageError."""
    name, equals, _ = text.partition("=")
    if not name:
        raise UsageError(f"--env {text!r} has no name", hint="as in NAME=VALUE")
    return text if equals else f"{name}={os.environ.get(name, '')}"
