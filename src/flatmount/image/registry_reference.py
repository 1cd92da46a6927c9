"""Names of images in registries: HOST/NAME[:TAG][@DIGEST]."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from flatmount.config import HOST
from flatmount.errors import BadImage, UsageError
from flatmount.image import digest as digests

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MOST_BYTES = 255
_HUB = "docker.io"
_HUB_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io"})
_FORM = "write HOST/NAME[:TAG][@DIGEST]"


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry. With a digest the tag says nothing any more; without either it is `latest`."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read HOST/NAME[:TAG][@DIGEST]. Raises: UsageError."""
        shown = repr(text[:_MOST_BYTES])
        rest, at, digest = text.partition("@")
        host, _, path = rest.partition("/")
        name, colon, tag = path.partition(":")
        if not path or not (host == "localhost" or any(sign in host for sign in ".:")):
            raise UsageError(f"{shown} names no registry", hint=f"{_FORM}, such as {_HUB}/library/debian:12")
        if not HOST.fullmatch(host):
            raise UsageError(f"{shown}: {host!r} is not a host", hint=_FORM)
        if not _REPOSITORY.fullmatch(name) or len(f"{host}/{name}") > _MOST_BYTES:
            raise UsageError(
                f"{shown}: {name!r} cannot be an image's name", hint="it is lower case, digits and ._-/ between them"
            )
        if colon and not _TAG.fullmatch(tag):
            raise UsageError(f"{shown}: {tag!r} cannot be a tag", hint="it is up to 128 of letters, digits and ._-")
        if at:
            try:
                digests.checked(digest, "reference")
            except BadImage as error:
                raise UsageError(f"{shown}: {digest!r} is not a digest", hint="write sha256: and 64 digits") from error
        host = _HUB if host in _HUB_ALIASES else host
        if host == _HUB and "/" not in name:
            name = f"library/{name}"
        return cls(host, name, tag or (None if at else "latest"), digest or None)

    def __str__(self) -> str:
        # What the store calls the image: with a tag by the tag, because a digest finds it there anyway.
        return f"{self.name}:{self.tag}" if self.tag else f"{self.name}@{self.digest}"

    @property
    def name(self) -> str:
        """HOST/NAME."""
        return f"{self.host}/{self.repository}"
