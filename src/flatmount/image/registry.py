"""An image in a registry, as a source like any other: manifest and config verified, layers fetched side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from flatmount.config import Config
from flatmount.errors import BadImage, UnknownImage
from flatmount.image import digest as digests
from flatmount.image import model
from flatmount.image.registry_auth import Keychain
from flatmount.image.registry_client import Answer, Client, Refused
from flatmount.image.registry_fetch import Fetched, Fetcher
from flatmount.image.registry_http import Patience, Transport
from flatmount.image.registry_reference import Reference
from flatmount.image.source import NESTING, check_layers, check_platform, select

_ACCEPT: Final = ", ".join(sorted(model.INDEXES | model.MANIFESTS))
_ANY: Final = "*/*"
_TAGS_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class RegistryImage:
    """One image of a registry. Nothing of its layers is fetched before somebody wants them."""

    name: str | None
    origin: str | None
    manifest: model.Manifest
    config: model.ImageConfig
    config_raw: bytes
    transport: Transport
    fetcher: Fetcher

    def expect(self, positions: Sequence[int], directory: str) -> None:
        """See ImageSource.expect."""
        self.fetcher.begin(positions, directory)

    def forget(self, position: int) -> bool:
        """See ImageSource.forget."""
        return self.fetcher.forget(position)

    def open_layer(self, position: int) -> BinaryIO:
        """See ImageSource.open_layer. Its `read` raises RegistryError when the layer cannot be had."""
        return self.fetcher.open(position)

    def fetched(self) -> tuple[Fetched, ...]:
        """How far the layers are that somebody wants; any thread may ask."""
        return self.fetcher.states()

    def give_up(self) -> None:
        """See ImageSource.give_up."""
        self.transport.cancel()
        self.fetcher.give_up()

    def close(self) -> None:
        """See ImageSource.close. What is being fetched is given up."""
        self.give_up()
        self.fetcher.close()
        self.transport.close()


def open_registry(
    reference: Reference,
    config: Config,
    *,
    platform: model.Platform | None = None,
    keychain: Keychain | None = None,
    patience: Patience | None = None,
) -> RegistryImage:
    """Find the image that `reference` names, which asks its registry or a mirror of it.

    A tag is resolved once; from there on everything is asked for by digest and verified, so that the image is
    one image even when the tag moves meanwhile. Of an image for several platforms the one for `platform` is
    taken, by default this host's. The caller closes it.

    Raises: UnknownImage, RegistryError, BadImage, FlatmountError.

    See: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
    """
    platform = platform or model.host()
    transport = Transport(config, patience or Patience())
    try:
        client = Client(reference, config, keychain or Keychain(), transport)
        manifest = _manifest(client, platform)
        where = f"{reference.name}: manifest {manifest.digest}"
        config_raw = _config(client, manifest.config)
        parsed = model.image_config(config_raw, f"{reference.name}: config {manifest.config.digest}")
        check_layers(manifest, parsed, where)
        check_platform(parsed, platform, where)
    except BaseException:
        transport.close()
        raise
    fetcher = Fetcher(client, manifest.layers, config.pull.parallel_layers)
    return RegistryImage(str(reference), str(reference), manifest, parsed, config_raw, transport, fetcher)


def stored_image(
    reference: Reference,
    config: Config,
    manifest_raw: bytes,
    config_raw: bytes,
    *,
    keychain: Keychain | None = None,
    patience: Patience | None = None,
) -> RegistryImage:
    """An image whose documents are known, with the repository of `reference` as the place of its layers.

    Nothing is asked for before a layer is wanted, and that layer alone then, by its digest: tags may have moved
    meanwhile and the manifest may be gone. The caller closes it.

    Raises: BadImage, where the documents are no image's.
    """
    manifest = model.manifest(manifest_raw, f"{reference.name}: manifest")
    parsed = model.image_config(config_raw, f"{reference.name}: config {manifest.config.digest}")
    check_layers(manifest, parsed, f"{reference.name}: manifest {manifest.digest}")
    transport = Transport(config, patience or Patience())
    client = Client(reference, config, keychain or Keychain(), transport)
    fetcher = Fetcher(client, manifest.layers, config.pull.parallel_layers)
    return RegistryImage(str(reference), str(reference), manifest, parsed, config_raw, transport, fetcher)


def _manifest(client: Client, platform: model.Platform) -> model.Manifest:
    """The manifest for `platform`, through as many indexes as there are on the way."""
    reference = client.reference
    answer = _resolve(client)
    digest = reference.digest or _said_digest(answer, reference) or digests.of(answer.raw)
    promised: model.Descriptor | None = None
    seen: set[str] = set()
    while True:
        where = f"{reference.name}: {digest}"
        _verify(answer.raw, digest, where)
        kind = _kind(answer, promised, where)
        if kind in model.MANIFESTS:
            return model.manifest(answer.raw, where)
        if digest in seen or len(seen) == NESTING:
            raise BadImage(f"{where}: the index leads to itself", hint="the image is malformed")
        seen.add(digest)
        promised = select(model.index(answer.raw, where).manifests, platform, where)
        digest = promised.digest
        answer = client.document(f"manifests/{digest}", _ACCEPT, model.DOCUMENT_BYTES)
        _check_size(answer.raw, promised, reference)


def _resolve(client: Client) -> Answer:
    reference = client.reference
    wanted = reference.digest or reference.tag
    try:
        return client.document(f"manifests/{wanted}", _ACCEPT, model.DOCUMENT_BYTES)
    except Refused as error:
        if error.status != 404:
            raise
        if error.code == "NAME_UNKNOWN":
            raise UnknownImage(
                f"{reference.host} has no image {reference.repository}", hint="look at the name"
            ) from error
        there = client.tags(_TAGS_SHOWN + 1)
        more = ", ..." if len(there) > _TAGS_SHOWN else ""
        hint = f"it has {', '.join(there[:_TAGS_SHOWN])}{more}" if there else "look at the name"
        raise UnknownImage(f"{reference.name} has no {wanted}", hint=hint) from error


def _said_digest(answer: Answer, reference: Reference) -> str | None:
    if answer.digest is None:
        return None
    return digests.checked(answer.digest, f"{reference.name}: Docker-Content-Digest")


def _verify(raw: bytes, digest: str, where: str) -> None:
    found = digests.of(raw, digests.algorithm(digest))
    if found != digest:
        raise BadImage(
            f"{where}: the registry sent something else, {found}",
            hint="it is damaged or tampered with; nothing was stored",
        )


def _kind(answer: Answer, promised: model.Descriptor | None, where: str) -> str:
    """What the document is. CVE-2021-41190: header, document and descriptor must not speak of different things."""
    value = model.document(answer.raw, where)
    own = value.get("mediaType")
    if isinstance(own, str) and own:
        kind = own
    elif answer.content_type in model.INDEXES | model.MANIFESTS:
        kind = answer.content_type
    else:
        kind = model.OCI_INDEX if "manifests" in value else model.OCI_MANIFEST
    if value.get("schemaVersion") == 1:
        raise BadImage(f"{where} is of schema version 1", hint="push the image again with a tool of this decade")
    if kind not in model.INDEXES | model.MANIFESTS:
        raise BadImage(f"{where}: manifest of type {kind!r}", hint="this is no image")
    indexes = kind in model.INDEXES
    others = [answer.content_type] + ([promised.media_type] if promised else [])
    known = [other for other in others if other in model.INDEXES | model.MANIFESTS]
    if any((other in model.INDEXES) != indexes for other in known) or (indexes and ("layers" in value)):
        raise BadImage(f"{where} is an index and a manifest at once", hint="the image is malformed")
    return kind


def _config(client: Client, wanted: model.Descriptor) -> bytes:
    where = f"{client.reference.name}: config {wanted.digest}"
    if wanted.size > model.DOCUMENT_BYTES:
        raise BadImage(f"{where} of {wanted.size} bytes", hint="that is no document")
    answer = client.document(f"blobs/{wanted.digest}", _ANY, model.DOCUMENT_BYTES)
    _check_size(answer.raw, wanted, client.reference)
    _verify(answer.raw, wanted.digest, where)
    return answer.raw


def _check_size(raw: bytes, wanted: model.Descriptor, reference: Reference) -> None:
    if len(raw) != wanted.size:
        raise BadImage(
            f"{reference.name}: {wanted.digest} has {len(raw)} bytes instead of {wanted.size}",
            hint="the registry's copy is damaged; push the image again",
        )
