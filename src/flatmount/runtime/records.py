"""Containers on disk, so that they outlive the command: a directory each, under the run directory.

    RUN/containers/<id>/record.json     what it is; written once
    RUN/containers/<id>/lock            held by whoever starts it, and then by its shim
    RUN/containers/<id>/pid             its first process, written by the runtime
    RUN/containers/<id>/exit            how that ended, written by the shim
    RUN/containers/<id>/log, log.1      its output; the shim again
    RUN/containers/<id>/bundle/         what the runtime was given

No file says what state a container is in: the lock and what is there do. So there is no moment at which a kill could
leave a word that is not true. A directory gets its name when it is complete, and loses it before it is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from flatmount.errors import FlatmountError, InUse, UsageError
from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.kernel.tree import remove_tree
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.workplace import ensure_run_directory
from flatmount.runtime.request import Attachment

_SCHEMA = "flatmount.container-record/1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DRAFT = ".draft"
_GONE = ".gone"
_POLL_S = 0.002
_FLOCK = "hhqqi4x"  # struct flock of fcntl(2) on 64-bit machines
_WHOLE_FILE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class State(Enum):
    """How far a container is."""

    CREATING = "creating"
    RUNNING = "running"
    EXITED = "exited"
    LOST = "lost"  # whoever started or watched it was killed


@dataclass(frozen=True, slots=True)
class Record:
    """One container.

    `root` is its store and `holder` what it is called in that store's book; `runtime` is the runtime's absolute path;
    `remove`: it goes when it ended.
    """

    id: str
    root: str
    holder: str
    image: str
    image_name: str | None
    command: tuple[str, ...]
    created_ns: int
    attachment: Attachment
    strategy: str
    map: str
    gid_map: str
    runtime: str
    remove: bool
    terminal: bool
    stop_signal: str

    @property
    def mapping(self) -> Mapping:
        """The container's ids."""
        return Mapping.parse(self.map, self.gid_map)

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"schema": _SCHEMA, **asdict(self), "attachment": self.attachment.value}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended: its exit code (128 and the signal's number), and when, in ns since the epoch."""

    code: int
    at_ns: int


def _take_lock(fd: int) -> None:
    """A lock of the open file, which the shim inherits with the descriptor. Raises: BlockingIOError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)


def new_id() -> str:
    """An id nobody chose."""
    return secrets.token_hex(6)


def check_name(text: str) -> str:
    """Refuse a container's name that is not one path component of plain characters. Raises: UsageError."""
    if not _NAME.fullmatch(text):
        raise UsageError(f"{text[:80]!r} cannot be a container's name", hint="letters, digits, _ . and -, at most 64")
    return text


class Containers:
    """All containers of one run directory."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.base = os.path.join(run, "containers")

    def directory(self, container_id: str) -> str:
        """The container's directory."""
        return os.path.join(self.base, container_id)

    def add(self, record: Record) -> int:
        """Make a container's directory with its record. Returns its lock, held; the descriptor is the caller's.

        Raises: UsageError where the name is taken.
        """
        ensure_run_directory(self.run)
        os.makedirs(self.base, mode=0o711, exist_ok=True)
        draft = os.path.join(self.base, owned_name(f"{_DRAFT}-{record.id}-{secrets.token_hex(4)}"))
        os.mkdir(draft, 0o711)
        lock = os.open(os.path.join(draft, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _take_lock(lock)
            with open(os.path.join(draft, "record.json"), "x", encoding="utf-8") as file:
                json.dump(record.to_json(), file)
            os.rename(draft, self.directory(record.id))
        except BaseException as error:
            os.close(lock)
            self._remove_tree(os.path.basename(draft))
            if isinstance(error, OSError) and os.path.isdir(self.directory(record.id)):
                raise UsageError(
                    f"there is a container {record.id} already", hint=f"`flatmount remove {record.id}`, or another name"
                ) from None
            raise
        return lock

    def get(self, name: str) -> Record:
        """The container of that name, or whose id begins like that. Raises: UsageError."""
        check_name(name)
        names = self._names()
        found = [known for known in names if known == name] or [known for known in names if known.startswith(name)]
        if len(found) > 1:
            raise UsageError(f"{name!r} begins more than one container's name", hint="give more of it")
        record = self._read(found[0]) if found else None
        if record is None:
            raise UsageError(f"there is no container {name!r}", hint="`flatmount ps --all` shows what there is")
        return record

    def all(self) -> tuple[Record, ...]:
        """Every container, in the order of their start."""
        found = (self._read(name) for name in self._names())
        return tuple(sorted((one for one in found if one is not None), key=lambda one: (one.created_ns, one.id)))

    def state(self, record: Record) -> State:
        """How far it is, now."""
        # In this order: who holds the lock writes the end before letting go.
        held = self._is_held(record.id)
        if self.exit(record) is not None:
            return State.EXITED
        if not held:
            return State.LOST
        return State.RUNNING if self.pid(record) is not None else State.CREATING

    def exit(self, record: Record) -> Exit | None:
        """How it ended, or None."""
        with suppress(FileNotFoundError, ValueError):
            with open(os.path.join(self.directory(record.id), "exit"), encoding="ascii") as file:
                code, at_ns = file.read().split()
            return Exit(int(code), int(at_ns))
        return None

    def set_exit(self, record: Record, exit: Exit) -> None:
        """Write how it ended, where nobody was there to do so."""
        path = os.path.join(self.directory(record.id), "exit")
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(f"{exit.code} {exit.at_ns}\n")
        os.replace(path + ".new", path)

    def pid(self, record: Record) -> int | None:
        """Its first process, or None where there was none yet."""
        path = os.path.join(self.directory(record.id), "pid")
        with suppress(FileNotFoundError, ValueError), open(path, encoding="ascii") as file:
            return int(file.read())
        return None

    @contextmanager
    def locked(self, record: Record, *, wait_s: float = 0.0) -> Iterator[None]:
        """Nobody else changes the container meanwhile.

        Raises: InUse while it is started, runs or is removed, and no longer than `wait_s` has passed.
        """
        try:
            fd = os.open(os.path.join(self.directory(record.id), "lock"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UsageError(f"there is no container {record.id!r}", hint="somebody removed it meanwhile") from None
        try:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    _take_lock(fd)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_POLL_S)
            yield
        except BlockingIOError:
            raise InUse(f"container {record.id} runs", hint=f"`flatmount stop {record.id}` first") from None
        finally:
            os.close(fd)

    def forget(self, record: Record) -> None:
        """Remove its directory and everything in it."""
        gone = owned_name(f"{_GONE}-{record.id}-{secrets.token_hex(4)}")
        os.rename(self.directory(record.id), os.path.join(self.base, gone))
        self._remove_tree(gone)

    def sweep(self) -> None:
        """Remove directories that killed commands had not named yet, or no longer named."""
        with suppress(FileNotFoundError, PermissionError):
            for name in os.listdir(self.base):
                if name.startswith((_DRAFT, _GONE)) and owner_is_gone(name):
                    self._remove_tree(name)

    def unattended(self) -> tuple[Record, ...]:
        """Containers of which nobody takes care now: they ended, or their shim was killed.

        Looks at nothing but the lock of those that run, so that a thousand of them cost a few milliseconds.
        """
        found = (self._read(name) for name in self._names() if not self._is_held(name))
        return tuple(one for one in found if one is not None)

    def _is_held(self, container_id: str) -> bool:
        try:
            fd = os.open(os.path.join(self.directory(container_id), "lock"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE)
        finally:
            os.close(fd)
        kind: int = struct.unpack(_FLOCK, answer)[0]
        return kind != fcntl.F_UNLCK

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.base) if not name.startswith("."))
        except (FileNotFoundError, PermissionError):
            return []

    def _read(self, name: str) -> Record | None:
        path = os.path.join(self.base, name, "record.json")
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FlatmountError(f"the record {path} is damaged: {error}", hint="remove it by hand") from error
        if data.pop("schema", None) != _SCHEMA:
            raise FlatmountError(f"the record {path} is of another version", hint="use the flatmount that wrote it")
        data["command"] = tuple(data["command"])
        return Record(**{**data, "attachment": Attachment(data["attachment"])})

    def _remove_tree(self, name: str) -> None:
        parent = os.open(self.base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                remove_tree(parent, name)
        finally:
            os.close(parent)
