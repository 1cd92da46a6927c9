"""`flatmount stop`: ends containers."""

from __future__ import annotations

import argparse

from flatmount.cli.common import open_store, store_root_option, whole
from flatmount.cli.containers import for_each, recovered
from flatmount.rootfs.image import require_root
from flatmount.runtime.oci import signal_number
from flatmount.runtime.stopping import stop


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "stop",
        help="end containers",
        description="Send the container's first process the image's stop signal (TERM unless it names one), wait, and "
        "kill what is left. A container that ended already is fine.",
        epilog="example: flatmount stop db --time 30",
    )
    parser.add_argument("containers", nargs="+", metavar="CONTAINER", help="a name, or the beginning of one")
    parser.add_argument("--time", default="10", metavar="S", help="seconds to wait before killing (default: 10)")
    parser.add_argument("--signal", metavar="SIGNAL", help="instead of the image's")
    store_root_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    seconds = float(whole(args.time, "--time", least=0, most=86400))
    number = signal_number(args.signal) if args.signal else None
    require_root("stop")
    with open_store(args) as store:
        containers = recovered(store)
    return for_each(
        args.containers, lambda name: stop(containers, containers.get(name), seconds=seconds, number=number)
    )
