"""`flatmount ps`: the containers there are."""

from __future__ import annotations

import argparse
import shlex
import time
from datetime import UTC, datetime
from typing import Any

from flatmount.cli.common import open_store, print_json, store_options
from flatmount.cli.containers import recovered
from flatmount.errors import EXIT_FINE
from flatmount.rootfs.image import require_root
from flatmount.runtime.records import Containers, Record, State

_TITLES: tuple[str, ...] = ("CONTAINER", "IMAGE", "STATE", "SINCE", "PID", "ATTACHED", "COMMAND")
_COMMAND_WIDTH = 40


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "ps",
        help="list containers",
        description="List the containers of this store that run; with --all also those that ended.",
        epilog="example: flatmount ps --all --json",
    )
    parser.add_argument("--all", "-a", action="store_true", help="those that ended as well")
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    require_root("ps")
    with open_store(args) as store:
        containers = recovered(store)
        root = store.root
    found = [_facts(containers, record) for record in containers.all() if record.root == root]
    shown = [facts for facts in found if args.all or facts["state"] in (State.RUNNING.value, State.CREATING.value)]
    if args.json:
        print_json("ps", {"containers": shown})
        return EXIT_FINE
    rows = [_TITLES, *map(_row, shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return EXIT_FINE


def _facts(containers: Containers, record: Record) -> dict[str, Any]:
    state = containers.state(record)
    ended = containers.exit(record)
    return {
        "id": record.id,
        "image": record.image_name,
        "image_digest": record.image,
        "state": state.value,
        "pid": containers.pid(record) if state is State.RUNNING else None,
        "exit_code": None if ended is None else ended.code,
        "created": _utc(record.created_ns),
        "ended": None if ended is None else _utc(ended.at_ns),
        "command": list(record.command),
        "attached": record.attachment.value,
        "map": record.map,
        "strategy": record.strategy,
        "bundle": f"{containers.directory(record.id)}/bundle",
    }


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    state = facts["state"] if facts["exit_code"] is None else f"{facts['state']} ({facts['exit_code']})"
    command = shlex.join(facts["command"])
    if len(command) > _COMMAND_WIDTH:
        command = command[: _COMMAND_WIDTH - 1] + "…"
    pid = "-" if facts["pid"] is None else str(facts["pid"])
    since = _ago(facts["ended"] or facts["created"])
    return facts["id"], facts["image"] or facts["image_digest"][7:19], state, since, pid, facts["attached"], command


def _utc(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _ago(utc: str) -> str:
    seconds = max(0, int(time.time() - datetime.fromisoformat(utc).timestamp()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
