"""What a person calls an image by: a name, a digest, or the beginning of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from flatmount.errors import UnknownImage, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,254}\Z")
_DIGEST_PREFIX = re.compile(r"(?:sha256:)?[0-9a-f]{4,64}\Z")
T = TypeVar("T")


def check_name(name: str) -> None:
    """Raises: UsageError for what cannot be an image's name, a digest among them."""
    if not _NAME.match(name) or _DIGEST_PREFIX.match(name) or name.startswith("sha256:"):
        raise UsageError(
            f"{name[:100]!r} cannot be an image's name",
            hint="use letters, digits and ._/:@+-, and nothing that looks like a digest",
        )


def digest_prefix(reference: str) -> str:
    """The beginning of a digest that `reference` is. Raises: UnknownImage where it cannot be one."""
    if not _DIGEST_PREFIX.match(reference):
        raise _unknown(reference)
    return f"sha256:{reference.removeprefix('sha256:')}"


def resolve(reference: str, images: Mapping[str, T]) -> T:
    """The one of `images`, by digest, that a digest or its beginning stands for. Raises: UnknownImage."""
    prefix = digest_prefix(reference)
    found = [image for digest, image in images.items() if digest.startswith(prefix)]
    if not found:
        raise _unknown(reference)
    if len(found) > 1:
        raise UnknownImage(f"{reference!r} begins more than one digest", hint="give more of it")
    return found[0]


def _unknown(reference: str) -> UnknownImage:
    return UnknownImage(f"there is no image {reference!r}", hint="`flatmount image list` shows what there is")
