"""From what lies on disk to one image: manifest and config, verified, and the layers' bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from flatmount.errors import BadImage
from flatmount.image import digest as digests
from flatmount.image import model
from flatmount.image.archive import DockerArchive
from flatmount.image.files import Files, open_files, read_document

NESTING = 4  # indexes within indexes
_ARM = ("v8", "v7", "v6", "v5")  # each runs what those behind it are for
_UNSAID = {"arm64": "v8", "arm": "v7", "amd64": "v1"}  # the variant that an architecture without one means


class ImageSource(Protocol):
    """One image somewhere: a layout, an archive, a registry. Closed by whoever opened it."""

    @property
    def name(self) -> str | None:
        """What the place calls it."""

    @property
    def manifest(self) -> model.Manifest:
        """Its manifest, verified."""

    @property
    def config(self) -> model.ImageConfig:
        """Its config, verified, with as many diff_ids as the manifest has layers."""

    @property
    def config_raw(self) -> bytes:
        """The bytes of the config."""

    @property
    def origin(self) -> str | None:
        """The registry's reference under which it can be had again; None where it comes from no registry."""

    def expect(self, positions: Sequence[int], directory: str) -> None:
        """These layers will be opened, mostly in this order: a place that is far away begins to fetch them.

        What comes is kept in files of `directory`, also behind a failure or a kill, so that another attempt goes on
        where this one broke; `forget` ends that.
        """

    def forget(self, position: int) -> bool:
        """What was kept of this layer is not for another attempt: it is in the store, bad, or in the way.

        True when what was read began with bytes that an earlier attempt had kept: opened again, it may be another.
        """

    def open_layer(self, position: int) -> BinaryIO:
        """The bytes of layer `position` (0 is the lowest) as they are stored, not yet verified."""

    def give_up(self) -> None:
        """Whoever reads a layer need not wait any more: what has not come yet never will. Any thread may say so."""

    def close(self) -> None:
        """Give back what is open."""


@dataclass(frozen=True, slots=True)
class LayoutImage:
    """One image of an OCI image layout."""

    name: str | None
    manifest: model.Manifest
    config: model.ImageConfig
    config_raw: bytes
    files: Files

    @property
    def origin(self) -> str | None:
        """See ImageSource.origin."""
        return None

    def expect(self, positions: Sequence[int], directory: str) -> None:
        """See ImageSource.expect. Nothing has to be fetched."""

    def forget(self, position: int) -> bool:
        """See ImageSource.forget. Nothing was kept."""
        return False

    def open_layer(self, position: int) -> BinaryIO:
        """See ImageSource.open_layer. Raises: BadImage, when the blob is missing or of another size."""
        layer = self.manifest.layers[position]
        _require_blob(self.files, layer)
        file = self.files.open(digests.path(layer.digest))
        if file is None:
            raise _missing(self.files, layer.digest)
        return file

    def give_up(self) -> None:
        """See ImageSource.give_up. Nothing is waited for."""

    def close(self) -> None:
        """See ImageSource.close."""
        self.files.close()


def open_source(source: str, platform: model.Platform | None = None) -> ImageSource:
    """Open the image at `source`: PATH, or PATH:NAME where the place holds several.

    An OCI image layout (a directory or a tar archive) or a docker-archive (`docker save`). Of an image for
    several platforms the one for `platform` is taken, by default this host's. Manifest and config are read
    and verified.

    Raises: BadImage, FlatmountError.
    """
    path, name = _split(source)
    files = open_files(path)
    try:
        if files.size("index.json") is not None:
            return _layout(files, name, platform or model.host())
        if files.size("manifest.json") is not None:
            return DockerArchive.read(files, name)
        raise BadImage(
            f"{path} is not an image: it has neither index.json nor manifest.json",
            hint="give an OCI image layout or what `docker save` wrote",
        )
    except BaseException:
        files.close()
        raise


def image_names(path: str) -> tuple[str, ...]:
    """What the images of the OCI image layout at `path` are called there; a digest for one without a name.

    Raises: BadImage, FlatmountError.
    """
    files = open_files(path)
    try:
        raw = read_document(files, "index.json", model.DOCUMENT_BYTES)
        if raw is None:
            raise BadImage(f"{path} is not an OCI image layout: it has no index.json", hint="name another path")
        top = model.index(raw, f"{path}: index.json")
        images = [d for d in top.manifests if d.media_type in model.MANIFESTS | model.INDEXES]
        return tuple(dict.fromkeys(d.ref_name or d.digest for d in images))
    finally:
        files.close()


def _split(source: str) -> tuple[str, str | None]:
    """PATH and NAME: at the first colon after something that exists, because names have colons as well."""
    if os.path.lexists(source):
        return source, None
    for at, character in enumerate(source):
        if character == ":" and os.path.lexists(source[:at]):
            return source[:at], source[at + 1 :]
    path, colon, name = source.rpartition(":")
    return (path, name) if colon else (source, None)


def check_layers(manifest: model.Manifest, config: model.ImageConfig, where: str) -> None:
    """Manifest and config must speak of the same layers. Raises: BadImage."""
    if len(manifest.layers) != len(config.diff_ids):
        raise BadImage(
            f"{where}: {len(manifest.layers)} layers, and {len(config.diff_ids)} diff_ids in the config",
            hint="the image is malformed",
        )
    if not manifest.layers:
        raise BadImage(f"{where} has no layers", hint="there is no root file system in it")


def select(candidates: tuple[model.Descriptor, ...], platform: model.Platform, where: str) -> model.Descriptor:
    """The manifest for `platform` of an index. Raises: BadImage, with what there is instead."""
    images = [d for d in candidates if d.platform.os != "unknown" and d.media_type in model.MANIFESTS | model.INDEXES]
    if len(images) == 1 and not images[0].platform.os:
        return images[0]
    fitting = [d for d in images if (d.platform.os, d.platform.architecture) == (platform.os, platform.architecture)]
    for variant in _runnable(platform):
        exact = [d for d in fitting if variant in (d.platform.variant, None)]
        if exact:
            return exact[0]
    there = ", ".join(sorted({str(d.platform) for d in images})) or "nothing"
    raise BadImage(f"{where} has no image for {platform}", hint=f"it has {there}")


def _runnable(platform: model.Platform) -> tuple[str | None, ...]:
    """The variants that run on `platform`, the best first; None is whatever there is."""
    if platform.architecture == "arm" and platform.variant in _ARM:
        return (*_ARM[_ARM.index(platform.variant) :], "")
    if platform.variant in ("", _UNSAID.get(platform.architecture)):
        return (platform.variant, _UNSAID.get(platform.architecture, ""), "", None)
    return (platform.variant, "")


def _layout(files: Files, name: str | None, platform: model.Platform) -> LayoutImage:
    marker = read_document(files, "oci-layout", 1 << 16)
    if marker is None:
        raise BadImage(f"{files.where} has an index.json but no oci-layout file", hint="it is not an OCI image layout")
    version = model.document(marker, f"{files.where}: oci-layout").get("imageLayoutVersion")
    if not isinstance(version, str) or version.split(".")[0] != "1":
        raise BadImage(f"{files.where}: image layout version {version!r}", hint="version 1 can be read")
    top = model.index(read_document(files, "index.json", model.DOCUMENT_BYTES) or b"", f"{files.where}: index.json")
    chosen = _named(files, top, name, platform)
    ref_name = chosen.ref_name
    seen: set[str] = set()
    while chosen.media_type in model.INDEXES:
        if chosen.digest in seen or len(seen) == NESTING:
            raise BadImage(f"{files.where}: index {chosen.digest} leads to itself", hint="the image is malformed")
        seen.add(chosen.digest)
        inner = model.index(_blob(files, chosen), f"{files.where}: index {chosen.digest}")
        chosen = select(inner.manifests, platform, f"{files.where}: index {chosen.digest}")
    if chosen.media_type not in model.MANIFESTS:
        raise BadImage(f"{files.where}: manifest of type {chosen.media_type!r}", hint="this is no image")
    where = f"{files.where}: manifest {chosen.digest}"
    manifest = model.manifest(_blob(files, chosen), where)
    config_raw = _blob(files, manifest.config)
    config = model.image_config(config_raw, f"{files.where}: config {manifest.config.digest}")
    check_layers(manifest, config, where)
    check_platform(config, platform, where)
    for layer in manifest.layers:
        _require_blob(files, layer)
    return LayoutImage(ref_name, manifest, config, config_raw, files)


def _named(files: Files, top: model.Index, name: str | None, platform: model.Platform) -> model.Descriptor:
    """What index.json means: one image, several by name, or one for several platforms."""
    images = tuple(d for d in top.manifests if d.media_type in model.MANIFESTS | model.INDEXES)
    names = sorted({d.ref_name for d in images if d.ref_name})
    if name is not None:
        images = tuple(d for d in images if name in (d.ref_name, d.digest))
        if not images:
            raise BadImage(f"{files.where} has no image {name!r}", hint=f"it has {', '.join(names) or 'no names'}")
    elif len({d.ref_name for d in images}) > 1:
        raise BadImage(
            f"{files.where} holds several images",
            hint=f"say which, as {files.where}:NAME: {', '.join(names)}",
        )
    if not images:
        raise BadImage(f"{files.where}: index.json lists no image", hint="there is nothing to import")
    return images[0] if len(images) == 1 else select(images, platform, files.where)


def check_platform(config: model.ImageConfig, platform: model.Platform, where: str) -> None:
    """The config must be for `platform`, or not say. Raises: BadImage."""
    wanted = (platform.os, platform.architecture)
    if (config.os or platform.os, config.architecture or platform.architecture) != wanted:
        raise BadImage(
            f"{where} is for {model.Platform(config.os, config.architecture, config.variant)}, not for {platform}",
            hint=f"name an image that there is for {platform}",
        )


def _blob(files: Files, descriptor: model.Descriptor) -> bytes:
    """A small blob, verified."""
    if descriptor.size > model.DOCUMENT_BYTES:
        raise BadImage(
            f"{files.where}: blob {descriptor.digest} of {descriptor.size} bytes", hint="that is no document"
        )
    data = read_document(files, digests.path(descriptor.digest), model.DOCUMENT_BYTES)
    if data is None:
        raise _missing(files, descriptor.digest)
    if len(data) != descriptor.size:
        raise _wrong_size(files, descriptor, len(data))
    found = digests.of(data, digests.algorithm(descriptor.digest))
    if found != descriptor.digest:
        raise BadImage(
            f"{files.where}: blob {descriptor.digest} has another digest, {found}",
            hint="it is damaged or tampered with; fetch or copy the image again",
        )
    return data


def _require_blob(files: Files, descriptor: model.Descriptor) -> None:
    size = files.size(digests.path(descriptor.digest))
    if size is None:
        raise _missing(files, descriptor.digest)
    if size != descriptor.size:
        raise _wrong_size(files, descriptor, size)


def _missing(files: Files, digest: str) -> BadImage:
    return BadImage(f"{files.where}: blob {digest} is missing", hint="the image is incomplete; fetch or copy it again")


def _wrong_size(files: Files, descriptor: model.Descriptor, size: int) -> BadImage:
    return BadImage(
        f"{files.where}: blob {descriptor.digest} has {size} bytes instead of {descriptor.size}",
        hint="it is truncated or tampered with; fetch or copy the image again",
    )
