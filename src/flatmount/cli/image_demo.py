"""`flatmount image demo`: make an image of real software, for machines without a registry."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flatmount.cli.common import open_store, print_json, store_options, whole
from flatmount.cli.flatten import flatten_when, usable_form, when_option
from flatmount.errors import EXIT_FINE
from flatmount.image.demo import MAX_LAYERS, MIN_LAYERS, DemoImage, Source, build_demo, default_cache
from flatmount.image.scratch import scratch_directory
from flatmount.store import Progressed, Store, StoredImage

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
    when_option(parser)
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
    cache, name = os.path.abspath(args.cache), args.name or _NAME
    progress = _line if sys.stderr.isatty() else _quiet
    started = time.monotonic()
    with ExitStack() as stack:
        # Opened first: a store that cannot be used is told before packages are fetched.
        store = stack.enter_context(open_store(args, create=True)) if args.name or args.out is None else None
        out = args.out or os.path.join(stack.enter_context(_scratch(cache)), "layout")
        image = _build(out, layers, cache, name, progress)
        if store is not None:
            form = usable_form(args, store)
            stored = store.import_image(image.path, name=name, progress=_import_progress(progress))
            flatten_when(args.flatten, store, stored, form)
    progress("")
    seconds = time.monotonic() - started
    if args.json:
        print_json("image-demo", _facts(image, args.out is not None, name, seconds))
    else:
        print(
            f"{args.out or name}: {image.layers} layers, {image.generated_layers} of them generated, "
            f"{len(image.packages)} packages, {image.size_bytes / 1e6:.1f} MB, {seconds:.1f} s, {image.manifest_digest}"
        )
    return EXIT_FINE


def import_demo(
    store: Store, *, layers: int, name: str, progress: Callable[[str], None], cache: str | None = None
) -> StoredImage:
    """Make the demo image and import it into `store` as `name`, for verbs that need an image when none is named.

    `progress` is given one line of text at a time. Raises: as `build_demo` and `Store.import_image`.
    """
    cache = cache or default_cache()
    with _scratch(cache) as scratch:
        image = _build(os.path.join(scratch, "layout"), layers, cache, name, progress)
        return store.import_image(image.path, name=name, progress=_import_progress(progress))


@contextmanager
def _scratch(cache: str) -> Iterator[str]:
    os.makedirs(cache, exist_ok=True)
    with scratch_directory(cache, "image") as scratch:
        yield scratch


def _build(out: str, layers: int, cache: str, name: str, progress: Callable[[str], None]) -> DemoImage:
    def tell(what: str, done: int, total: int) -> None:
        progress(f"demo image: {what} {done}/{total}")

    image = build_demo(out, layers=layers, cache=cache, progress=tell, name=name)
    if image.source is Source.BUSYBOX:
        progress("")
        sys.stderr.write(f"flatmount: the demo image is made of busybox, not of packages: {image.why_not_packages}\n")
    return image


def _import_progress(progress: Callable[[str], None]) -> Callable[[Progressed], None]:
    return lambda at: progress(f"demo image: layer {at.layer} of {at.layers} into the store")


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


def _line(text: str) -> None:
    """Write over the one line of progress on the terminal; "" takes it away."""
    sys.stderr.write(f"\r\033[K{text}")
    sys.stderr.flush()


def _quiet(text: str) -> None:
    """Where nobody watches, nothing is shown."""
