"""`flatmount store export | import` and `image export`: images for nodes without a network."""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Sequence
from typing import Any

from flatmount.cli.common import open_store, print_json, store_options, verbs_of
from flatmount.errors import EXIT_FINE, UsageError
from flatmount.image import image_names
from flatmount.image.layout_writer import new_layout
from flatmount.image.scratch import scratch_directory
from flatmount.store import Store, StoredImage

_EXAMPLES = """examples:
  flatmount store export /mnt/usb/images         every named image, as one OCI image layout
  flatmount store export images.tar              the same as one file
  flatmount store import images.tar              on the other node
"""
_MADE_BY = "flatmount export"


def add_parser(verbs: Any) -> None:
    """Add `store` and its sub-verbs."""
    subverbs = verbs_of(
        verbs,
        "store",
        summary="carry images to a node without a network",
        description="Carry images to a node without a network.",
        examples=_EXAMPLES,
    )
    exporting = subverbs.add_parser("export", help="write every named image to one OCI image layout")
    exporting.add_argument("path", metavar="PATH", help="a directory that is new, or a file that ends in .tar")
    store_options(exporting)
    exporting.set_defaults(run=_export_all)
    importing = subverbs.add_parser("import", help="import every image of an OCI image layout")
    importing.add_argument("path", metavar="PATH", help="a layout's directory or tar archive")
    store_options(importing)
    importing.set_defaults(run=_import_all)


def add_export(subverbs: Any) -> None:
    """Add `export` to the verbs of `flatmount image`."""
    parser = subverbs.add_parser(
        "export",
        help="write an image to an OCI image layout",
        description="Write IMAGE to PATH. Its config and the diff_ids of its layers stay what they are; layers are "
        "compressed anew, so that the manifest gets another digest.",
    )
    parser.add_argument("image", metavar="IMAGE", help="a name, a digest, or the beginning of one")
    parser.add_argument("path", metavar="PATH", help="a directory that is new, or a file that ends in .tar")
    store_options(parser)
    parser.set_defaults(run=_export_one)


def _export_one(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        return _export(store, [store.image(args.image)], args, "image-export")


def _export_all(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        images = [image for image in store.images() if image.name is not None]
        if not images:
            raise UsageError(f"the store {store.root} has no named image", hint="there is nothing to export")
        return _export(store, images, args, "store-export")


def _export(store: Store, images: Sequence[StoredImage], args: argparse.Namespace, verb: str) -> int:
    told = _line if sys.stderr.isatty() else None
    path = os.path.abspath(args.path)
    if path.endswith(".tar"):
        _export_archive(store, images, path, told)
    else:
        with new_layout(path, made_by=_MADE_BY) as layout:
            store.export(images, layout, told)
    if told is not None:
        told("")
    if args.json:
        print_json(verb, {"path": path, "images": [{"name": i.name, "digest": i.digest} for i in images]})
    else:
        print(f"{path}: {len(images)} image{'s' if len(images) != 1 else ''}")
    return EXIT_FINE


def _export_archive(store: Store, images: Sequence[StoredImage], path: str, told: Any) -> None:
    """There as a whole or not at all, as a layout's directory is."""
    if os.path.lexists(path):
        raise UsageError(f"cannot write {path}: it is there", hint="name another path")
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise UsageError(f"cannot write {path}: {parent} is not a directory", hint="make it first")
    with scratch_directory(parent, os.path.basename(path)) as scratch:
        made = os.path.join(scratch, "layout")
        with new_layout(made, made_by=_MADE_BY) as layout:
            store.export(images, layout, told)
        with tarfile.open(os.path.join(scratch, "tar"), "w") as archive:
            for name in ("oci-layout", "index.json", "blobs"):
                archive.add(os.path.join(made, name), name, filter=_plain)
        os.rename(os.path.join(scratch, "tar"), path)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same images give the same archive, whoever exports them and whenever."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _import_all(args: argparse.Namespace) -> int:
    with open_store(args, create=True) as store:
        images = [store.import_image(f"{args.path}:{name}") for name in image_names(args.path)]
    if args.json:
        print_json("store-import", {"images": [{"name": i.name, "digest": i.digest} for i in images]})
    else:
        for image in images:
            print(f"{image.name or image.digest}: {len(image.layers)} layers, {image.files} files")
    return EXIT_FINE


def _line(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
