"""docker-archive: what `docker save` wrote before OCI layouts, and what podman and skopeo still write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from flatmount.errors import BadImage
from flatmount.image import digest as digests
from flatmount.image import model
from flatmount.image.files import Files, read_document

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class DockerArchive:
    """One image of a docker-archive.

    It has no manifest of its own, so that one is made, always the same for it.
    """

    name: str | None
    manifest: model.Manifest
    config: model.ImageConfig
    config_raw: bytes
    files: Files
    paths: tuple[str, ...]

    @classmethod
    def read(cls, files: Files, name: str | None) -> DockerArchive:
        """Read the image called `name`, or the only one. Raises: BadImage."""
        where = f"{files.where}: manifest.json"
        chosen = _choose(files, name, where)
        config_raw = _required(files, _path(chosen.get("Config"), where))
        config = model.image_config(config_raw, f"{files.where}: config")
        layers = chosen.get("Layers")
        if not isinstance(layers, list):
            raise BadImage(f"{where}: Layers is not a list", hint="the archive is malformed")
        paths = tuple(_path(layer, where) for layer in layers)
        if len(paths) != len(config.diff_ids) or not paths:
            raise BadImage(
                f"{where}: {len(paths)} layers, and {len(config.diff_ids)} diff_ids in the config",
                hint="the archive is malformed",
            )
        described = tuple(_describe(files, *pair) for pair in zip(paths, config.diff_ids, strict=True))
        tags = _tags(chosen, where)
        return cls(
            name or (tags[0] if tags else None),
            _manifest(config_raw, described),
            config,
            config_raw,
            files,
            paths,
        )

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
        """See ImageSource.open_layer."""
        return _open(self.files, self.paths[position])

    def give_up(self) -> None:
        """See ImageSource.give_up. Nothing is waited for."""

    def close(self) -> None:
        """See ImageSource.close."""
        self.files.close()


def _choose(files: Files, name: str | None, where: str) -> dict[str, Any]:
    raw = read_document(files, "manifest.json", model.DOCUMENT_BYTES) or b""
    try:
        images = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"{where} is not JSON: {error}", hint="the archive is damaged or is not one") from error
    if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
        raise BadImage(f"{where} lists no images", hint="the archive is damaged or is not one")
    if name is not None:
        named = [image for image in images if name in _tags(image, where)]
        if not named:
            raise BadImage(f"{files.where} has no image {name!r}", hint=f"it has {_names(images, where)}")
        images = named
    if len(images) > 1:
        raise BadImage(
            f"{files.where} holds several images",
            hint=f"say which, as {files.where}:NAME: {_names(images, where)}",
        )
    chosen: dict[str, Any] = images[0]
    return chosen


def _names(images: list[dict[str, Any]], where: str) -> str:
    return ", ".join(tag for image in images for tag in _tags(image, where)) or "no names"


def _tags(image: dict[str, Any], where: str) -> list[str]:
    tags = image.get("RepoTags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise BadImage(f"{where}: RepoTags is not a list of names", hint="the archive is malformed")
    return tags


def _path(value: object, where: str) -> str:
    """A path inside the archive, which names a file of it and nothing else."""
    if not isinstance(value, str) or not value or any(part in ("", ".", "..") for part in value.split("/")):
        raise BadImage(f"{where}: {str(value)[:100]!r} is not a file's path", hint="the archive is malformed")
    return value


def _required(files: Files, path: str) -> bytes:
    data = read_document(files, path, model.DOCUMENT_BYTES)
    if data is None:
        raise BadImage(f"{files.where}: {path} is missing", hint="the archive is incomplete; save it again")
    return data


def _open(files: Files, path: str) -> BinaryIO:
    file = files.open(path)
    if file is None:
        raise BadImage(f"{files.where}: layer {path} is missing", hint="the archive is incomplete; save it again")
    return file


def _describe(files: Files, path: str, diff_id: str) -> model.Descriptor:
    """A plain layer's digest is its diff_id, checked when it is unpacked; a compressed one must be read."""
    with _open(files, path) as file:
        head = file.read(4)
        gzip, zstd = head[:2] == b"\x1f\x8b", head == b"\x28\xb5\x2f\xfd"
        if not (gzip or zstd):
            return model.Descriptor(model.OCI_LAYER, diff_id, files.size(path) or 0)
        sha256 = hashlib.sha256(head)
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    kind = f"{model.OCI_LAYER}+{'gzip' if gzip else 'zstd'}"
    return model.Descriptor(kind, f"sha256:{sha256.hexdigest()}", files.size(path) or 0)


def _manifest(config_raw: bytes, layers: tuple[model.Descriptor, ...]) -> model.Manifest:
    config = model.Descriptor(model.OCI_CONFIG, digests.of(config_raw), len(config_raw))
    value = {
        "schemaVersion": 2,
        "mediaType": model.OCI_MANIFEST,
        "config": {"mediaType": config.media_type, "digest": config.digest, "size": config.size},
        "layers": [{"mediaType": d.media_type, "digest": d.digest, "size": d.size} for d in layers],
    }
    raw = json.dumps(value, separators=(",", ":")).encode()
    return model.Manifest(digests.of(raw), raw, config, layers)
