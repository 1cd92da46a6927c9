"""`flatmount snapshotter`: the containerd snapshot service."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from flatmount.cli.common import root_directory, run_directory, store_root_option
from flatmount.config import LOG_LEVELS, SNAPSHOT_FORMS, load
from flatmount.errors import MissingFeature
from flatmount.rootfs.image import require_root


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


def _run(args: argparse.Namespace) -> int:
    require_root("snapshotter")
    try:
        from flatmount.snapshotter.daemon import Place, run
    except ModuleNotFoundError as error:
        raise MissingFeature(
            f"the snapshotter needs the package {error.name}", hint="install flatmount[snapshotter]"
        ) from None
    run_at = run_directory()
    place = Place(
        root=root_directory(args),
        run=run_at,
        socket=os.path.abspath(args.socket or os.path.join(run_at, "snapshotter.sock")),
    )
    given = {"form": args.form, "metrics": args.metrics, "log_level": args.log_level}
    settings = replace(load().snapshotter, **{name: value for name, value in given.items() if value is not None})
    return run(place, settings)
