"""`flatmount exec`: one more process in a container that runs."""

from __future__ import annotations

import argparse

from flatmount.cli.common import open_store, store_root_option
from flatmount.cli.containers import recovered, with_engine_codes
from flatmount.cli.run import attend
from flatmount.errors import UsageError
from flatmount.rootfs.image import require_root
from flatmount.runtime.executing import executing
from flatmount.runtime.request import parse_env
from flatmount.runtime.terminal import Relay, raw


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "exec",
        help="run a command in a container that runs",
        description="Run CMD in a container, as the user and with the environment of its first process unless "
        "something else is asked for. Exits as `run` does.",
        epilog="example: flatmount exec --tty db /bin/sh",
    )
    parser.add_argument("container", metavar="CONTAINER", help="its name, or the beginning of it")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="what to run")
    parser.add_argument("--tty", "-t", action="store_true", help="give it a terminal")
    parser.add_argument("--user", "-u", metavar="USER[:GROUP]", help="names of the container, or ids")
    parser.add_argument("--env", "-e", action="append", default=[], metavar="NAME[=VALUE]", help="may be repeated")
    parser.add_argument("--workdir", "-w", metavar="DIR", help="where the command starts")
    store_root_option(parser)
    parser.set_defaults(run=with_engine_codes(_run))


def _run(args: argparse.Namespace) -> int:
    if not args.command:
        raise UsageError("exec needs a command", hint="put it behind the container")
    require_root("exec")
    with open_store(args) as store:
        containers = recovered(store)
        record = containers.get(args.container)
    with (
        Relay() as relay,
        raw(args.tty),
        executing(
            containers,
            record,
            tuple(args.command),
            user=args.user,
            env=tuple(map(parse_env, args.env)),
            workdir=args.workdir,
            terminal=args.tty,
        ) as running,
    ):
        return attend(running, relay, args.command[0])
