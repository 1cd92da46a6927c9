"""An image of a layout as one tree, in memory: what the layers say, applied in order by the simplest means."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    info: tarfile.TarInfo
    data: bytes


def load_json(layout: str, digest: str) -> Any:
    return json.loads(blob(layout, digest))


def blob(layout: str, digest: str) -> bytes:
    with open(os.path.join(layout, "blobs", "sha256", digest.removeprefix("sha256:")), "rb") as file:
        data = file.read()
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
    return data


def image_of(layout: str) -> tuple[Any, list[bytes]]:
    """The config and the uncompressed layers of the only image in a layout; every digest and size checked."""
    with open(os.path.join(layout, "index.json"), "rb") as file:
        [entry] = json.load(file)["manifests"]
    manifest = load_json(layout, entry["digest"])
    config = load_json(layout, manifest["config"]["digest"])
    archives = []
    for descriptor, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        packed = blob(layout, descriptor["digest"])
        assert len(packed) == descriptor["size"]
        archives.append(gzip.decompress(packed))
        assert f"sha256:{hashlib.sha256(archives[-1]).hexdigest()}" == diff_id
    return config, archives


def merge(archives: list[bytes]) -> dict[str, Entry]:
    tree: dict[str, Entry] = {}
    for archive in archives:
        layer: dict[str, Entry] = {}
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./").rstrip("/")
                if name in ("", "."):
                    continue
                parent, _, base = name.rpartition("/")
                if base == ".wh..wh..opq":
                    tree = {path: entry for path, entry in tree.items() if not path.startswith(f"{parent}/")}
                elif base.startswith(".wh."):
                    _drop(tree, os.path.join(parent, base[4:]))
                else:
                    content = tar.extractfile(info) if info.isreg() or info.islnk() else None
                    layer[name] = Entry(info, content.read() if content else b"")
        for name, entry in layer.items():
            if name in tree and not (tree[name].info.isdir() and entry.info.isdir()):
                _drop(tree, name)
            tree[name] = entry
    return tree


def _drop(tree: dict[str, Entry], path: str) -> None:
    for name in [name for name in tree if name == path or name.startswith(f"{path}/")]:
        del tree[name]
