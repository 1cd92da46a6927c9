"""`flatmount image flatten`, and the same in the background after an import."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import flatmount
from flatmount.cli.common import open_store, print_json, store_options
from flatmount.errors import EXIT_FINE
from flatmount.store import Store, StoredImage

WHEN = ("background", "now", "first-use")


def add_parser(subverbs: Any) -> None:
    """Add `flatten` to the verbs of `flatmount image`."""
    parser = subverbs.add_parser(
        "flatten",
        help="build the image's flat tree now",
        description="Build the tree of hard links that all layers of IMAGE are merged into, unless it is there. "
        "It begins with the flat tree of the longest chain beneath that has one.",
    )
    parser.add_argument("image", metavar="IMAGE", help="a name, a digest, or the beginning of one")
    store_options(parser)
    parser.set_defaults(run=_run)


def when_option(parser: argparse.ArgumentParser) -> None:
    """Add `--flatten`, for verbs that bring an image into the store."""
    parser.add_argument(
        "--flatten",
        choices=WHEN,
        default=WHEN[0],
        help="when the flat tree is built: by a process of its own that goes on after this one, before this one "
        "ends, or when a container first needs it (default: %(default)s)",
    )


def flatten_when(when: str, store: Store, image: StoredImage) -> None:
    """Build the flat tree of an image that was just stored, as `--flatten` says; nothing where there is one."""
    if when == "first-use" or store.flat_tree(image) is not None:
        return
    if when == "now":
        store.ensure_flat(image)
        return
    _in_background(store.root, image.digest)


# Run by whichever interpreter runs us, with the package found where ours was.
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flatmount.cli.main import main; sys.exit(main())"


def _in_background(root: str, digest: str) -> None:
    """Build it in a process that is nobody's child and holds none of our streams.

    Forked twice and then started anew: SQLite's state must not be used behind a fork (a connection made there takes
    the locks of its parent's for its own, and its commits get lost). What a kill leaves of it the next command sweeps.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(flatmount.__file__)))
    command = [sys.executable, "-c", _PROGRAM, package, "image", "flatten", digest, "--root", root]
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            os.execv(sys.executable, command)
    finally:
        os._exit(0)


def _run(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        image = store.image(args.image)
        there = store.flat_tree(image) is not None
        flat = store.ensure_flat(image)
    if args.json:
        print_json("image-flatten", {"name": image.name, "digest": image.digest, "flat_tree": flat, "built": not there})
    else:
        print(f"{flat}: {'was there already' if there else 'built'}")
    return EXIT_FINE
