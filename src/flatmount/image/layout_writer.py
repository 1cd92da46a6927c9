"""Writes OCI image layouts. The same content gives the same bytes and the same digests.

See: the OCI image specification, image-layout.md, manifest.md, config.md, layer.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flatmount.errors import UsageError
from flatmount.image.model import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, REF_NAME, Descriptor
from flatmount.image.scratch import scratch_directory

MADE_BY = "io.flatmount.made-by"

# zlib, not a faster library: its output for a level does not depend on the processor, and digests must not.
# Level 1 takes a third of the time of level 6 for 10 % more bytes (201 MB of Debian packages, two threads:
# 1.1 s and 76 MB against 3.4 s and 69 MB).
_GZIP_LEVEL = 1
_GZIP_WINDOW = 31  # zlib.h: a window of 15 bits, and 16 for a gzip header, whose time stamp zlib leaves 0


@dataclass(frozen=True, slots=True)
class WrittenLayer:
    """A layer in the layout, with the digest of its uncompressed archive."""

    blob: Descriptor
    diff_id: str


class LayoutWriter:
    """Adds blobs to a layout that nobody sees yet; made by `new_layout`. Its methods may be called from any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._blobs = os.path.join(path, "blobs", "sha256")
        os.makedirs(self._blobs)
        self._manifests: list[dict[str, Any]] = []

    def add_blob(self, data: bytes, media_type: str) -> Descriptor:
        """Write `data` as a blob."""
        digest = hashlib.sha256(data).hexdigest()
        with tempfile.NamedTemporaryFile(dir=self._path, delete=False) as file:
            file.write(data)
        self._keep(file.name, digest)
        return Descriptor(media_type, f"sha256:{digest}", len(data))

    def add_json(self, value: Mapping[str, Any], media_type: str) -> Descriptor:
        """Write `value` as a JSON blob in one canonical form."""
        return self.add_blob(_canonical_json(value), media_type)

    def add_layer(self, archive: Iterable[bytes | memoryview]) -> WrittenLayer:
        """Compress an uncompressed tar archive, given in pieces, into a layer blob.

        The GIL is free while a piece is compressed or hashed: give pieces of 64 KiB and more.
        """
        compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
        plain, packed, size_bytes = hashlib.sha256(), hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self._path, delete=False) as file:

            def keep(data: bytes) -> None:
                nonlocal size_bytes
                packed.update(data)
                size_bytes += file.write(data)

            for piece in archive:
                plain.update(piece)
                keep(compressor.compress(piece))
            keep(compressor.flush())
        self._keep(file.name, packed.hexdigest())
        blob = Descriptor(f"{OCI_LAYER}+gzip", f"sha256:{packed.hexdigest()}", size_bytes)
        return WrittenLayer(blob, f"sha256:{plain.hexdigest()}")

    def add_image(self, config: Mapping[str, Any], layers: Sequence[WrittenLayer], *, name: str = "") -> Descriptor:
        """Write config and manifest of an image whose layers are written, lowest first, and list it in the index.

        `config` is the image configuration without `rootfs`, which follows from the layers. `name` becomes the
        reference under which other tools find the image in the layout.

        Returns: the manifest's descriptor.
        """
        rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
        return self.add_ready_image(_canonical_json({**config, "rootfs": rootfs}), layers, name=name)

    def add_ready_image(self, config_raw: bytes, layers: Sequence[WrittenLayer], *, name: str = "") -> Descriptor:
        """As `add_image`, with a configuration whose bytes, and so whose digest, stay what they are."""
        config = json.loads(config_raw)
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _as_json(self.add_blob(config_raw, OCI_CONFIG)),
            "layers": [_as_json(layer.blob) for layer in layers],
        }
        blob = self.add_json(manifest, OCI_MANIFEST)
        platform = {key: config[key] for key in ("architecture", "os", "variant") if key in config}
        entry = {**_as_json(blob), "platform": platform}
        if name:
            entry["annotations"] = {REF_NAME: name}
        self._manifests.append(entry)
        return blob

    def finish(self, made_by: str) -> None:
        """Write the index, marked with what made the layout, and the layout's own version file."""
        index = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": self._manifests,
            "annotations": {MADE_BY: made_by},
        }
        for name, value in (("index.json", index), ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
            with open(os.path.join(self._path, name), "wb") as file:
                file.write(_canonical_json(value))

    def size_bytes(self) -> int:
        """The bytes of all blobs written so far."""
        with os.scandir(self._blobs) as entries:
            return sum(entry.stat().st_size for entry in entries)

    def _keep(self, temporary: str, digest: str) -> None:
        os.chmod(temporary, 0o644)  # NamedTemporaryFile makes 0600; a layout is for whoever may enter its directory
        os.replace(temporary, os.path.join(self._blobs, digest))


@contextmanager
def new_layout(path: str, *, made_by: str) -> Iterator[LayoutWriter]:
    """Write an OCI image layout at `path`, which is there whole or not at all.

    It is written beside `path` and renamed when the block ends without an error. What is at `path` already is
    replaced only where it is an empty directory or a layout with the same `made_by` mark.

    Raises: UsageError, where `path` is something else; OSError from writing.
    """
    path = os.path.abspath(path)
    _check_target(path, made_by)
    with scratch_directory(os.path.dirname(path), os.path.basename(path)) as scratch:
        written = os.path.join(scratch, "new")
        writer = LayoutWriter(written)
        yield writer
        writer.finish(made_by)
        _check_target(path, made_by)
        if os.path.lexists(path):
            os.rename(path, os.path.join(scratch, "old"))
        os.rename(written, path)


def _check_target(path: str, made_by: str) -> None:
    if not os.path.isdir(os.path.dirname(path)):
        raise UsageError(f"cannot write {path}: {os.path.dirname(path)} is not a directory", hint="make it first")
    if not os.path.lexists(path):
        return
    if os.path.islink(path) or not os.path.isdir(path):
        raise UsageError(f"cannot write {path}: it is there and not a directory", hint="name another path")
    if os.listdir(path) and _mark_of(path) != made_by:
        raise UsageError(
            f"cannot write {path}: the directory is not empty and was not made by `{made_by}`",
            hint="name another path, or an empty directory",
        )


def _mark_of(path: str) -> str | None:
    try:
        with open(os.path.join(path, "index.json"), "rb") as file:
            index = json.loads(file.read(1 << 20))
        mark = index["annotations"][MADE_BY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mark if isinstance(mark, str) else None


def _as_json(blob: Descriptor) -> dict[str, Any]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}


def _canonical_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
