"""Images for tests, made in memory: layers of tar entries, an OCI layout or a docker-archive around them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import zstandard

from flatmount.image.model import host

OCI = "application/vnd.oci.image"
MTIME = 1_600_000_000
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "+gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "+zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}


@dataclass
class Node:
    """One tar entry; `kind` is tarfile's type byte."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    target: str = ""
    mtime: float = MTIME
    device: tuple[int, int] = (0, 0)
    pax: dict[str, str] = field(default_factory=dict)


def file(name: str, data: bytes | str = b"", **more: Any) -> Node:
    return Node(name, data=data.encode() if isinstance(data, str) else data, **more)


def directory(name: str, mode: int = 0o755, **more: Any) -> Node:
    return Node(name, tarfile.DIRTYPE, mode=mode, **more)


def symlink(name: str, target: str, **more: Any) -> Node:
    return Node(name, tarfile.SYMTYPE, target=target, mode=0o777, **more)


def hardlink(name: str, target: str) -> Node:
    return Node(name, tarfile.LNKTYPE, target=target)


def char(name: str, major: int, minor: int) -> Node:
    return Node(name, tarfile.CHRTYPE, device=(major, minor))


def archive(nodes: Sequence[Node]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for node in nodes:
            info = tarfile.TarInfo(node.name)
            info.type, info.mode, info.uid, info.gid = node.kind, node.mode, node.uid, node.gid
            info.linkname, info.mtime, info.size = node.target, node.mtime, len(node.data)
            info.devmajor, info.devminor = node.device
            info.pax_headers = dict(node.pax)
            tar.addfile(info, io.BytesIO(node.data))
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put(layout: str, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    """Write a blob; its descriptor."""
    with open(os.path.join(layout, "blobs/sha256", digest(data)[7:]), "wb") as out:
        out.write(data)
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def config_of(diff_ids: Sequence[str], **more: Any) -> bytes:
    value = {
        "architecture": host().architecture,
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "User": "1000:1000", "WorkingDir": "/srv"},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        **more,
    }
    return json.dumps(value).encode()


def new_layout(path: str) -> str:
    os.makedirs(os.path.join(path, "blobs/sha256"))
    with open(os.path.join(path, "oci-layout"), "w", encoding="ascii") as out:
        out.write('{"imageLayoutVersion": "1.0.0"}')
    return path


def write_index(layout: str, manifests: Sequence[dict[str, Any]]) -> None:
    with open(os.path.join(layout, "index.json"), "w", encoding="ascii") as out:
        json.dump({"schemaVersion": 2, "manifests": list(manifests)}, out)


def put_manifest(
    layout: str, layers: Sequence[bytes], packing: str = "+gzip", config: bytes | None = None, **more: Any
) -> dict[str, Any]:
    """Write a manifest, its config and its layers; the manifest's descriptor."""
    blobs = [put(layout, PACKERS[packing](layer), f"{OCI}.layer.v1.tar{packing}") for layer in layers]
    config = config_of([digest(layer) for layer in layers]) if config is None else config
    value = {"schemaVersion": 2, "config": put(layout, config, f"{OCI}.config.v1+json"), "layers": blobs}
    return put(layout, json.dumps(value).encode(), f"{OCI}.manifest.v1+json", **more)


def layout_of(path: str, layers: Sequence[Sequence[Node] | bytes], packing: str = "+gzip") -> str:
    """An OCI layout with one image of these layers, bottom to top. Returns its path."""
    raw = [layer if isinstance(layer, bytes) else archive(layer) for layer in layers]
    layout = new_layout(path)
    write_index(layout, [put_manifest(layout, raw, packing)])
    return layout


def tar_of(directory_path: str, path: str) -> str:
    """A directory as a tar archive."""
    with tarfile.open(path, "w") as tar:
        for name in sorted(os.listdir(directory_path)):
            tar.add(os.path.join(directory_path, name), name)
    return path


def docker_archive(path: str, layers: Sequence[Sequence[Node]], tags: Sequence[str] = ("app:1",)) -> str:
    """What `docker save` wrote before version 25, with the second copy of a layer as a link to the first."""
    raw = [archive(layer) for layer in layers]
    nodes: list[Node] = []
    paths: list[str] = []
    for position, layer in enumerate(raw):
        name = f"{position:064x}/layer.tar"
        paths.append(name)
        first = raw.index(layer)
        nodes.append(file(name, layer) if first == position else symlink(name, f"../{first:064x}/layer.tar"))
    config = config_of([digest(layer) for layer in raw])
    manifest = [{"Config": "config.json", "RepoTags": list(tags), "Layers": paths}]
    nodes += [file("config.json", config), file("manifest.json", json.dumps(manifest))]
    with open(path, "wb") as out:
        out.write(archive(nodes))
    return path
