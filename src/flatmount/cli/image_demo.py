"""`flatmount image demo`: make an image of real software, for machines without a registry."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

from flatmount.cli.common import open_store, print_json, store_options, whole
from flatmount.image.demo import MAX_LAYERS, MIN_LAYERS, DemoImage, Source, build_demo, default_cache
from flatmount.image.demo_packages import Progress
from flatmount.image.scratch import scratch_directory

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


def run(args: argparse.Namespace) -> int:
    """Make the image, bring it into the store unless only a layout is wanted, and say what was made."""
    layers = whole(args.layers, "--layers", least=MIN_LAYERS, most=MAX_LAYERS)
    cache = os.path.abspath(args.cache)
    name = args.name or _NAME
    started = time.monotonic()
    with ExitStack() as stack:
        out = args.out
        if out is None:
            os.makedirs(cache, exist_ok=True)
            out = os.path.join(stack.enter_context(scratch_directory(cache, "image")), "layout")
        image = build_demo(out, layers=layers, cache=cache, progress=_progress(), name=name)
        if args.out is None or args.name:
            open_store(args, create=True).import_image(image.path, name=name)
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
