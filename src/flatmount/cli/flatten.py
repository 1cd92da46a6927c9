"""`flatmount image flatten`, and the same in the background after an import."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import struct
import sys
from typing import Any

import flatmount
from flatmount.cli.common import open_store, print_json, store_options
from flatmount.config import FLAT_FORMATS, load
from flatmount.errors import EXIT_FINE, FlatmountError, MissingFeature, StoreError, from_os_error
from flatmount.kernel.erofs import require_erofs
from flatmount.rootfs.image import probe_store
from flatmount.store import FlatForm, Store, StoredImage
from flatmount.strategies import AUTO, Choice, flat

_LOCK = "background.lock"
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
    try:
        if not store.building():
            _in_background(store.root, image.digest, None)
    except (OSError, FlatmountError) as error:
        _tell_nobody_builds(image, error)


def flatten_when(when: str, store: Store, image: StoredImage, form: FlatForm) -> None:
    """Build the flat tree of an image that was just stored, as `--flatten` says; nothing where there is one."""
    if when == "first-use":
        return
    if when == "now" or store.flat_tree(image, form) is not None:
        _build(store, image, form, asked=form is not configured_form())
        return
    try:
        _in_background(store.root, image.digest, None if form is configured_form() else form)
    except (OSError, FlatmountError) as error:
        _tell_nobody_builds(image, error)


def _tell_nobody_builds(image: StoredImage, error: OSError | FlatmountError) -> None:
    """What was asked for is done; that its flat tree is not begun is no failure of it."""
    why = error.line() if isinstance(error, FlatmountError) else from_os_error(error, "start a process").line()
    name = image.name or image.digest
    sys.stderr.write(f"flatmount: nobody builds the flat tree of {name} (`flatmount image flatten` does): {why}\n")


def _build(store: Store, image: StoredImage, form: FlatForm, *, asked: bool) -> tuple[str, FlatForm]:
    """Build the flat tree unless it is there, and let containers have it; returns it and its form.

    An EROFS image that cannot be made gives way to hard links, with a line on stderr, where nobody `asked` for it but
    the configuration: otherwise every start would begin another build of it. Raises: StoreError, UnknownImage.
    """
    try:
        tree = store.ensure_flat(image, form)
    except StoreError as error:
        if asked or form is not FlatForm.EROFS:
            raise
        sys.stderr.write(f"flatmount: {error.line()}: the flat tree is made of hard links\n")
        form = FlatForm.HARDLINK
        tree = store.ensure_flat(image, form)
    store.prefer_flat(image, form)
    return tree, form


# Run by whichever interpreter runs us, with the package found where ours was.
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flatmount.cli.main import main; sys.exit(main())"


def _in_background(root: str, digest: str, form: FlatForm | None) -> None:
    """Build it in a process that is nobody's child and holds none of our streams, unless one was begun already.

    That one holds a lock for as long as it lives, which it inherits: of an open file description, so that neither fork
    nor execve lets go of it. Raises: OSError.

    Forked twice and then started anew: SQLite's state must not be used behind a fork (a connection made there takes
    the locks of its parent's for its own, and its commits get lost). What a kill leaves of it the next command sweeps.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(flatmount.__file__)))
    command = [sys.executable, "-c", _PROGRAM, package, "image", "flatten", digest, "--root", root]
    if form is not None:
        command += ["--flat-format", form]
    lock = os.open(os.path.join(root, "v1", _LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if _take(lock, f"{digest} {form}"):
            _start(command, lock)
    finally:
        os.close(lock)


def _take(lock: int, what: str) -> bool:
    """Take the byte of the lock file that stands for `what`; whether nobody has it."""
    at = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7])
    try:
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _start(command: list[str], lock: int) -> None:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            os.set_inheritable(lock, True)
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
        before = {one: store.flat_tree(image, one) for one in FlatForm}
        tree, form = _build(store, image, form, asked=args.flat_format is not None)
    if args.json:
        facts = {
            "name": image.name,
            "digest": image.digest,
            "flat_tree": tree,
            "form": form,
            "built": tree != before[form],
        }
        print_json("image-flatten", facts)
    else:
        print(f"{tree}: {'was there already' if tree == before[form] else 'built'}")
    return EXIT_FINE
