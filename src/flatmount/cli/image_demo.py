"""`flatmount image demo`: make an image of real software, for machines without a registry."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from flatmount.cli.common import open_store, print_json, store_options, whole
from flatmount.image.demo import MAX_LAYERS, MIN_LAYERS, DemoImage, Source, build_demo, default_cache
from flatmount.image.demo_packages import Progress
from flatmount.image.scratch import scratch_directory
from flatmount.store import Store, StoredImage

_NAME = "demo"
_EXAMPLES = """\
examples:
  flatmount image demo --layers 60              # into the store, as `demo`
  flatmount image demo --layers 200 --out DIR   # only write an OCI image layout
"""


def add_parser(verbs: Any) -> None:
    """Add `demo` to the verbs of `flatmount image`."""
    parser = verbs.add_parser(
        "demo",
        help="make an image of real software",
        description="Make an OCI image of Debian packages, one a layer, with layers that remove and replace files; "
        "of busybox where packages cannot be had.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    store_options(parser)
    parser.add_argument("--layers", default="60", metavar="N", help="from 5 to 1000 (default: %(default)s)")
    parser.add_argument("--name", metavar="NAME", help="the image's name in the store (default: demo)")
    parser.add_argument(
        "--out", metavar="DIR", help="write the image layout here; not into the store, unless --name is given"
    )
    parser.add_argument(
        "--cache", default=default_cache(), metavar="DIR", help="where fetched packages are kept (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def into_store(
    store: Store, *, layers: int, name: str, cache: str | None = None, progress: Progress | None = None
) -> tuple[StoredImage, DemoImage]:
    """Make the demo image and import it; the layout it is imported from is gone afterwards."""
    cache = cache or default_cache()
    os.makedirs(cache, exist_ok=True)
    with scratch_directory(cache, "image") as scratch:
        made = build_demo(os.path.join(scratch, "layout"), layers=layers, cache=cache, progress=progress, name=name)
        return store.import_image(made.path, name=name), made


def run(args: argparse.Namespace) -> int:
    """Make the image, bring it into the store unless only a layout is wanted, and say what was made."""
    layers = whole(args.layers, "--layers", least=MIN_LAYERS, most=MAX_LAYERS)
    cache = os.path.abspath(args.cache)
    name = args.name or _NAME
    started = time.monotonic()
    if args.out is None:
        with open_store(args, create=True) as store:
            _, image = into_store(store, layers=layers, name=name, cache=cache, progress=_progress())
    else:
        image = build_demo(args.out, layers=layers, cache=cache, progress=_progress(), name=name)
        if args.name:
            with open_store(args, create=True) as store:
                store.import_image(image.path, name=name)
    seconds = time.monotonic() - started
    if image.source is Source.BUSYBOX:
        sys.stderr.write(f"flatmount: made of busybox instead of packages: {image.why_not_packages}\n")
    if args.json:
        print_json("image-demo", _facts(image, args.out is not None, name, seconds))
    else:
        print(
            f"{args.out or name}: {image.layers} layers, {image.generated_layers} of them generated, "
            f"{len(image.packages)} packages, {image.size_bytes / 1e6:.1f} MB, {seconds:.1f} s, {image.manifest_digest}"
        )
    return 0


def _facts(image: DemoImage, kept: bool, name: str, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "path": image.path if kept else None,
        "source": str(image.source),
        "why_not_packages": image.why_not_packages or None,
        "packages": list(image.packages),
        "layers": image.layers,
        "generated_layers": image.generated_layers,
        "size_bytes": image.size_bytes,
        "manifest_digest": image.manifest_digest,
        "seconds": round(seconds, 3),
    }


def _progress() -> Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r\033[K{what} {done}/{total}{end}")
        sys.stderr.flush()

    return show
