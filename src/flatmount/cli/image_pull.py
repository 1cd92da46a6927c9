"""`flatmount image pull`: an image out of a registry into the store."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flatmount.cli.common import open_store, print_json, size, store_options
from flatmount.cli.flatten import flatten_when, usable_form, when_option
from flatmount.config import DEFAULT_PATH, Config, load
from flatmount.errors import EXIT_FINE
from flatmount.image.model import Platform
from flatmount.image.registry_reference import Reference
from flatmount.store import Progressed, StoredImage

if TYPE_CHECKING:
    from flatmount.image.registry import RegistryImage

_EXAMPLES = f"""\
Credentials are those of docker, podman and skopeo: $REGISTRY_AUTH_FILE, auth.json, ~/.docker/config.json and helpers.
Mirrors, plain HTTP and authorities are said in {DEFAULT_PATH} or the file that $FLATMOUNT_CONFIG names.

examples:
  flatmount image pull docker.io/library/debian:12
  flatmount image pull registry.example:5000/team/app@sha256:... --name app
  flatmount image pull localhost:5000/app --plain-http
  flatmount image pull docker.io/library/debian:12 --platform linux/arm64
"""
_BAR = 24
_SHOWN = 8
_REFRESH_S = 0.1


def add_parser(verbs: Any) -> None:
    """Add `pull` to the verbs of `flatmount image`."""
    parser = verbs.add_parser(
        "pull",
        help="pull an image from a registry",
        description="Pull an image from a registry. What the store has already is not fetched, and with what a pull "
        "fetched that was broken off the next one goes on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reference", metavar="HOST/NAME[:TAG][@DIGEST]", help="the image; without a tag, `latest`")
    parser.add_argument("--name", metavar="NAME", help="what the image is called in the store (default: HOST/NAME:TAG)")
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        help="which image, where there are several (default: this machine's)",
    )
    parser.add_argument("--plain-http", action="store_true", help="speak to HOST without TLS")
    store_options(parser)
    when_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resolve the reference, bring what is missing into the store, and say what is there now."""
    # Here, because the HTTP client is most of what `flatmount image` would import, and only this verb needs it.
    from flatmount.image.registry import open_registry

    reference = Reference.parse(args.reference)
    platform = None if args.platform is None else Platform.parse(args.platform)
    config = reachable(load(), reference, args)
    started = time.monotonic()
    # Opened first: a store that cannot be used is told before anything is fetched.
    with open_store(args, create=True) as store:
        source = open_registry(reference, config, platform=platform)
        try:
            form = usable_form(args, store)
            with _bars(source) as progress:
                image = store.import_from(source, name=args.name or source.name, progress=progress)
            flatten_when(args.flatten, store, image, form)
            facts = _facts(image, reference, source, time.monotonic() - started)
        finally:
            source.close()
    if args.json:
        print_json("image-pull", facts)
    else:
        kept = f", {size(facts['kept_bytes'])} were there from a broken pull" if facts["kept_bytes"] else ""
        print(
            f"{image.name or image.digest}: {facts['fetched_layers']} of {facts['layers']} layers fetched, "
            f"{size(facts['fetched_bytes'])}{kept}, {facts['seconds']:.1f} s, {image.digest}"
        )
    return EXIT_FINE


def reachable(config: Config, reference: Reference, args: argparse.Namespace) -> Config:
    """The configuration, and what `--plain-http` says about the host of `reference`."""
    if not args.plain_http:
        return config
    host = dataclasses.replace(config.registry(reference.host), plain_http=True)
    return dataclasses.replace(config, registries={**config.registries, reference.host: host})


def _facts(image: StoredImage, reference: Reference, source: RegistryImage, seconds: float) -> dict[str, Any]:
    fetched = source.fetched()
    return {
        "reference": str(reference),
        "name": image.name,
        "digest": image.digest,
        "chain_id": image.chain_id,
        "layers": len(image.layers),
        "fetched_layers": len(fetched),
        "fetched_bytes": sum(layer.done_bytes - layer.kept_bytes for layer in fetched),
        "kept_bytes": sum(layer.kept_bytes for layer in fetched),
        "dropped_xattrs": image.dropped_xattrs,
        "seconds": round(seconds, 3),
    }


@contextmanager
def _bars(source: RegistryImage) -> Iterator[Any]:
    """Bars on a terminal, drawn by a thread of their own; nothing elsewhere. Yields what the store reports to."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = Bars(source)
    thread = threading.Thread(target=bars.run, name="flatmount-bars", daemon=True)
    thread.start()
    try:
        yield bars.unpacking
    finally:
        bars.stop.set()
        thread.join()


class Bars:
    """A bar for each layer that is being fetched, and a line for the whole."""

    def __init__(self, source: RegistryImage) -> None:
        self.stop = threading.Event()
        self._source = source
        self._at: Progressed | None = None
        self._lines = 0

    def unpacking(self, at: Progressed) -> None:
        """What the store reports while it unpacks."""
        self._at = at

    def run(self) -> None:
        """Draw until `stop` is set, then take the lines away."""
        while not self.stop.wait(_REFRESH_S):
            self._show(self.lines(shutil.get_terminal_size().columns))
        self._show([])

    def lines(self, columns: int) -> list[str]:
        """What is to be seen now, no line longer than the terminal is wide."""
        layers = self._source.fetched()
        active = [layer for layer in layers if layer.active]
        lines = [
            f"{layer.digest.partition(':')[2][:12]}  {bar(layer.done_bytes, layer.total_bytes)}"
            for layer in active[:_SHOWN]
        ]
        done, total = sum(layer.done_bytes for layer in layers), sum(layer.total_bytes for layer in layers)
        unpacking = f", unpacking layer {self._at.layer} of {self._at.layers}" if self._at else ""
        lines.append(f"{'fetched':<12}  {bar(done, total)}{unpacking}")
        return [line[: max(1, columns - 1)] for line in lines]

    def _show(self, lines: list[str]) -> None:
        up = f"\x1b[{self._lines}A" if self._lines else ""
        sys.stderr.write(f"\r{up}\x1b[J" + "".join(f"{line}\n" for line in lines))
        sys.stderr.flush()
        self._lines = len(lines)


def bar(done: int, total: int) -> str:
    """How much of `total` bytes is there."""
    full = _BAR if done >= total else _BAR * done // total
    return f"[{'#' * full}{'.' * (_BAR - full)}] {size(done):>10} of {size(total)}"
