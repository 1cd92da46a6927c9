"""One more process in a container that runs, from the host."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flatmount.errors import InUse, UsageError
from flatmount.kernel.tree import remove_tree
from flatmount.runtime import bundle as bundles
from flatmount.runtime.launch import Launch, Running, RuntimeRefused, launch
from flatmount.runtime.oci import Runtime, refused
from flatmount.runtime.records import Containers, Record, State
from flatmount.runtime.users import User, require_mapped, resolve


@contextmanager
def executing(
    containers: Containers,
    record: Record,
    command: tuple[str, ...],
    *,
    user: str | None = None,
    env: tuple[str, ...] = (),
    workdir: str | None = None,
    terminal: bool = False,
) -> Iterator[Running]:
    """Start `command` in the container; our standard streams are its own. User, environment and directory are those
    of the container's first process, where nothing else is asked for.

    Raises: InUse for a container that does not run; NotFound, NotExecutable; FlatmountError.
    """
    pid = containers.pid(record)
    if containers.state(record) is not State.RUNNING or pid is None:
        raise InUse(f"container {record.id} does not run", hint="`flatmount ps --all` shows what became of it")
    if workdir is not None and not os.path.isabs(workdir):
        raise UsageError(f"--workdir {workdir!r} is not absolute", hint="as in /srv")
    parent = containers.directory(record.id)
    name = f"exec-{secrets.token_hex(6)}"
    directory = os.path.join(parent, name)
    with open(f"{parent}/bundle/{bundles.CONFIG}", encoding="utf-8", errors="surrogateescape") as file:
        first: dict[str, Any] = json.load(file)["process"]
    document, owner = _describe(record, first, pid, command, user=user, env=env, workdir=workdir, terminal=terminal)
    os.mkdir(directory, 0o700)
    try:
        with open(f"{directory}/process.json", "x", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(document, file)
        runtime = Runtime(record.runtime, os.path.join(containers.run, "runtime"))
        wanted = Launch(
            directory=directory,
            command=runtime.execute(record.id, directory, terminal=terminal),
            owner=owner,
            log_bytes=0,
            foreground=True,
            bound=True,
            terminal=terminal,
        )
        try:
            running = launch(wanted)
        except RuntimeRefused as failure:
            raise refused(directory, command[0], runtime) from failure
        try:
            yield running
        finally:
            running.close()
    finally:
        _remove(parent, name)


def _describe(
    record: Record,
    first: dict[str, Any],
    pid: int,
    command: tuple[str, ...],
    *,
    user: str | None,
    env: tuple[str, ...],
    workdir: str | None,
    terminal: bool,
) -> tuple[dict[str, Any], tuple[int, int]]:
    known = first["user"]
    who = User(known["uid"], known["gid"], tuple(known["additionalGids"]), "")
    home: tuple[str, ...] = ()
    if user is not None:
        # The container's own root directory, as the kernel knows it: nothing is mounted to look into it.
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            who = resolve(root, user)
        finally:
            os.close(root)
        require_mapped(who, record.mapping)
        home = (f"HOME={who.home or '/'}",)
    more = (*home, *(("TERM=xterm",) if terminal else ()))
    environment = bundles.environment((*first["env"], *more, *env))
    process = bundles.Process(command, environment, workdir or first["cwd"])
    owner = (record.mapping.host_uid(who.uid), record.mapping.host_gid(who.gid))
    return bundles.process_document(process, who, terminal=terminal), owner


def _remove(parent: str, name: str) -> None:
    try:
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # the container ended meanwhile and was removed, with everything in its directory
    try:
        remove_tree(fd, name)
    except FileNotFoundError:
        pass
    finally:
        os.close(fd)
