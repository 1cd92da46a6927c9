"""`flatmount image flatten`, and the same in the background after an import."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import flatmount
from flatmount.cli.common import open_store, print_json, store_options
from flatmount.config import FLAT_FORMATS, load
from flatmount.errors import EXIT_FINE, MissingFeature
from flatmount.kernel.erofs import require_erofs
from flatmount.rootfs.image import probe_store
from flatmount.store import FlatForm, Store, StoredImage
from flatmount.strategies import AUTO, Choice, flat

WHEN = ("background", "now", "first-use")


def add_parser(subverbs: Any) -> None:
    """Add `flatten` to the verbs of `flatmount image`."""
    parser = subverbs.add_parser(
        "flatten",
        help="build the image's flat tree now",
        description="Build the tree of hard links that all layers of IMAGE are merged into, unless it is there. "
        "It begins with the flat tree of the longest chain beneath that has one. With --flat-format erofs, write an "
        "EROFS image with a copy of everything. Containers get the form that was asked for last.",
    )
    parser.add_argument("image", metavar="IMAGE", help="a name, a digest, or the beginning of one")
    format_option(parser)
    store_options(parser)
    parser.set_defaults(run=_run)


def when_option(parser: argparse.ArgumentParser) -> None:
    """Add `--flatten`, for verbs that bring an image into the store."""
    parser.add_argument(
        "--flatten",
        choices=WHEN,
        default=WHEN[0],
        help="when the flat tree is built: by a process of its own that goes on after this one, before this one "
        "ends, or when a container was first started without it (default: %(default)s)",
    )
    format_option(parser)


def format_option(parser: argparse.ArgumentParser) -> None:
    """Add `--flat-format`."""
    parser.add_argument(
        "--flat-format",
        choices=FLAT_FORMATS,
        help="the form of the flat tree: hard links into the layers, or an EROFS image (default: flat_format in the "
        "configuration's [store], or hardlink)",
    )


def configured_form() -> FlatForm:
    """The form that the configuration names. Raises: UsageError."""
    return FlatForm(load().store.flat_format)


def form_of(args: argparse.Namespace) -> FlatForm:
    """The form that `--flat-format` or else the configuration names. Raises: UsageError."""
    return configured_form() if args.flat_format is None else FlatForm(args.flat_format)


def usable_form(args: argparse.Namespace, store: Store) -> FlatForm:
    """`form_of`, if this host mounts it. What was only configured gives way, with a line on stderr.

    Raises: MissingFeature for what was asked for by `--flat-format`; UsageError.
    """
    form = form_of(args)
    if form is FlatForm.EROFS:
        # Where no root is, nothing can be probed: the kernel's word comes when it mounts.
        try:
            require_erofs(os.geteuid() != 0 or probe_store(store, images=True).facts.erofs)
        except MissingFeature as missing:
            if args.flat_format is not None:
                raise
            sys.stderr.write(f"flatmount: {missing}: the flat tree is made of hard links\n")
            return FlatForm.HARDLINK
    return form


def tell_if_not_ready(asked: str, choice: Choice, store: Store, image: StoredImage) -> None:
    """Say that `auto` does not wait for a flat tree, and have it built unless somebody builds already."""
    if asked != AUTO or choice.name == flat.NAME:
        return
    name = image.name or image.digest
    sys.stderr.write(f"flatmount: the flat tree of {name} is not ready: strategy {choice.name}\n")
    if not store.building():
        _in_background(store.root, image.digest, None)


def flatten_when(when: str, store: Store, image: StoredImage, form: FlatForm) -> None:
    """Build the flat tree of an image that was just stored, as `--flatten` says; nothing where there is one."""
    if when == "first-use":
        return
    if store.flat_tree(image, form) is not None:
        store.prefer_flat(image, form)
    elif when == "now":
        store.ensure_flat(image, form)
    else:
        _in_background(store.root, image.digest, form)


# Run by whichever interpreter runs us, with the package found where ours was.
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flatmount.cli.main import main; sys.exit(main())"


def _in_background(root: str, digest: str, form: FlatForm | None) -> None:
    """Build it in a process that is nobody's child and holds none of our streams.

    Forked twice and then started anew: SQLite's state must not be used behind a fork (a connection made there takes
    the locks of its parent's for its own, and its commits get lost). What a kill leaves of it the next command sweeps.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(flatmount.__file__)))
    command = [sys.executable, "-c", _PROGRAM, package, "image", "flatten", digest, "--root", root]
    if form is not None:
        command += ["--flat-format", form]
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
        form = usable_form(args, store)
        there = store.flat_tree(image, form) is not None
        tree = store.ensure_flat(image, form)
        store.prefer_flat(image, form)
    if args.json:
        facts = {"name": image.name, "digest": image.digest, "flat_tree": tree, "form": form, "built": not there}
        print_json("image-flatten", facts)
    else:
        print(f"{tree}: {'was there already' if there else 'built'}")
    return EXIT_FINE
