"""`flatmount image`: what is in the store, and what gets in and out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from flatmount.cli import flatten, image_demo, image_pull
from flatmount.cli.common import look_at_store, open_store, print_json, size, store_options, tell_stuck, verbs_of
from flatmount.cli.flatten import flatten_when, usable_form, when_option
from flatmount.cli.store import add_export
from flatmount.errors import EXIT_FINE
from flatmount.store import Catalogue, Costs, FlatForm, Progressed, Store, StoredImage, Usage

_EXAMPLES = """examples:
  flatmount image import ./layout --name web     an OCI image layout: a directory or a tar archive
  flatmount image import saved.tar:app:1.2       one of several images that `docker save` wrote
  flatmount image pull docker.io/library/debian:12
  flatmount image show web --json
  flatmount image export web ./layout
  flatmount image remove web
"""


def add_parser(verbs: Any) -> None:
    """Add `image` and its sub-verbs to `verbs`, argparse's action for sub-parsers."""
    subverbs = verbs_of(
        verbs,
        "image",
        summary="import, pull, list, show, export and remove images",
        description="Import, pull, list, show, export and remove images.",
        examples=_EXAMPLES,
    )

    adding = subverbs.add_parser("import", help="import an OCI image layout or a docker-archive")
    adding.add_argument("path", metavar="PATH[:NAME]", help="a layout's directory, or a tar archive")
    adding.add_argument("--name", help="what the image is called in the store")
    store_options(adding)
    when_option(adding)
    adding.set_defaults(run=_import)

    listing = subverbs.add_parser("list", help="list the images of the store")
    store_options(listing)
    listing.set_defaults(run=_list)

    showing = subverbs.add_parser("show", help="show one image: layers, owners, what it costs")
    showing.add_argument("image", metavar="IMAGE", help="a name, a digest, or the beginning of one")
    store_options(showing)
    showing.set_defaults(run=_show)

    removing = subverbs.add_parser("remove", help="remove an image that nothing uses")
    removing.add_argument("image", metavar="IMAGE", help="a name, a digest, or the beginning of one")
    store_options(removing)
    removing.set_defaults(run=_remove)

    add_export(subverbs)
    flatten.add_parser(subverbs)
    image_pull.add_parser(subverbs)
    image_demo.add_parser(subverbs)


def facts(image: StoredImage) -> dict[str, Any]:
    """What `list` and `show` tell programs about an image."""
    return {
        "name": image.name,
        "digest": image.digest,
        "chain_id": image.chain_id,
        "layers": len(image.layers),
        "files": image.files,
        "size_bytes": sum(layer.size_bytes for layer in image.layers),
    }


def _import(args: argparse.Namespace) -> int:
    progress = _Line() if sys.stderr.isatty() else None
    with open_store(args, create=True) as store:
        try:
            form = usable_form(args, store)
            image = store.import_image(args.path, name=args.name, progress=progress)
            flatten_when(args.flatten, store, image, form)
        finally:
            if progress is not None:
                progress.clear()
    if args.json:
        print_json("image-import", facts(image))
    else:
        print(f"{image.name or image.digest}: {len(image.layers)} layers, {image.files} files, {image.digest}")
        if image.dropped_xattrs:
            print(f"  {image.dropped_xattrs} extended attributes dropped: overlayfs's own, and host labels")
    return EXIT_FINE


def _list(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
        images = [facts(image) for image in store.images()]
    if args.json:
        print_json("image-list", {"images": images})
        return EXIT_FINE
    rows = [
        (fact["name"] or "-", fact["digest"][7:19], str(fact["layers"]), str(fact["files"]), size(fact["size_bytes"]))
        for fact in images
    ]
    _table(("NAME", "DIGEST", "LAYERS", "FILES", "SIZE"), rows)
    return EXIT_FINE


def _show(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
        image = store.image(args.image)
        costs = store.costs(image) if isinstance(store, Store) else None
        detail = facts(image) | _detail(store, image) | {"costs": None if costs is None else _costs(costs)}
    if args.json:
        print_json("image-show", detail)
        return EXIT_FINE
    for key in ("name", "digest", "chain_id", "platform", "user", "entrypoint", "cmd", "workdir", "flat_tree"):
        print(f"{key.replace('_', ' '):<12}{detail[key] if detail[key] is not None else '-'}")
    print(f"{'root':<12}mode {image.root.mode:04o}, owner {image.root.uid}:{image.root.gid}")
    print(f"{'uids':<12}{_spans(image.owners.uids)}")
    print(f"{'gids':<12}{_spans(image.owners.gids)}")
    if detail["holders"] is not None:
        print(f"{'held by':<12}{', '.join(detail['holders']) or 'nobody'}")
    print(f"{'files':<12}{image.files}, {size(detail['size_bytes'])} in {len(image.layers)} layers")
    if costs is None:
        rows = [(layer.path, layer.diff_id[7:19], str(layer.entries), size(layer.size_bytes)) for layer in image.layers]
        _table(("LAYER", "DIFF ID", "ENTRIES", "SIZE"), rows)
        return EXIT_FINE
    _show_costs(image, costs)
    return EXIT_FINE


def _show_costs(image: StoredImage, costs: Costs) -> None:
    """What is on disk, in inodes and blocks: `SIZE` is the content, `ON DISK` what it takes."""
    total, own = costs.total, costs.own
    print(f"{'on disk':<12}{total.inodes} inodes, {size(total.size_bytes)}")
    print(f"{'of its own':<12}{own.inodes} inodes, {size(own.size_bytes)}: what removing it frees")
    rows = [
        (
            layer.path,
            layer.diff_id[7:19],
            str(layer.entries),
            size(layer.size_bytes),
            str(cost.usage.inodes),
            size(cost.usage.size_bytes),
            _others(cost.shared_with),
        )
        for layer, cost in zip(image.layers, costs.layers, strict=True)
    ]
    _table(("LAYER", "DIFF ID", "ENTRIES", "SIZE", "INODES", "ON DISK", "SHARED WITH"), rows)
    for flat in costs.flat:
        within = f"{flat.directories} directories and {flat.links} " + (
            "links into the layers" if flat.form is FlatForm.HARDLINK else "files of its own, in one"
        )
        copies = f", {flat.copies} copies where links ran out" if flat.copies else ""
        print(
            f"{flat.path}, {flat.form}: {flat.usage.inodes} inodes, {size(flat.usage.size_bytes)}; {within}{copies}"
            + (f"; shared with {_others(flat.shared_with)}" if flat.shared_with else "")
        )


def _others(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "-"


def _costs(costs: Costs) -> dict[str, Any]:
    def usage(of: Usage) -> dict[str, int]:
        return {"inodes": of.inodes, "size_bytes": of.size_bytes}

    return {
        "total": usage(costs.total),
        "own": usage(costs.own),
        "layers": [
            {"path": layer.path, **usage(layer.usage), "shared_with": list(layer.shared_with)} for layer in costs.layers
        ],
        "flat": [
            {
                "form": flat.form,
                "path": flat.path,
                "directories": flat.directories,
                "links": flat.links,
                "copies": flat.copies,
                **usage(flat.usage),
                "shared_with": list(flat.shared_with),
            }
            for flat in costs.flat
        ],
    }


def _detail(store: Store | Catalogue, image: StoredImage) -> dict[str, Any]:
    config = image.config
    detail = {
        "platform": "/".join(part for part in (config.os, config.architecture, config.variant) if part),
        "user": config.user or None,
        "env": list(config.env),
        "entrypoint": list(config.entrypoint),
        "cmd": list(config.cmd),
        "workdir": config.workdir or None,
        "flat_tree": store.flat_tree(image, store.flat_form(image)),
        "dropped_xattrs": image.dropped_xattrs,
        "root": {
            "mode": image.root.mode,
            "uid": image.root.uid,
            "gid": image.root.gid,
            "mtime_ns": image.root.mtime_ns,
        },
        "owners": {"uids": [list(span) for span in image.owners.uids], "gids": [list(s) for s in image.owners.gids]},
        "layer_list": [
            {"diff_id": layer.diff_id, "path": layer.path, "entries": layer.entries, "size_bytes": layer.size_bytes}
            for layer in image.layers
        ],
    }
    if isinstance(store, Catalogue):
        # Not empty but unknown: an image's configuration is its store's owner's.
        return detail | dict.fromkeys(("user", "env", "entrypoint", "cmd", "workdir", "holders"))
    return detail | {"holders": [holder.holder for holder in store.holders() if holder.digest == image.digest]}


def _remove(args: argparse.Namespace) -> int:
    with open_store(args) as store:
        gone = store.remove_image(args.image)
    if args.json:
        print_json(
            "image-remove",
            {
                "names": list(gone.names),
                "images": list(gone.images),
                "layers": gone.layers,
                "entries": gone.entries,
                "size_bytes": gone.size_bytes,
                "stuck": list(gone.stuck),
            },
        )
    elif gone.images:
        print(f"removed {args.image}: {gone.layers} layers, {gone.entries} entries, {size(gone.size_bytes)} freed")
    else:
        print(f"removed the name {args.image}; its image has others")
    return tell_stuck(gone)


class _Line:
    """One line on a terminal that is written over until the import is done."""

    def __init__(self) -> None:
        self._last_ns = 0

    def __call__(self, at: Progressed) -> None:
        now = time.monotonic_ns()
        if now - self._last_ns > 100_000_000:
            self._last_ns = now
            done = f"{size(at.done_bytes)} of {size(at.total_bytes)}"
            sys.stderr.write(f"\r\x1b[Klayer {at.layer} of {at.layers}: {done}")
            sys.stderr.flush()

    def clear(self) -> None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _spans(spans: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
