"""`flatmount gc`: frees what nobody needs any more."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from flatmount.cli.common import open_store, print_json, run_directory, size, store_options, tell_stuck
from flatmount.cli.containers import recovered
from flatmount.errors import EXIT_FINE
from flatmount.image.partial import Partial
from flatmount.rootfs.collecting import IdleUpper, Why, idle_uppers, remove_uppers
from flatmount.rootfs.mounting import recover
from flatmount.rootfs.records import Records
from flatmount.runtime.records import Containers
from flatmount.store import Removed, Store, StoredImage

_EXAMPLES = """examples:
  flatmount gc              what would be freed
  flatmount gc --yes        free it
  flatmount gc --uppers     with the changes that `umount` kept
"""


def add_parser(verbs: Any) -> None:
    """Add the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "gc",
        help="free what no name, mount or container needs",
        description="Free images without a name and without a user, with the layers and trees that only they need, "
        "uppers of mounts that are gone, and what broken pulls left for the next one. Says what it would do, unless "
        "--yes is given.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--yes", action="store_true", help="do it")
    parser.add_argument("--uppers", action="store_true", help="also the uppers that `umount` kept for a next mount")
    store_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    run = run_directory()
    records = Records(run)
    with open_store(args) as store:
        if args.yes:
            for told in recover(run, store):
                print(f"flatmount: {told}", file=sys.stderr)
            recovered(store)
        images = store.unused_images()
        found = idle_uppers(store, records, _containers)
        uppers = [upper for upper in found if upper.why is not Why.KEPT or args.uppers]
        removed = store.collect() if args.yes else None
        broken = store.broken_pulls(collect=args.yes)
        facts = _plan(store, images, uppers) if removed is None else _act(store, records, uppers, removed)
    facts["size_bytes"] += sum(partial.size_bytes for partial in broken)
    facts |= {
        "broken_pulls": [{"digest": partial.digest, "size_bytes": partial.size_bytes} for partial in broken],
        "images": [image.digest for image in images],
        "uppers": [{"name": upper.name, "why": upper.why.value} for upper in uppers],
    }
    if args.json:
        print_json("gc", facts)
    else:
        _tell(args.yes, images, uppers, broken, facts)
    return EXIT_FINE if removed is None else tell_stuck(removed)


def _plan(store: Store, images: tuple[StoredImage, ...], uppers: list[IdleUpper]) -> dict[str, Any]:
    gone = {image.digest for image in images}
    kept = {layer.path for image in store.images() if image.digest not in gone for layer in image.layers}
    layers = {layer.path: layer for image in images for layer in image.layers if layer.path not in kept}
    return {
        "done": False,
        "stuck": [],
        "layers": len(layers),
        "entries": sum(layer.entries for layer in layers.values()) + sum(upper.entries for upper in uppers),
        "size_bytes": sum(layer.size_bytes for layer in layers.values()) + sum(upper.size_bytes for upper in uppers),
    }


def _containers() -> tuple[str, ...]:
    return tuple(container.id for container in Containers(run_directory()).all())


def _act(store: Store, records: Records, uppers: list[IdleUpper], removed: Removed) -> dict[str, Any]:
    entries, size_bytes = remove_uppers(store, records, uppers, _containers)
    return {
        "done": True,
        "layers": removed.layers,
        "entries": removed.entries + entries,
        "size_bytes": removed.size_bytes + size_bytes,
        "stuck": list(removed.stuck),
    }


def _tell(
    done: bool,
    images: tuple[StoredImage, ...],
    uppers: list[IdleUpper],
    broken: tuple[Partial, ...],
    facts: dict[str, Any],
) -> None:
    for image in images:
        print(f"image {image.digest}  {len(image.layers)} layers, no name, nobody uses it")
    for upper in uppers:
        print(f"upper {upper.name}  {size(upper.size_bytes)}, {upper.why.value}")
    for partial in broken:
        print(f"blob {partial.digest}  {size(partial.size_bytes)}, the beginning of it, of a pull that was broken off")
    if not images and not uppers and not broken:
        print("nothing to free")
        return
    freed = f"{facts['layers']} layers, {facts['entries']} entries, {size(facts['size_bytes'])}"
    print(f"freed {freed}" if done else f"would free {freed}; --yes does it")
