"""`flatmount logs`: what a container wrote."""

from __future__ import annotations

import argparse
import sys

from flatmount.cli.common import open_store, store_root_option
from flatmount.cli.containers import recovered
from flatmount.errors import EXIT_FINE
from flatmount.rootfs.image import require_root
from flatmount.runtime.logs import read


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "logs",
        help="show what a container wrote",
        description="Write what a container wrote to standard output and standard error, each to its own. The last 16 "
        "to 32 MiB are kept.",
        epilog="example: flatmount logs --follow --timestamps db",
    )
    parser.add_argument("container", metavar="CONTAINER", help="its name, or the beginning of it")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until it ends")
    parser.add_argument("--timestamps", action="store_true", help="begin each line with its time (UTC)")
    store_root_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    require_root("logs")
    with open_store(args) as store:
        containers = recovered(store)
        record = containers.get(args.container)
    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    begins = dict.fromkeys(streams, True)
    for line in read(containers, record, follow=args.follow):
        if line.stream not in streams:
            continue
        out = streams[line.stream]
        stamp = f"{line.at} ".encode() if args.timestamps and begins[line.stream] else b""
        out.write(stamp + line.text + (b"\n" if line.ends else b""))
        out.flush()
        begins[line.stream] = line.ends
    return EXIT_FINE
