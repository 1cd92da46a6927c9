"""`flatmount remove`: takes away containers that ended."""

from __future__ import annotations

import argparse

from flatmount.cli.common import open_store, store_root_option
from flatmount.cli.containers import for_each, recovered
from flatmount.rootfs.image import require_root
from flatmount.runtime.starter import remove


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "remove",
        help="remove containers that ended",
        description="Remove containers that ended: their changes, their output, and what they hold of the store.",
        epilog="example: flatmount remove --force db",
    )
    parser.add_argument("containers", nargs="+", metavar="CONTAINER", help="a name, or the beginning of one")
    parser.add_argument("--force", "-f", action="store_true", help="kill one that runs")
    store_root_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    require_root("remove")
    with open_store(args) as store:
        containers = recovered(store)
        return for_each(args.containers, lambda name: remove(containers, store, containers.get(name), force=args.force))
