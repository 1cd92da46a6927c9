"""The demo image: real software in as many layers as one likes, for machines without a registry."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from flatmount.errors import MissingFeature, UsageError
from flatmount.image import demo_busybox, demo_layers, demo_packages
from flatmount.image.demo_packages import Package, PackagesUnavailable, Progress
from flatmount.image.layer_tar import follow_links, join_archives, read_members, top_level_links
from flatmount.image.layout_writer import WrittenLayer, new_layout
from flatmount.image.model import Platform, host

MIN_LAYERS = 5
MAX_LAYERS = 1000
_MADE_BY = "flatmount image demo"
_CREATED = "2024-01-01T00:00:00Z"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PIECE_BYTES = 1 << 20
_ON_TOP = 4  # setup, trim, replace, restore
_EARLY_TRIM_FROM = 8  # with fewer layers they are better spent on packages

# What the packages' scripts would copy, as (package, template, destination).
_TEMPLATES = (
    ("base-passwd", "usr/share/base-passwd/passwd.master", "etc/passwd"),
    ("base-passwd", "usr/share/base-passwd/group.master", "etc/group"),
    ("base-files", "usr/share/base-files/motd", "etc/motd"),
    ("base-files", "usr/share/base-files/profile", "etc/profile"),
    ("base-files", "usr/share/base-files/dot.profile", "root/.profile"),
    ("base-files", "usr/share/base-files/dot.bashrc", "root/.bashrc"),
    ("libc-bin", "usr/share/libc-bin/nsswitch.conf", "etc/nsswitch.conf"),
)
# The links of update-alternatives, as (package, link, target).
_ALTERNATIVES = (("mawk", "usr/bin/awk", "mawk"), ("less", "usr/bin/pager", "less"))

# dpkg's names of architectures that are not also Go's, as (architecture, variant).
_GO_NAMES = {"arm64": ("arm64", "v8"), "armhf": ("arm", "v7"), "i386": ("386", ""), "ppc64el": ("ppc64le", "")}


class Source(StrEnum):
    """What the software of a demo image comes from."""

    DEBIAN = "debian"
    BUSYBOX = "busybox"


@dataclass(frozen=True, slots=True)
class DemoImage:
    """A demo image that was written: an OCI image layout at `path` with one image in it."""

    path: str
    source: Source
    why_not_packages: str  # "" with source DEBIAN
    packages: tuple[str, ...]  # "name version", lowest first
    layers: int
    generated_layers: int  # of them
    size_bytes: int  # of all blobs
    manifest_digest: str


@dataclass(frozen=True, slots=True)
class _Layer:
    title: str
    archive: Callable[[], bytes]
    generated: bool = True


@dataclass(frozen=True, slots=True)
class _Software:
    """What the stack is made of: `base` lowest first, and what the layers above it have to know."""

    source: Source
    why_not_packages: str
    names: tuple[str, ...]
    base: tuple[_Layer, ...]
    setup: demo_layers.Setup
    platform: Platform


def build_demo(out: str, *, layers: int, cache: str, progress: Progress | None = None, name: str = "demo") -> DemoImage:
    """Write the demo image of `layers` layers as an OCI image layout at `out`, there whole or not at all.

    Debian packages become a layer each (several of them where there are more than layers; small generated layers
    fill up where there are fewer); the topmost layers, and one in the middle, remove and replace what lower ones
    brought (see `demo_layers`, which also says what the merged tree holds). Where packages cannot be had, this
    machine's static busybox takes their place. The same packages give the same digests.

    Arguments: `out`, replaced only where it is an empty directory or an earlier demo image; `cache`, a directory
    for fetched packages, made where it is missing; `progress`, called from this and from worker threads.
    Raises: UsageError for a number of layers out of range and for what is at `out`; MissingFeature where there is
    neither apt nor busybox; OSError from writing.
    """
    if not MIN_LAYERS <= layers <= MAX_LAYERS:
        raise UsageError(f"a demo image of {layers} layers", hint=f"from {MIN_LAYERS} to {MAX_LAYERS} can be made")
    tell = progress or (lambda what, done, total: None)
    with new_layout(out, made_by=_MADE_BY) as layout:
        software = _software(layers, cache, tell)
        stack = _stack(software, layers)
        written = _write(stack, layout.add_layer, tell)
        config = _config(software.platform, [layer.title for layer in stack])
        manifest = layout.add_image(config, written, name=name)
        size_bytes = layout.size_bytes()
    return DemoImage(
        path=os.path.abspath(out),
        source=software.source,
        why_not_packages=software.why_not_packages,
        packages=software.names,
        layers=len(stack),
        generated_layers=sum(layer.generated for layer in stack),
        size_bytes=size_bytes,
        manifest_digest=manifest.digest,
    )


def default_cache() -> str:
    """Where fetched packages are kept: flatmount/demo beneath $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "flatmount", "demo")


def spread(count: int, slots: int) -> list[range]:
    """Divide `count` things in order over at most `slots` slots as evenly as it goes, none of them empty."""
    slots = min(count, slots)
    return [range(count * slot // slots, count * (slot + 1) // slots) for slot in range(slots)]


def _software(layers: int, cache: str, progress: Progress) -> _Software:
    try:
        return _debian(demo_packages.fetch_packages(demo_packages.goals(layers), cache, progress), layers, cache)
    except PackagesUnavailable as error:
        return _busybox(str(error), layers)


def _debian(packages: Sequence[Package], layers: int, cache: str) -> _Software:
    sources = {package for package, _, _ in _TEMPLATES}
    archives = {p.name: demo_packages.read_archive(cache, p) for p in packages if p.name in sources}
    links = top_level_links(archives["base-files"])

    def archive_of(group: Sequence[Package]) -> Callable[[], bytes]:
        def read() -> bytes:
            parts = [follow_links(demo_packages.read_archive(cache, package), links) for package in group]
            return parts[0] if len(parts) == 1 else join_archives(parts)

        return read

    architecture = demo_packages.architecture()
    early = layers >= _EARLY_TRIM_FROM
    groups = [packages[part.start : part.stop] for part in spread(len(packages), layers - _ON_TOP - early)]
    base = [_Layer(", ".join(f"{p.name} {p.version}" for p in group), archive_of(group), False) for group in groups]
    if early:
        base.insert(len(base) // 2, _Layer("early trim", demo_layers.early_trim))
    return _Software(
        Source.DEBIAN,
        "",
        tuple(f"{package.name} {package.version}" for package in packages),
        tuple(base),
        _setup_of(archives, {package.name for package in packages}),
        Platform("linux", *_GO_NAMES.get(architecture, (architecture, ""))),
    )


def _setup_of(archives: dict[str, bytes], names: set[str]) -> demo_layers.Setup:
    templates = [template for _, template, _ in _TEMPLATES]
    contents = {name: read_members(archive, templates) for name, archive in archives.items()}
    found = {
        destination: contents[package][template]
        for package, template, destination in _TEMPLATES
        if template in contents.get(package, {})
    }
    if not {"etc/passwd", "etc/group"} <= found.keys():
        raise PackagesUnavailable("the package base-passwd has no user database")
    return demo_layers.Setup(
        passwd=found.pop("etc/passwd").decode(),
        group=found.pop("etc/group").decode(),
        files=tuple(found.items()),
        links=tuple((link, target) for package, link, target in _ALTERNATIVES if package in names),
    )


def _busybox(why_not_packages: str, layers: int) -> _Software:
    try:
        busybox = demo_busybox.find_busybox()
    except MissingFeature as error:
        raise MissingFeature(f"cannot make a demo image: {why_not_packages}, and {error}", hint=error.hint) from error
    alone = layers == MIN_LAYERS
    base = [_Layer(busybox.version, partial(demo_busybox.program_layer, busybox, applets=alone), False)]
    if not alone:
        base.append(_Layer("busybox applets", partial(demo_busybox.applets_layer, busybox), False))
    return _Software(
        Source.BUSYBOX,
        why_not_packages,
        (busybox.version,),
        tuple(base),
        demo_layers.Setup(),
        host(),
    )


def _stack(software: _Software, layers: int) -> list[_Layer]:
    packages = software.source is Source.DEBIAN
    fillers = layers - len(software.base) - _ON_TOP
    return [
        *software.base,
        _Layer("setup", partial(demo_layers.setup, software.setup)),
        *(_Layer(f"filler {number}", partial(demo_layers.filler, number)) for number in range(1, fillers + 1)),
        _Layer("trim", partial(demo_layers.trim, packages=packages)),
        _Layer("replace", demo_layers.replace),
        _Layer("restore", demo_layers.restore),
    ]


def _write(
    stack: Sequence[_Layer], add_layer: Callable[[Sequence[memoryview]], WrittenLayer], progress: Progress
) -> list[WrittenLayer]:
    def write(layer: _Layer) -> WrittenLayer:
        archive = memoryview(layer.archive())
        return add_layer([archive[start : start + _PIECE_BYTES] for start in range(0, len(archive), _PIECE_BYTES)])

    written = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for layer in pool.map(write, stack):
            written.append(layer)
            progress("layers written", len(written), len(stack))
    return written


def _config(platform: Platform, titles: Sequence[str]) -> dict[str, Any]:
    return {
        "architecture": platform.architecture,
        **({"variant": platform.variant} if platform.variant else {}),
        "os": platform.os,
        "created": _CREATED,
        "config": {"Env": [_PATH, "LANG=C.UTF-8"], "Cmd": ["/bin/sh"], "WorkingDir": "/"},
        "history": [{"created": _CREATED, "created_by": f"{_MADE_BY}: {title}"} for title in titles],
    }
