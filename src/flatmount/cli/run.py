"""`flatmount run`: a container from an image of the store."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext

from flatmount.cli.common import map_options, open_store, run_directory, store_root_option, whole
from flatmount.cli.containers import recovered, with_engine_codes
from flatmount.cli.flatten import configured_form, tell_if_not_ready
from flatmount.errors import EXIT_FINE, FlatmountError
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.image import probe_store, require_root
from flatmount.runtime import book, subids
from flatmount.runtime.launch import Running
from flatmount.runtime.oci import DEFAULT, Runtime, unexecuted
from flatmount.runtime.records import Containers, Record, check_name, new_id
from flatmount.runtime.request import (
    Attachment,
    Limits,
    Network,
    Request,
    Volume,
    parse_cpus,
    parse_env,
    parse_memory,
)
from flatmount.runtime.starter import How, Started, Starter, remove
from flatmount.runtime.terminal import Relay, raw
from flatmount.store import FlatForm, Store
from flatmount.strategies import AUTO, NAMES

_EXAMPLES = """examples:
  flatmount run --rm web                                   the image's own command, ids from /etc/subuid
  flatmount run --rm --tty web /bin/sh                     a shell
  flatmount run --detach --name db --memory 512m --volume /srv/db:/data web
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "run",
        help="start a container",
        description="Start a container of IMAGE with user ids of its own, and run CMD in it or what the image names. "
        "Its root file system is attached in a mount namespace of its own, so that the host's mount table does not "
        "grow. Exits with the command's code; 125 is an error of flatmount's own, 126 a command that cannot be "
        "executed, 127 one that is not there.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="an image of the store")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="what to run instead of the image's")
    parser.add_argument("--name", help="the container's name (default: made up)")
    parser.add_argument("--rm", action="store_true", help="remove the container when it ended")
    parser.add_argument("--detach", "-d", action="store_true", help="print its name and let it run")
    parser.add_argument("--tty", "-t", action="store_true", help="give it a terminal")
    parser.add_argument(
        "--attach",
        choices=[one.value for one in Attachment],
        default="private",
        help="where its root "
        "file system is attached: a mount namespace of its own, or the host's (default: %(default)s)",
    )
    parser.add_argument("--entrypoint", metavar="PATH", help="instead of the image's; CMD is its arguments")
    parser.add_argument("--user", "-u", metavar="USER[:GROUP]", help="names of the image, or ids")
    parser.add_argument("--env", "-e", action="append", default=[], metavar="NAME[=VALUE]", help="may be repeated")
    parser.add_argument("--workdir", "-w", metavar="DIR", help="where the command starts")
    parser.add_argument("--hostname", metavar="NAME", help="default: the container's name")
    parser.add_argument(
        "--volume",
        "-v",
        action="append",
        default=[],
        metavar="SRC:DST[:ro][:noidmap]",
        help="a directory or file of the host, its owners moved into the container's range",
    )
    parser.add_argument("--read-only", action="store_true", help="no changes to the root file system")
    parser.add_argument(
        "--network", choices=[one.value for one in Network], default="none", help="default: %(default)s"
    )
    parser.add_argument("--memory", metavar="SIZE", help="as in 512m")
    parser.add_argument("--cpus", metavar="N", help="as in 1.5")
    parser.add_argument("--pids-limit", metavar="N", help="processes and threads at most")
    map_options(parser, required=False)
    parser.add_argument(
        "--pool",
        default=os.environ.get("FLATMOUNT_POOL"),
        metavar="FIRST:COUNT",
        help="host ids that "
        "`--map auto`, the default, takes a free range from (default: $FLATMOUNT_POOL, or root's in "
        "/etc/subuid and /etc/subgid)",
    )
    parser.add_argument("--strategy", default=AUTO, choices=NAMES, help="default: %(default)s")
    parser.add_argument(
        "--runtime",
        default=os.environ.get("FLATMOUNT_RUNTIME", DEFAULT),
        metavar="NAME",
        help="an OCI runtime (default: $FLATMOUNT_RUNTIME or %(default)s)",
    )
    store_root_option(parser)
    parser.set_defaults(run=with_engine_codes(_run))


def _run(args: argparse.Namespace) -> int:
    request = _request(args)
    mapping = None if args.map in (None, "auto") else Mapping.parse(args.map, args.gid_map)
    require_root("run")
    run = run_directory()
    runtime = Runtime.find(args.runtime, run)
    name = new_id() if args.name is None else check_name(args.name)
    with open_store(args) as store:
        containers = recovered(store)
        image = store.image(args.image)
        how = How(runtime, Attachment(args.attach), args.strategy, flat_form=configured_form())
        facts = probe_store(store, images=how.flat_form is FlatForm.EROFS).facts
        with Starter(store, image, run, facts, how) as starter:
            tell_if_not_ready(args.strategy, starter.choice, store, image)
            holder, mapping = _reserve(starter, containers, name, mapping, args.pool)
            # From before the start on: the first thing that a container writes is to be shown as it means it.
            with nullcontext() if args.detach else Relay() as relay, raw(args.tty and not args.detach):
                started = _start(starter, args, name, mapping, request, holder)
                starter.close()
                if relay is not None:
                    code = attend(started.running, relay, started.record.command[0])
        if args.detach:
            started.running.close()
            print(name)
            return EXIT_FINE
        if args.rm:
            _remove(containers, store, started.record)
    return code


def attend(running: Running, relay: Relay, command: str) -> int:
    """Wait for a container, or a process in one; our signals are its own. Returns its exit code when all is written.

    One that never became `command` is told of.
    """
    relay.to(running.send)
    code = running.wait()
    running.reap()
    if not running.executed:
        print(f"flatmount: {unexecuted(command, code).line()}", file=sys.stderr)
    return code


def _start(
    starter: Starter, args: argparse.Namespace, name: str, mapping: Mapping, request: Request, holder: str
) -> Started:
    store = starter.store
    try:
        return starter.start(
            name,
            mapping,
            request,
            foreground=not args.detach,
            bound=not args.detach,
            remove=args.rm,
            after=_removal(store, name) if args.rm and args.detach else (),
            holder=holder,
        )
    except BaseException:
        book.release(store, holder)
        raise


def _request(args: argparse.Namespace) -> Request:
    limits = Limits(
        memory_bytes=None if args.memory is None else parse_memory(args.memory),
        cpus=None if args.cpus is None else parse_cpus(args.cpus),
        pids=None if args.pids_limit is None else whole(args.pids_limit, "--pids-limit", least=1, most=4 << 20),
    )
    return Request(
        command=tuple(args.command),
        entrypoint=None if args.entrypoint is None else (args.entrypoint,),
        user=args.user,
        env=tuple(map(parse_env, args.env)),
        workdir=args.workdir,
        hostname=args.hostname,
        terminal=args.tty,
        read_only=args.read_only,
        network=Network(args.network),
        limits=limits,
        volumes=tuple(map(Volume.parse, args.volume)),
    )


def _reserve(
    starter: Starter, containers: Containers, name: str, mapping: Mapping | None, pool: str | None
) -> tuple[str, Mapping]:
    store, image, trees = starter.store, starter.image, starter.trees
    if mapping is not None:
        return book.reserve(store, image, name, mapping, (), trees=trees)
    # Other stores have books of their own; their containers are in the same run directory.
    others = [ids for one in containers.all() if one.root != store.root for ids in subids.host_ids(one.mapping)]
    return book.reserve(store, image, name, None, subids.pool(pool), others, trees=trees)


def _removal(store: Store, name: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "flatmount", "remove", "--root", store.root, name)


def _remove(containers: Containers, store: Store, record: Record) -> None:
    try:
        remove(containers, store, record)
    except FlatmountError as error:
        # The container's own exit code is what the caller waits for.
        print(f"flatmount: {error.line()}", file=sys.stderr)
