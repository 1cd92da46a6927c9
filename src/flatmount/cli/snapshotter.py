"""`flatmount snapshotter`: the containerd snapshot service."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import replace

from flatmount.cli.common import root_directory, run_directory, size, store_root_option
from flatmount.config import LOG_LEVELS, SNAPSHOT_FORMS, load
from flatmount.errors import EXIT_FINE, MissingFeature, UsageError
from flatmount.rootfs.image import require_root
from flatmount.store.disk import Disk


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "snapshotter",
        help="serve snapshots to containerd",
        description="Serve containerd's snapshot API on a unix socket, in the foreground, until SIGTERM. No mount "
        "is undone at the end: running containers do not notice a restart. Options override the "
        "table [snapshotter] of the configuration.",
        epilog="example: flatmount snapshotter --metrics 127.0.0.1:9400",
    )
    parser.add_argument("--socket", metavar="PATH", help="where to listen (default: RUN/snapshotter.sock)")
    parser.add_argument(
        "--form",
        choices=SNAPSHOT_FORMS,
        help="what containerd is given to mount for a container (default: auto)",
    )
    parser.add_argument("--metrics", metavar="HOST:PORT", help="serve Prometheus metrics there")
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="default: info")
    store_root_option(parser)
    parser.set_defaults(run=_run)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    diff = actions.add_parser(
        "diff",
        help="write a snapshot's changes as an OCI layer, in the image's ids",
        description="Write what a snapshot changes on its parent as an uncompressed OCI layer: with the ids of the "
        "image, also for a container in a user range of its own, where containerd's diff enters the host's. The "
        "snapshotter may be running, and the container too.",
        epilog="example: flatmount snapshotter diff my-container --output layer.tar",
    )
    diff.add_argument("key", metavar="KEY", help="of the snapshot: for a container its name, or NAMESPACE/NUMBER/NAME")
    diff.add_argument("--output", metavar="FILE", help="where to (default: standard output, unless that is a terminal)")
    # No default of its own: one would take the place of what was said before the action.
    diff.add_argument("--root", default=argparse.SUPPRESS, metavar="DIR", help="the store")
    diff.set_defaults(run=_diff)


def _diff(args: argparse.Namespace) -> int:
    require_root("snapshotter diff")
    from flatmount.snapshotter.diff import find_snapshot, write_layer

    if args.output is None and sys.stdout.isatty():
        raise UsageError("a layer is no text for a terminal", hint="say --output FILE")
    root = root_directory(args)
    disk = Disk.open(root, create=False)
    try:
        snapshot, parent = find_snapshot(root, args.key)
        if args.output is None:
            written = write_layer(disk, snapshot, parent, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            new = args.output + ".new"
            try:
                with open(new, "wb") as file:
                    written = write_layer(disk, snapshot, parent, file)
                os.replace(new, args.output)
            except BaseException:
                with suppress(OSError):
                    os.unlink(new)
                raise
    finally:
        disk.close()
    print(f"{written.diff_id}  {written.entries} entries, {size(written.size_bytes)}", file=sys.stderr)
    return EXIT_FINE


def _run(args: argparse.Namespace) -> int:
    require_root("snapshotter")
    try:
        from flatmount.snapshotter.daemon import Place, run
    except ModuleNotFoundError as error:
        raise MissingFeature(
            f"the snapshotter needs the package {error.name}", hint="install flatmount[snapshotter]"
        ) from None
    except ImportError as error:
        # The loader's own words name the library.
        raise MissingFeature(f"the snapshotter cannot be loaded: {error}", hint="install libnghttp2") from None
    run_at = run_directory()
    place = Place(
        root=root_directory(args),
        run=run_at,
        socket=os.path.abspath(args.socket or os.path.join(run_at, "snapshotter.sock")),
    )
    given = {"form": args.form, "metrics": args.metrics, "log_level": args.log_level}
    settings = replace(load().snapshotter, **{name: value for name, value in given.items() if value is not None})
    return run(place, settings)
