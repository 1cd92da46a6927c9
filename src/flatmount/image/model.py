"""What an image says about itself: OCI and docker schema 2 documents as frozen, checked values."""

from __future__ import annotations

import json
import platform as host_platform
import re
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass
from typing import Any, Self

from flatmount.errors import BadImage, UsageError
from flatmount.image import digest as digests

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
LAYERS = frozenset(
    {
        OCI_LAYER,
        f"{OCI_LAYER}+gzip",
        f"{OCI_LAYER}+zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    }
)

REF_NAME = "org.opencontainers.image.ref.name"
DOCUMENT_BYTES = 4 << 20  # the limit that registries and engines put on a manifest
MAX_LAYERS = 10_000
_PLATFORM_PART = re.compile(r"[a-z0-9][a-z0-9_.]{0,63}")


@dataclass(frozen=True, slots=True)
class Platform:
    """What a manifest of an index runs on. Empty parts are not said."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read OS/ARCH[/VARIANT], in Go's words. Raises: UsageError."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(_PLATFORM_PART.fullmatch(part) for part in parts):
            raise UsageError(f"{text[:80]!r} is not a platform", hint="write OS/ARCH[/VARIANT], such as linux/arm64/v8")
        return cls(*parts)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part) or "unknown"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by digest, with its size in bytes and what it claims to be."""

    media_type: str
    digest: str
    size: int
    platform: Platform = Platform()
    ref_name: str | None = None
    annotations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """Several manifests: images by name, or one image by platform."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its config and its layers, bottom to top. `raw` are the bytes that its digest is of."""

    digest: str
    raw: bytes
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How a container of the image starts.

    `user` is as written: a name, an id, or both parts with a colon.
    """

    architecture: str
    os: str
    variant: str
    user: str
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    workdir: str
    stop_signal: str
    labels: tuple[tuple[str, str], ...]
    diff_ids: tuple[str, ...]
    created: str


def host() -> Platform:
    """This host as an image platform, in Go's words for architectures."""
    machine = host_platform.machine()
    names = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm", "loongarch64": "loong64"}
    variants = {"aarch64": "v8", "armv7l": "v7"}
    return Platform("linux", names.get(machine, machine), variants.get(machine, ""))


def document(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`. Raises: BadImage."""
    if len(raw) > DOCUMENT_BYTES:
        raise BadImage(f"{where}: {len(raw)} bytes of JSON", hint=f"documents end at {DOCUMENT_BYTES} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"{where} is not JSON: {error}", hint="the image is damaged or is not one") from error
    if not isinstance(value, dict):
        raise BadImage(f"{where} is not a JSON object", hint="the image is damaged or is not one")
    return value


def index(raw: bytes, where: str) -> Index:
    """Read an image index or a manifest list. Raises: BadImage."""
    value = document(raw, where)
    return Index(tuple(descriptor(item, where) for item in _list(value, "manifests", where)))


def manifest(raw: bytes, where: str) -> Manifest:
    """Read an image manifest. Raises: BadImage, also for artifacts that are no images."""
    value = document(raw, where)
    if value.get("schemaVersion") != 2:
        raise BadImage(f"{where}: schema version {value.get('schemaVersion')!r}", hint="only version 2 is an image")
    if "manifests" in value:
        # CVE-2021-41190: a document that is manifest and index at once means two things to two readers.
        raise BadImage(f"{where} is an index and a manifest at once", hint="the image is malformed")
    config = descriptor(value.get("config"), f"{where}: config")
    if config.media_type not in CONFIGS:
        raise BadImage(f"{where}: config of type {config.media_type!r}", hint="this is an artifact, not an image")
    layers = tuple(descriptor(item, f"{where}: layer") for item in _list(value, "layers", where))
    if len(layers) > MAX_LAYERS:
        raise BadImage(f"{where}: {len(layers)} layers", hint=f"at most {MAX_LAYERS} are read")
    for layer in layers:
        if layer.media_type not in LAYERS:
            raise BadImage(
                f"{where}: layer {layer.digest} of type {layer.media_type!r}",
                hint="only tar layers can be read: plain, gzip or zstd, not encrypted",
            )
    return Manifest(digests.of(raw), raw, config, layers)


def descriptor(value: object, where: str) -> Descriptor:
    """Read a content descriptor. Raises: BadImage."""
    if not isinstance(value, dict):
        raise BadImage(f"{where} has no descriptor", hint="the image is malformed")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise BadImage(f"{where}: a descriptor of size {str(size)[:40]}", hint="the image is malformed")
    annotations = _strings(value.get("annotations"), where)
    return Descriptor(
        media_type=_text(value, "mediaType", where),
        digest=digests.checked(value.get("digest"), where),
        size=size,
        platform=_platform(value.get("platform"), where),
        ref_name=dict(annotations).get(REF_NAME),
        annotations=annotations,
    )


def image_config(raw: bytes, where: str) -> ImageConfig:
    """Read an image configuration. Raises: BadImage."""
    value = document(raw, where)
    rootfs = value.get("rootfs")
    if not isinstance(rootfs, dict) or rootfs.get("type") != "layers":
        raise BadImage(f"{where} has no rootfs of layers", hint="the image is malformed")
    start = value.get("config")
    if start is None:
        start = {}
    if not isinstance(start, dict):
        raise BadImage(f"{where}: config is not an object", hint="the image is malformed")
    return ImageConfig(
        architecture=_text(value, "architecture", where),
        os=_text(value, "os", where),
        variant=_text(value, "variant", where),
        user=_text(start, "User", where),
        env=_texts(start, "Env", where),
        entrypoint=_texts(start, "Entrypoint", where),
        cmd=_texts(start, "Cmd", where),
        workdir=_text(start, "WorkingDir", where),
        stop_signal=_text(start, "StopSignal", where),
        labels=_strings(start.get("Labels"), where),
        diff_ids=tuple(digests.checked(item, f"{where}: diff_ids") for item in _list(rootfs, "diff_ids", where)),
        created=_text(value, "created", where),
    )


def _platform(value: object, where: str) -> Platform:
    if value is None:
        return Platform()
    if not isinstance(value, dict):
        raise BadImage(f"{where}: platform is not an object", hint="the image is malformed")
    return Platform(*(_text(value, key, where) for key in ("os", "architecture", "variant")))


def _list(value: AnyMapping[str, Any], key: str, where: str) -> list[Any]:
    items = value.get(key)
    if items is None:
        return []
    if not isinstance(items, list):
        raise BadImage(f"{where}: {key} is not a list", hint="the image is malformed")
    return items


def _text(value: AnyMapping[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadImage(f"{where}: {key} is not a string", hint="the image is malformed")
    return text


def _texts(value: AnyMapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    items = _list(value, key, where)
    if not all(isinstance(item, str) for item in items):
        raise BadImage(f"{where}: {key} is not a list of strings", hint="the image is malformed")
    return tuple(items)


def _strings(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadImage(f"{where}: labels or annotations are not strings", hint="the image is malformed")
    return tuple(value.items())
