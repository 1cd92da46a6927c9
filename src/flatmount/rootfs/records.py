"""Mounts that outlive the command that made them: a record each, under the run directory.

    RUN/mounts/<id>.json      what is mounted where, from what, and in which state

A record is written before anything is done and removed after everything is undone, so that whatever a killed command
left is known to the next one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from flatmount.errors import FlatmountError, UsageError
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
    """One mount. `root` is the store; `upper` in `uppers` is the directory of its changes, unless it is read-only."""

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

    def update(self, record: Record, state: State) -> Record:
        """Write a record's new state in place of the old one."""
        changed = replace(record, state=state, owner=owned_name("flatmount"))
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
        path = os.path.join(self._directory, name)
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FlatmountError(f"the record {path} is damaged: {error}", hint="remove it by hand") from error
        if data.pop("schema", None) != _SCHEMA:
            raise FlatmountError(f"the record {path} is of another version", hint="use the flatmount that wrote it")
        return Record(**{**data, "state": State(data["state"])})

    def sweep_drafts(self) -> None:
        """Remove drafts whose writers were killed."""
        with suppress(FileNotFoundError, PermissionError):
            for name in os.listdir(self._directory):
                if owner_is_gone(name):
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(self._directory, name))
