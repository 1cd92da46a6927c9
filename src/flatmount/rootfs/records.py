"""Mounts that outlive the command that made them: a record each, under the run directory.

    RUN/mounts/<id>.json      what is mounted where, from what, and in which state

A record is written before anything is done and removed after everything is undone, so that whatever a killed command
left is known to the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from flatmount.errors import UsageError
from flatmount.kernel.process import owned_name, owner_is_gone
from flatmount.rootfs.workplace import ensure_run_directory

_SCHEMA = "flatmount.mount-record/1"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class State(Enum):
    """How far a mount is."""

    MOUNTING = "mounting"  # by the process that `owner` names; if that is gone, to be undone
    MOUNTED = "mounted"
    UNMOUNTING = "unmounting"


@dataclass(frozen=True, slots=True)
class Record:
    """One mount. `root` is the store; `upper` in `uppers` is the directory of its changes, unless it is read-only.

    `made_upper` says that this mount made it, `namespace` is the inode of the mount namespace it is in, and `mount_id`
    its (unique, where the kernel has such) number there, once it stands.
    """

    id: str
    state: State
    owner: str
    root: str
    image: str
    name: str | None
    target: str
    strategy: str
    map: str
    gid_map: str
    uppers: str
    upper: str
    writable: bool
    ephemeral: bool
    made_upper: bool = False
    namespace: int = 0
    mount_id: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"schema": _SCHEMA, **asdict(self), "state": self.state.value}


def new_id() -> str:
    """An id nobody chose."""
    return secrets.token_hex(6)


def check_id(text: str) -> str:
    """Refuse an id that is not one path component of plain characters."""
    if not _ID.fullmatch(text):
        raise UsageError(f"the id {text!r} is not a name", hint="letters, digits, _ and -, at most 64")
    return text


class Records:
    """All records of one run directory."""

    def __init__(self, run: str) -> None:
        self._directory = os.path.join(run, "mounts")
        self._run = run

    def add(self, record: Record) -> None:
        """Write a new record. Raises: UsageError where the id is taken."""
        ensure_run_directory(self._run)
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        draft = self._draft(record)
        try:
            os.link(draft, self._path(record.id))
        except FileExistsError:
            raise UsageError(f"the id {record.id!r} is in use", hint="name another --id, or umount it first") from None
        finally:
            os.unlink(draft)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the records among all processes that take this lock."""
        ensure_run_directory(self._run)
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        fd = os.open(os.path.join(self._directory, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def holder(self, record: Record) -> str:
        """What a mount's lease in the store is called: two run directories on one store do not know each other's."""
        return f"mount:{record.id}@{self._run}"

    def is_ours(self, holder: str) -> bool:
        """Whether a lease belongs to a mount of this run directory."""
        return holder.startswith("mount:") and holder.endswith(f"@{self._run}")

    def has(self, record: Record) -> bool:
        """Whether a mount is still recorded."""
        return os.path.exists(self._path(record.id))

    def update(
        self, record: Record, state: State, *, mount_id: int | None = None, ephemeral: bool | None = None
    ) -> Record:
        """Write a record's new state in place of the old one."""
        changed = replace(
            record,
            state=state,
            owner=owned_name("flatmount"),
            mount_id=record.mount_id if mount_id is None else mount_id,
            ephemeral=record.ephemeral if ephemeral is None else ephemeral,
        )
        os.replace(self._draft(changed), self._path(record.id))
        return changed

    def remove(self, record: Record) -> None:
        """Forget a mount."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(record.id))

    def all(self) -> tuple[Record, ...]:
        """Every record, by id."""
        try:
            names = sorted(os.listdir(self._directory))
        except (FileNotFoundError, PermissionError):
            return ()
        found = (self._read(name) for name in names if name.endswith(".json"))
        return tuple(record for record in found if record is not None)

    def damaged(self) -> tuple[str, ...]:
        """Files that should be records and cannot be read as such, or were written by another version."""
        try:
            names = sorted(os.listdir(self._directory))
        except (FileNotFoundError, PermissionError):
            return ()
        return tuple(
            os.path.join(self._directory, name)
            for name in names
            if name.endswith(".json") and self._read(name) is None and os.path.exists(self._path(name[:-5]))
        )

    def at(self, target: str) -> Record | None:
        """The record of what is mounted at a directory (absolute, resolved)."""
        return next((record for record in self.all() if record.target == target), None)

    def abandoned(self) -> tuple[Record, ...]:
        """Records of commands that were killed half-way."""
        return tuple(r for r in self.all() if r.state is not State.MOUNTED and owner_is_gone(r.owner))

    def _path(self, record_id: str) -> str:
        return os.path.join(self._directory, f"{record_id}.json")

    def _draft(self, record: Record) -> str:
        path = os.path.join(self._directory, owned_name(f"{record.id}.draft"))
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record.to_json(), file)
        return path

    def _read(self, name: str) -> Record | None:
        try:
            with open(os.path.join(self._directory, name), encoding="utf-8") as file:
                data = json.load(file)
            if data.pop("schema") != _SCHEMA:
                return None
            return Record(**{**data, "state": State(data["state"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def sweep_drafts(self) -> None:
        """Remove drafts whose writers were killed."""
        with suppress(FileNotFoundError, PermissionError):
            for name in os.listdir(self._directory):
                if owner_is_gone(name):
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(self._directory, name))
