"""What the verbs share: the store's options, mappings, and how facts are printed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flatmount.errors import EXIT_FAILED, EXIT_FINE, UsageError
from flatmount.plan.mapping import Mapping
from flatmount.store import Catalogue, Removed, Store

DEFAULT_ROOT = "/var/lib/flatmount"
DEFAULT_RUN = "/run/flatmount"


def verbs_of(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    *,
    summary: str,
    description: str,
    examples: str = "",
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    """Add the verb `name`, which does nothing but have verbs of its own; returns what those are added to.

    Args:
        summary: the verb's line in the help of `flatmount`.
        examples: lines for the end of its help, shown as they are; then `description` is one line.
    """
    formatter = argparse.RawDescriptionHelpFormatter if examples else argparse.HelpFormatter
    parser = verbs.add_parser(
        name, help=summary, description=description, epilog=examples or None, formatter_class=formatter
    )
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)


def store_options(parser: argparse.ArgumentParser) -> None:
    """Add `--root` and `--json`, which every verb on a store has."""
    store_root_option(parser)
    json_option(parser)


def store_root_option(parser: argparse.ArgumentParser) -> None:
    """Add `--root`."""
    parser.add_argument(
        "--root",
        default=os.environ.get("FLATMOUNT_ROOT", DEFAULT_ROOT),
        metavar="DIR",
        help=f"the store (default: $FLATMOUNT_ROOT or {DEFAULT_ROOT})",
    )


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: facts as one JSON object with a schema name, for programs."""
    parser.add_argument("--json", action="store_true", help="print facts as JSON, with a schema name and version")


def map_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add `--map` and `--gid-map`."""
    parser.add_argument(
        "--map",
        required=required,
        metavar="CONTAINER:HOST:SIZE[,...]",
        help="which ids inside are which ids of the host, for uids and gids",
    )
    parser.add_argument("--gid-map", metavar="CONTAINER:HOST:SIZE[,...]", help="another mapping for gids")


def mapping_of(args: argparse.Namespace) -> Mapping:
    """The mapping that `--map` and `--gid-map` name."""
    return Mapping.parse(args.map, args.gid_map)


def open_store(args: argparse.Namespace, *, create: bool = False) -> Store:
    """Open the store that `--root` names; `create` makes it where there is none."""
    return Store.open(root_directory(args), create=create)


def look_at_store(args: argparse.Namespace) -> Store | Catalogue:
    """The store that `--root` names, for looking: its catalogue where it is another user's."""
    root = root_directory(args)
    base = os.path.join(root, "v1")
    if os.path.isdir(base) and not (os.access(base, os.R_OK) and os.access(os.path.join(base, "data"), os.R_OK)):
        return Catalogue.open(root)
    return open_store(args)


def root_directory(args: argparse.Namespace) -> str:
    """The directory that `--root` names, without symbolic links: what the kernel's mount table calls it."""
    root: str = args.root
    return os.path.realpath(root)


def run_directory() -> str:
    """Where records of live mounts are: $FLATMOUNT_RUN or /run/flatmount, without symbolic links."""
    return os.path.realpath(os.environ.get("FLATMOUNT_RUN", DEFAULT_RUN))


def print_json(verb: str, facts: dict[str, Any], *, version: int = 1) -> None:
    """Print `facts` on stdout as one object of the schema `flatmount.<verb>/<version>`."""
    json.dump({"schema": f"flatmount.{verb}/{version}", **facts}, sys.stdout, indent=2)
    sys.stdout.write("\n")


def tell_stuck(removed: Removed) -> int:
    """Say what of a removal could not be deleted, a line for each; returns the exit code."""
    for told in removed.stuck:
        print(f"flatmount: {told}", file=sys.stderr)
    return EXIT_FAILED if removed.stuck else EXIT_FINE


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does: what it has started is taken away before the command ends.

    A SIGHUP that is ignored (nohup) stays ignored. For the main thread.
    """
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, signal.default_int_handler) for one in numbers}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def whole(text: str, what: str, *, least: int, most: int) -> int:
    """A whole number within bounds, or one line that says which were meant."""
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= most:
        raise UsageError(f"{what} {text!r} is not a whole number from {least} to {most}")
    return int(text)


def size(number: int) -> str:
    """Bytes for a person, in binary units."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
