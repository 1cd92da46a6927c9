"""Images out of the store: OCI layouts whose layers have the `diff_id`s they were imported with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from flatmount.errors import StoreError
from flatmount.image.layout_writer import LayoutWriter, WrittenLayer
from flatmount.store import entries
from flatmount.store.archives import archive
from flatmount.store.disk import Disk
from flatmount.store.model import StoredImage, StoredLayer

Told = Callable[[str], None]


def export_images(
    disk: Disk, layout: LayoutWriter, images: Sequence[tuple[StoredImage, bytes]], told: Told | None = None
) -> None:
    """Write images, each with the bytes of its config, to `layout`; a layer that several have is written once.

    Configs and `diff_id`s stay what they were, and so does the image's id (the config's digest); layers are
    compressed anew, so that manifests get other digests. Every layer is verified while it is written.

    Raises: StoreError for a layer that is damaged, or whose archive cannot be had again.
    """
    written: dict[str, WrittenLayer] = {}
    for image, config_raw in images:
        for layer in image.layers:
            if layer.path not in written:
                if told is not None:
                    told(layer.diff_id)
                written[layer.path] = layout.add_layer(layer_archive(disk, layer))
        layers = [written[layer.path] for layer in image.layers]
        layout.add_ready_image(config_raw, layers, name=image.name or "")


def layer_archive(disk: Disk, layer: StoredLayer) -> Iterator[bytes]:
    """The uncompressed archive of a layer, in pieces. Raises: StoreError, as `export_images`."""
    number = int(layer.path.rpartition("/")[2])
    try:
        records = disk.open_archive(number)
    except FileNotFoundError:
        raise StoreError(
            f"layer {layer.diff_id} holds a file twice, and the store kept the last one",
            hint="export the image from where it came from",
        ) from None
    fds = [records]
    try:
        fds.append(disk.open_entries(number))
        known = dict(entries.read(fds[1], layer.diff_id))
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fds.append(os.open(layer.path, flags, dir_fd=disk.data_fd))
        yield from archive(records, fds[2], known, layer.diff_id)
    finally:
        for fd in fds:
            os.close(fd)
