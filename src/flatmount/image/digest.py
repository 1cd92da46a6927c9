"""Digests: checked before they are used for anything, a path least of all."""

from __future__ import annotations

import hashlib
import re

from flatmount.errors import BadImage

_DIGEST = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")


def checked(text: object, where: str) -> str:
    """`text` itself when it is a digest that this project can verify.

    Raises: BadImage, naming `where` the digest was read.
    """
    if not isinstance(text, str) or not _DIGEST.match(text):
        raise BadImage(f"{where}: {str(text)[:100]!r} is not a sha256 or sha512 digest", hint="the image is malformed")
    return text


def of(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of `data`."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def algorithm(digest: str) -> str:
    """`sha256` of `sha256:…`."""
    return digest.partition(":")[0]


def hexadecimal(digest: str) -> str:
    """The part after the colon, which is a safe file name once the digest is checked."""
    return digest.partition(":")[2]


def path(digest: str) -> str:
    """Where an OCI layout keeps the blob: `blobs/sha256/…`."""
    return f"blobs/{algorithm(digest)}/{hexadecimal(digest)}"


def chain_ids(diff_ids: tuple[str, ...]) -> tuple[str, ...]:
    """The chain id after each layer, bottom to top.

    See: https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid
    """
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
