"""`flatmount umount`: takes a root file system off again."""

from __future__ import annotations

import argparse
import os
import sys

from flatmount.cli.common import open_store, print_json, run_directory, store_options
from flatmount.errors import EXIT_FINE, UsageError
from flatmount.rootfs.image import require_root
from flatmount.rootfs.mounting import recover, umount
from flatmount.rootfs.records import Records


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "umount",
        help="take a root file system off its directory",
        description="Take off what `flatmount mount` put on DIR. The upper stays, unless the mount was --ephemeral.",
        epilog="example: flatmount umount /mnt",
    )
    parser.add_argument("directory", metavar="DIR", help="the directory it is mounted on")
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    require_root("umount")
    run = run_directory()
    target = os.path.realpath(args.directory)
    with open_store(args) as store:
        for told in recover(run, store):
            print(f"flatmount: {told}", file=sys.stderr)
        records = Records(run)
        record = records.at(target)
        if record is None or record.root != store.root:
            raise UsageError(
                f"no mount of this store is recorded at {target}", hint=f"`ls {run}/mounts` shows what is recorded"
            )
        operations = umount(store, records, record)
    kept = f"{record.uppers}/{record.upper}" if record.writable and not record.ephemeral else None
    if args.json:
        print_json("umount", {"id": record.id, "target": target, "mount_operations": operations, "upper": kept})
    elif kept:
        print(f"changes are kept in {kept}; `flatmount gc --uppers` frees such as nobody uses")
    return EXIT_FINE
