"""`flatmount mount`: a root file system that outlives the command."""

from __future__ import annotations

import argparse
import sys

from flatmount.cli.common import map_options, mapping_of, open_store, print_json, run_directory, store_options
from flatmount.cli.flatten import configured_form, tell_if_not_ready
from flatmount.errors import EXIT_FINE
from flatmount.rootfs.image import probe_store, require_root
from flatmount.rootfs.mounting import Request, mount, recover
from flatmount.rootfs.records import Records
from flatmount.store import FlatForm
from flatmount.strategies import AUTO, NAMES


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "mount",
        help="assemble an image's root file system on a directory",
        description="Assemble the root file system of IMAGE on DIR, an empty directory, with ids shifted by --map. "
        "It outlives the command and is recorded under the run directory; `flatmount umount DIR` takes it off. "
        "Strategies flat and detached keep changes in the container's ids: only ids of the mapping can make files "
        "in it, the host's root cannot (EOVERFLOW).",
        epilog="example: flatmount mount demo /mnt --map 0:100000:65536 --ephemeral",
    )
    parser.add_argument("image", metavar="IMAGE", help="an image of the store")
    parser.add_argument("directory", metavar="DIR", help="where; an empty directory, not a symbolic link")
    parser.add_argument("--strategy", default=AUTO, choices=NAMES, help="default: %(default)s, which says what it took")
    parser.add_argument("--id", help="the name of the mount and of its upper in the store (default: made up)")
    changes = parser.add_mutually_exclusive_group()
    changes.add_argument("--upper", metavar="DIR", help="keep changes in DIR, made if it does not exist")
    changes.add_argument("--ephemeral", action="store_true", help="changes go with the mount")
    changes.add_argument("--read-only", action="store_true", help="no changes")
    map_options(parser, required=True)
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    mapping = mapping_of(args)
    require_root("mount")
    run = run_directory()
    with open_store(args) as store:
        for told in recover(run, store):
            print(f"flatmount: {told}", file=sys.stderr)
        form = configured_form()
        request = Request(
            image=store.image(args.image),
            target=args.directory,
            mapping=mapping,
            strategy=args.strategy,
            id=args.id,
            upper=args.upper,
            ephemeral=args.ephemeral,
            read_only=args.read_only,
            flat_form=form,
        )
        done = mount(store, Records(run), run, request, probe_store(store, images=form is FlatForm.EROFS).facts)
        tell_if_not_ready(args.strategy, done.choice, store, request.image)
    record = done.record
    if args.json:
        facts = {
            "id": record.id,
            "target": record.target,
            "image": record.image,
            "strategy": record.strategy,
            "reason": done.choice.reason,
            "mount_operations": done.mount_operations,
            "upper": f"{record.uppers}/{record.upper}" if record.writable else None,
            "ephemeral": record.ephemeral,
        }
        print_json("mount", facts)
    else:
        plural = "" if done.mount_operations == 1 else "s"
        made = f"strategy {record.strategy}, {done.mount_operations} mount operation{plural}"
        print(f"{record.target}  id {record.id}  {made}")
    return EXIT_FINE
